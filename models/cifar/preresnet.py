"""Pre-activation ResNet: He et al., ECCV 2016 (arXiv 1603.05027), and the wider PreAct-ResNet-18 used on CIFAR.

`preresnet`: three stages of 16, 32 and 64 channels, any depth of 6n+2 with BasicBlock or 9n+2 with Bottleneck.
`preactresnet18`: four stages of 64 to 512 channels, two BasicBlocks each.
A block that changes the shape takes its shortcut, a 1x1 convolution, from the activated input.
"""
import torch.nn as nn
import torch.nn.functional as F

from models.base import StagedClassifier, blocks_per_stage, global_average_pool, he_initialise


class PreActivationBlock(nn.Module):
    """The shortcut, the same for both blocks; a block defines `residual`, a function of the activated input."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.bn1(x), inplace=True)
        identity = x if self.shortcut is None else self.shortcut(activated)
        return identity + self.residual(activated)


class BasicBlock(PreActivationBlock):
    expansion = 1
    convolutions = 2

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def residual(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(x)), inplace=True))


class Bottleneck(PreActivationBlock):
    expansion = 4
    convolutions = 3

    def __init__(self, in_channels, out_channels, stride):
        super().__init__(in_channels, out_channels, stride)
        channels = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)

    def residual(self, x):
        x = self.conv2(F.relu(self.bn2(self.conv1(x)), inplace=True))
        return self.conv3(F.relu(self.bn3(x), inplace=True))


BLOCKS = {'BasicBlock': BasicBlock, 'Bottleneck': Bottleneck}


class PreResNet(StagedClassifier):
    """ResNet with a last batch norm and ReLU, because no block ends with them."""

    def __init__(self, block, blocks, stem, widths, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, kernel_size=3, padding=1, bias=False)
        self.add_stages(block, blocks, stem, widths)
        self.bn = nn.BatchNorm2d(widths[-1])
        he_initialise(self)
        self.set_head(widths[-1], num_classes, classifier)

    def features(self, x):
        x = self.run_stages(self.conv1(x))
        return global_average_pool(F.relu(self.bn(x), inplace=True))


def preresnet(num_classes=10, classifier=nn.Linear, depth=20, block_name='BasicBlock'):
    block = BLOCKS[block_name]
    blocks = blocks_per_stage(f'preresnet with {block_name}', depth, 3 * block.convolutions, 2)
    return PreResNet(block, blocks, 16, [width * block.expansion for width in (16, 32, 64)], num_classes, classifier)


def preactresnet18(num_classes=10, classifier=nn.Linear):
    return PreResNet(BasicBlock, 2, 64, (64, 128, 256, 512), num_classes, classifier)
