"""LeNet for digits of 28x28 or 32x32 pixels: LeCun et al., Proceedings of the IEEE 1998, in its usual modern form.

Convolutions of 20 and 50 channels and one hidden layer of 500; ReLU and max-pooling instead of the paper's scaled tanh
and trainable subsampling, a linear head instead of its radial basis functions. Convolutions are initialised as in
He et al. (2015).

`lenet_bn` is the network for MNIST in the code of Large Margin (Elsayed et al., NeurIPS 2018): 32 and 64 channels,
convolutions that keep the size of the image and have no bias, BatchNorm after the pooling, a hidden layer of 512.
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import ImageClassifier, he_initialise


class MaxPoolTo(nn.Module):
    """Max-pooling to side x side: in windows of 2x2 where the input is twice as large (as in both networks for images
    of 28x28), in larger, overlapping windows where it is a little more.

    AdaptiveMaxPool2d has no deterministic gradient on CUDA.
    """

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        strides = [side // self.side for side in x.shape[2:]]
        windows = [side - (self.side - 1) * stride for side, stride in zip(x.shape[2:], strides)]
        return F.max_pool2d(x, windows, strides)


class LeNet(ImageClassifier):
    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 20, kernel_size=5), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(20, 50, kernel_size=5), nn.ReLU(inplace=True), MaxPoolTo(4))
        self.layer3 = nn.Sequential(nn.Linear(50 * 4 * 4, 500), nn.ReLU(inplace=True))
        he_initialise(self)
        self.set_head(500, num_classes, classifier)

    def features(self, x):
        return self.layer3(self.layer2(self.layer1(x)).flatten(1))


class LeNetBN(ImageClassifier):
    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 32, kernel_size=5, padding=2, bias=False), nn.ReLU(inplace=True),
                                    nn.MaxPool2d(2), nn.BatchNorm2d(32))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, kernel_size=5, padding=2, bias=False), nn.ReLU(inplace=True),
                                    MaxPoolTo(7), nn.BatchNorm2d(64))
        self.layer3 = nn.Sequential(nn.Linear(64 * 7 * 7, 512), nn.ReLU(inplace=True))
        he_initialise(self)
        self.set_head(512, num_classes, classifier)

    def features(self, x):
        return self.layer3(self.layer2(self.layer1(x)).flatten(1))


def lenet(num_classes=10, classifier=nn.Linear):
    return LeNet(num_classes, classifier)


def lenet_bn(num_classes=10, classifier=nn.Linear):
    return LeNetBN(num_classes, classifier)
