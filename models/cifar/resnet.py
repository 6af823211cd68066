"""ResNet: He et al., CVPR 2016 (arXiv 1512.03385), section 4.2 (resnet) and the wider ResNet-18 used on CIFAR.

`resnet`: three stages of 16, 32 and 64 channels, any depth of 6n+2 with BasicBlock or 9n+2 with Bottleneck.
`resnet18`: four stages of 64 to 512 channels, two BasicBlocks each, 3x3 stem without pooling.
The shortcut of a block that changes the shape is a 1x1 convolution (option B of the paper).
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import StagedClassifier, blocks_per_stage, global_average_pool, he_initialise


def projection(in_channels, out_channels, stride):
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                         nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    expansion = 1
    convolutions = 2

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """channels, groups: of the 3x3 convolution; in ResNet a quarter of out_channels, and 1 group. ResNeXt sets both."""
    expansion = 4
    convolutions = 3

    def __init__(self, in_channels, out_channels, stride, channels=None, groups=1):
        super().__init__()
        channels = channels or out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
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


BLOCKS = {'BasicBlock': BasicBlock, 'Bottleneck': Bottleneck}


class ResNet(StagedClassifier):
    """A convolution with `stem` channels, then a stage of `blocks` blocks for each number of channels in `widths`."""

    def __init__(self, block, blocks, stem, widths, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.add_stages(block, blocks, stem, widths)
        he_initialise(self)
        self.set_head(widths[-1], num_classes, classifier)

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return global_average_pool(self.run_stages(x))


def resnet(num_classes=10, classifier=nn.Linear, depth=20, block_name='BasicBlock'):
    block = BLOCKS[block_name]
    blocks = blocks_per_stage(f'resnet with {block_name}', depth, 3 * block.convolutions, 2)
    return ResNet(block, blocks, 16, [width * block.expansion for width in (16, 32, 64)], num_classes, classifier)


def resnet18(num_classes=10, classifier=nn.Linear):
    return ResNet(BasicBlock, 2, 64, (64, 128, 256, 512), num_classes, classifier)
