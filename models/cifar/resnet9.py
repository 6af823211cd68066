"""ResNet-9, the network of David Page's entry to DAWNBench: github.com/davidcpage/cifar10-fast, `dawn.py`.

Eight convolutions, each with BatchNorm and ReLU, and a linear layer: prep 64, then 128, 256 and 512 channels, each
after a max-pool, with a residual of two convolutions at 128 and 512. Convolutions begin as PyTorch sets them. Page
multiplies the logits by 0.125; here the features are, so that every head sees them so.
"""
from torch import nn

from models.base import ImageClassifier, global_max_pool

SCALE = 0.125


def convolution(in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
                         nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolutions = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x):
        return x + self.convolutions(x)


class ResNet9(ImageClassifier):
    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.prep = convolution(3, 64)
        self.layer1 = nn.Sequential(convolution(64, 128), nn.MaxPool2d(2), Residual(128))
        self.layer2 = nn.Sequential(convolution(128, 256), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(convolution(256, 512), nn.MaxPool2d(2), Residual(512))
        self.set_head(512, num_classes, classifier)

    def features(self, x):
        return SCALE * global_max_pool(self.layer3(self.layer2(self.layer1(self.prep(x)))))


def resnet9(num_classes=10, classifier=nn.Linear):
    return ResNet9(num_classes, classifier)
