"""The shallow networks for CIFAR, C1 and C3, of Keskar et al., ICLR 2017 (arXiv 1609.04836).

Two convolutions and three linear layers, with dropout and without biases before the batch norms, as Hoffer, Hubara and
Soudry, NeurIPS 2017 (arXiv 1705.08741) and SmoothOut (Wen et al., arXiv 1805.07898) train it. `regime` comes from the
code of Hoffer et al. and begins at a tenth of its highest learning rate. Convolutions are initialised as in He et al.
(2015).
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import ImageClassifier, he_initialise

POOLED = 7  # side of a 32x32 image after the two poolings


def convolution(in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 64, kernel_size=5, padding=2, bias=False), nn.MaxPool2d(3, stride=2),
                         nn.BatchNorm2d(64), nn.ReLU(inplace=True))


def hidden(in_features, out_features):
    return nn.Sequential(nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features),
                         nn.ReLU(inplace=True), nn.Dropout(0.5))


class Shallow(ImageClassifier):
    regime = {0: {'optimizer': 'SGD', 'lr': 1e-3, 'weight_decay': 5e-4},
              60: {'lr': 1e-2}, 120: {'lr': 1e-3}, 180: {'lr': 1e-4}}

    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layer1, self.layer2 = convolution(3), convolution(64)
        self.layer3, self.layer4 = hidden(64 * POOLED * POOLED, 384), hidden(384, 192)
        he_initialise(self)
        self.set_head(192, num_classes, classifier)

    def features(self, x):
        x = self.layer2(self.layer1(x))
        # Pooling to the same size is skipped, because on CUDA its gradient has no deterministic implementation.
        if x.shape[2:] != (POOLED, POOLED):
            x = F.adaptive_avg_pool2d(x, POOLED)
        return self.layer4(self.layer3(x.flatten(1)))


def shallow(num_classes=10, classifier=nn.Linear):
    return Shallow(num_classes, classifier)
