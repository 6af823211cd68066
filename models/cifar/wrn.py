"""Wide ResNet: Zagoruyko and Komodakis, BMVC 2016 (arXiv 1605.07146). WRN-28-10 is depth 28, widen_factor 10.

A pre-activation block with dropout between its two convolutions (section 2.4 of the paper).
"""
from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from models.base import StagedClassifier, blocks_per_stage, global_average_pool, he_initialise
from models.cifar.preresnet import BasicBlock


class WideBlock(BasicBlock):
    def __init__(self, in_channels, out_channels, stride, drop_rate):
        super().__init__(in_channels, out_channels, stride)
        self.dropout = nn.Dropout(drop_rate)

    def residual(self, x):
        x = F.relu(self.bn2(self.conv1(x)), inplace=True)
        return self.conv2(self.dropout(x))


class WideResNet(StagedClassifier):
    def __init__(self, blocks, widen_factor, drop_rate, num_classes=10, classifier=nn.Linear):
        super().__init__()
        widths = [width * widen_factor for width in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.add_stages(partial(WideBlock, drop_rate=drop_rate), blocks, 16, widths)
        self.bn = nn.BatchNorm2d(widths[-1])
        he_initialise(self)
        self.set_head(widths[-1], num_classes, classifier)

    def features(self, x):
        x = self.run_stages(self.conv1(x))
        return global_average_pool(F.relu(self.bn(x), inplace=True))


def wrn(num_classes=10, classifier=nn.Linear, depth=28, widen_factor=10, drop_rate=0.0):
    return WideResNet(blocks_per_stage('wrn', depth, 6, 4), widen_factor, drop_rate, num_classes, classifier)
