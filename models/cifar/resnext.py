"""ResNeXt: Xie et al., CVPR 2017 (arXiv 1611.05431), the CIFAR networks of section 5.2.

ResNeXt-29, 8x64d is depth 29, cardinality 8, widen_factor 4: stages of 256, 512 and 1024 channels, whose
3x3 convolutions have 64, 128 and 256 channels in each of the 8 groups.
"""
from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from models.base import StagedClassifier, blocks_per_stage, global_average_pool, he_initialise
from models.cifar.resnet import projection


class ResNeXtBottleneck(nn.Module):
    def __init__(self, in_channels, out_channels, stride, cardinality, widen_factor):
        super().__init__()
        channels = cardinality * (out_channels // widen_factor)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNeXt(StagedClassifier):
    def __init__(self, blocks, cardinality, widen_factor, num_classes=10, classifier=nn.Linear):
        super().__init__()
        block = partial(ResNeXtBottleneck, cardinality=cardinality, widen_factor=widen_factor)
        widths = [width * widen_factor for width in (64, 128, 256)]
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.add_stages(block, blocks, 64, widths)
        he_initialise(self)
        self.set_head(widths[-1], num_classes, classifier)

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return global_average_pool(self.run_stages(x))


def resnext(num_classes=10, classifier=nn.Linear, depth=29, cardinality=8, widen_factor=4):
    return ResNeXt(blocks_per_stage('resnext', depth, 9, 2), cardinality, widen_factor, num_classes, classifier)
