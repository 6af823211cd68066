"""AlexNet for 32x32 images: the five convolutions of Krizhevsky et al. (NeurIPS 2012), narrowed, and one linear layer.

Initialised as in He et al. (2015): the paper's N(0, 0.01) needs its local response normalisation and a learning rate
that is cut by hand, and this small version has neither.
"""
import torch.nn as nn

from models.base import ImageClassifier, global_average_pool, he_initialise


class AlexNet(ImageClassifier):
    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=5), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        he_initialise(self)
        self.set_head(256, num_classes, classifier)

    def features(self, x):
        return global_average_pool(self.layers(x))


def alexnet(num_classes=10, classifier=nn.Linear):
    return AlexNet(num_classes, classifier)
