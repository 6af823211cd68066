"""LeNet for digits of 28x28 or 32x32 pixels: LeCun et al., Proceedings of the IEEE 1998, in its usual modern form.

Convolutions of 20 and 50 channels and one hidden layer of 500; ReLU and max-pooling instead of the paper's scaled tanh
and trainable subsampling, a linear head instead of its radial basis functions. Convolutions are initialised as in
He et al. (2015).
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import ImageClassifier, he_initialise


class MaxPoolTo4x4(nn.Module):
    """Max-pooling to 4x4: in 2x2 windows of 8x8 (images of 28x28), in larger, overlapping windows of 10x10 (32x32).

    AdaptiveMaxPool2d has no deterministic gradient on CUDA.
    """

    def forward(self, x):
        strides = [side // 4 for side in x.shape[2:]]
        return F.max_pool2d(x, [side - 3 * stride for side, stride in zip(x.shape[2:], strides)], strides)


class LeNet(ImageClassifier):
    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 20, kernel_size=5), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(20, 50, kernel_size=5), nn.ReLU(inplace=True), MaxPoolTo4x4())
        self.layer3 = nn.Sequential(nn.Linear(50 * 4 * 4, 500), nn.ReLU(inplace=True))
        he_initialise(self)
        self.set_head(500, num_classes, classifier)

    def features(self, x):
        return self.layer3(self.layer2(self.layer1(x)).flatten(1))


def lenet(num_classes=10, classifier=nn.Linear):
    return LeNet(num_classes, classifier)
