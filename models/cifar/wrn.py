"""Wide ResNet: Zagoruyko and Komodakis, BMVC 2016 (arXiv 1605.07146), a pre-activation ResNet with more channels.

WRN-28-10 is depth 28, widen_factor 10. Dropout is between a block's two convolutions (section 2.4 of the paper).
"""
from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from models.base import blocks_per_stage
from models.cifar.preresnet import BasicBlock, PreResNet


class WideBlock(BasicBlock):
    def __init__(self, in_channels, out_channels, stride, drop_rate):
        super().__init__(in_channels, out_channels, stride)
        self.dropout = nn.Dropout(drop_rate)

    def residual(self, x):
        x = F.relu(self.bn2(self.conv1(x)), inplace=True)
        return self.conv2(self.dropout(x))


def wrn(num_classes=10, classifier=nn.Linear, depth=28, widen_factor=10, drop_rate=0.0):
    widths = [width * widen_factor for width in (16, 32, 64)]
    block = partial(WideBlock, drop_rate=drop_rate)
    return PreResNet(block, blocks_per_stage('wrn', depth, 6, 4), 16, widths, num_classes, classifier)
