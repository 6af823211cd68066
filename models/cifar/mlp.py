"""The multilayer perceptron F1 of Keskar et al., ICLR 2017 (arXiv 1609.04836): five hidden layers, batch norm, ReLU.

F1 takes the 784 grey values of a digit; this takes the 3072 values of a 32x32 colour image, and resizes other images to
32x32 by averaging. `regime` comes from the code of Hoffer, Hubara and Soudry, NeurIPS 2017 (arXiv 1705.08741).
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import ImageClassifier

SIDE = 32


def hidden(in_features):
    return nn.Sequential(nn.Linear(in_features, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))


class MLP(ImageClassifier):
    regime = {0: {'optimizer': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4},
              10: {'lr': 1e-2}, 20: {'lr': 1e-3}, 30: {'lr': 1e-4}}

    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layer1 = hidden(3 * SIDE * SIDE)
        self.layer2, self.layer3, self.layer4, self.layer5 = (hidden(512) for _ in range(4))
        self.set_head(512, num_classes, classifier)

    def features(self, x):
        # Pooling to the same size is skipped, because on CUDA its gradient has no deterministic implementation.
        if x.shape[2:] != (SIDE, SIDE):
            x = F.adaptive_avg_pool2d(x, SIDE)
        x = self.layer2(self.layer1(x.flatten(1)))
        return self.layer5(self.layer4(self.layer3(x)))


def mlp(num_classes=10, classifier=nn.Linear):
    return MLP(num_classes, classifier)
