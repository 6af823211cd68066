"""VGG for 32x32 images: Simonyan and Zisserman, ICLR 2015 (arXiv 1409.1556), configurations A, B, D and E.

The convolutions are the paper's, and `--widths` makes them narrower; one linear layer on 512 features replaces its
three. Initialised as in He et al. (2015), so that all 19 layers train from scratch; the paper copied them from
shallower networks.
"""
import torch.nn as nn

from models.base import ImageClassifier, global_average_pool, he_initialise, read_widths

# Number of convolutions in each of the five stages; each stage ends with a 2x2 max-pool.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = '64-128-256-512-512'  # channels of the five stages


class VGG(ImageClassifier):
    def __init__(self, depth, batch_norm, widths, num_classes=10, classifier=nn.Linear):
        super().__init__()
        layers, channels = [], 3
        for convolutions, width in zip(STAGES[depth], widths):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        he_initialise(self)
        self.set_head(channels, num_classes, classifier)

    def features(self, x):
        return global_average_pool(self.layers(x))


def _constructor(depth, batch_norm):
    def vgg(num_classes=10, classifier=nn.Linear, widths=WIDTHS):
        """widths: channels of the five stages; ValueError unless it is five numbers of 1 to 10000."""
        return VGG(depth, batch_norm, read_widths(widths, example=WIDTHS), num_classes, classifier)
    return vgg


vgg11, vgg13, vgg16, vgg19 = (_constructor(depth, batch_norm=False) for depth in STAGES)
vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn = (_constructor(depth, batch_norm=True) for depth in STAGES)
