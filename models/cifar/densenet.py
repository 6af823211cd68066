"""DenseNet: Huang et al., CVPR 2017 (arXiv 1608.06993).

DenseNet-BC, L=100, k=12 is depth 100, growth_rate 12, compression_rate 2, block_name Bottleneck: three dense blocks,
and between them transitions that divide the number of channels by compression_rate.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.base import ImageClassifier, blocks_per_stage, global_average_pool, he_initialise


class BasicBlock(nn.Module):
    """BN-ReLU-Conv3x3: adds growth_rate channels to its input."""
    convolutions = 1

    def __init__(self, in_channels, growth_rate, drop_rate):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, growth_rate, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        return torch.cat((x, self.dropout(out)), dim=1)


class Bottleneck(nn.Module):
    """BN-ReLU-Conv1x1 to 4 * growth_rate channels, then BN-ReLU-Conv3x3 (the B of DenseNet-BC)."""
    convolutions = 2

    def __init__(self, in_channels, growth_rate, drop_rate):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat((x, self.dropout(out)), dim=1)


BLOCKS = {'BasicBlock': BasicBlock, 'Bottleneck': Bottleneck}


def transition(in_channels, out_channels):
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True),
                         nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False), nn.AvgPool2d(2))


class DenseNet(ImageClassifier):
    def __init__(self, block, blocks, growth_rate, compression_rate, drop_rate, num_classes=10, classifier=nn.Linear):
        super().__init__()
        channels = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
        for stage in (1, 2, 3):
            layers = [block(channels + i * growth_rate, growth_rate, drop_rate) for i in range(blocks)]
            self.add_module(f'layer{stage}', nn.Sequential(*layers))
            channels += blocks * growth_rate
            if stage < 3:
                compressed = int(channels // compression_rate)
                if compressed < 1:
                    raise ValueError(f'a compression rate of {compression_rate:g} leaves none of {channels} channels')
                self.add_module(f'transition{stage}', transition(channels, compressed))
                channels = compressed
        self.bn = nn.BatchNorm2d(channels)
        he_initialise(self)
        self.set_head(channels, num_classes, classifier)

    def features(self, x):
        x = self.transition1(self.layer1(self.conv1(x)))
        x = self.layer3(self.transition2(self.layer2(x)))
        return global_average_pool(F.relu(self.bn(x), inplace=True))


def densenet(num_classes=10, classifier=nn.Linear, depth=100, block_name='Bottleneck', growth_rate=12,
             compression_rate=2.0, drop_rate=0.0):
    block = BLOCKS[block_name]
    blocks = blocks_per_stage(f'densenet with {block_name}', depth, 3 * block.convolutions, 4)
    return DenseNet(block, blocks, growth_rate, compression_rate, drop_rate, num_classes, classifier)
