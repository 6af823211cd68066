"""PyramidNet: Han, Kim and Kim, CVPR 2017 (arXiv 1610.02915), with additive widening.

Block k of N has round(16 + alpha k / N) channels, and a Bottleneck has four times as many at its output; three stages,
any depth of 6n+2 with BasicBlock or 9n+2 with Bottleneck. A block begins and ends with a batch norm and has no ReLU
before its first convolution. Its shortcut has no parameters: it averages if the block is strided, and is padded with
channels of zeros.
"""
from itertools import pairwise

import torch.nn as nn
import torch.nn.functional as F

from models.base import StagedClassifier, blocks_per_stage, global_average_pool, he_initialise


class PyramidalBlock(nn.Module):
    """The shortcut, the same for both blocks; a block defines `residual`."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.added_channels = out_channels - in_channels
        # The strided convolution rounds an odd size up, hence ceil_mode.
        self.pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)

    def forward(self, x):
        return self.residual(x) + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.added_channels))


class BasicBlock(PyramidalBlock):
    expansion = 1
    convolutions = 2

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def residual(self, x):
        x = self.conv1(self.bn1(x))
        return self.bn3(self.conv2(F.relu(self.bn2(x), inplace=True)))


class Bottleneck(PyramidalBlock):
    expansion = 4
    convolutions = 3

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        channels = out_channels // self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.bn4 = nn.BatchNorm2d(out_channels)

    def residual(self, x):
        x = self.conv1(self.bn1(x))
        x = self.conv2(F.relu(self.bn2(x), inplace=True))
        return self.bn4(self.conv3(F.relu(self.bn3(x), inplace=True)))


BLOCKS = {'BasicBlock': BasicBlock, 'Bottleneck': Bottleneck}


class PyramidNet(StagedClassifier):
    """Three stages of `blocks` blocks; unlike in other staged networks every block is wider than the previous block."""

    def __init__(self, block, blocks, alpha, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stages = 3
        num_blocks = self.stages * blocks
        widths = [16, *(block.expansion * round(16 + alpha * k / num_blocks) for k in range(1, num_blocks + 1))]
        layers = [block(in_channels, out_channels, 2 if index in (blocks, 2 * blocks) else 1)
                  for index, (in_channels, out_channels) in enumerate(pairwise(widths))]
        for stage in range(self.stages):
            self.add_module(f'layer{stage + 1}', nn.Sequential(*layers[stage * blocks:(stage + 1) * blocks]))
        self.bn = nn.BatchNorm2d(widths[-1])
        he_initialise(self)
        self.set_head(widths[-1], num_classes, classifier)

    def features(self, x):
        x = self.run_stages(self.bn1(self.conv1(x)))
        return global_average_pool(F.relu(self.bn(x), inplace=True))


def pyramidnet(num_classes=10, classifier=nn.Linear, depth=110, alpha=270, block_name='BasicBlock'):
    block = BLOCKS[block_name]
    blocks = blocks_per_stage(f'pyramidnet with {block_name}', depth, 3 * block.convolutions, 2)
    return PyramidNet(block, blocks, alpha, num_classes, classifier)
