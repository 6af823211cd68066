"""ResNeXt: Xie et al., CVPR 2017 (arXiv 1611.05431), the CIFAR networks of section 5.2: ResNet of grouped Bottlenecks.

ResNeXt-29, 8x64d is depth 29, cardinality 8, widen_factor 4: stages of 256, 512 and 1024 channels, whose 3x3
convolutions have 64, 128 and 256 channels in each of the 8 groups.
"""
import torch.nn as nn

from models.base import blocks_per_stage
from models.cifar.resnet import Bottleneck, ResNet


def resnext(num_classes=10, classifier=nn.Linear, depth=29, cardinality=8, widen_factor=4):
    def block(in_channels, out_channels, stride):
        channels = cardinality * (out_channels // widen_factor)
        return Bottleneck(in_channels, out_channels, stride, channels, groups=cardinality)

    widths = [width * widen_factor for width in (64, 128, 256)]
    return ResNet(block, blocks_per_stage('resnext', depth, 9, 2), 64, widths, num_classes, classifier)
