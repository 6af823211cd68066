"""The network of cifar10-airbench, made to train in seconds: Jordan, arXiv 2404.00498, section 3 and figure 1.

A convolution of 2x2 pixels whitens patches of the images (section 3.1, after Page's blog), three groups of two
convolutions follow, then the largest value of each channel. Each convolution begins as the identity where channels
allow it (section 3.2). The paper multiplies the logits by 1/9; here the features are, so that every head sees them so.
The paper stops training the whitening layer's bias after three epochs; here it is always trained.

Widths of the paper's networks: 64-256-256 (94%), 128-384-384 (95%), 128-512-512 (96%, with more layers there).
64-128-128 is a smaller one for a CPU.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.base import ImageClassifier, global_max_pool, read_widths

SCALE = 1 / 9
PATCH = 2  # pixels a side
EPSILON = 5e-4  # added to the eigenvalues, as in the paper's code


class WhiteningConv(nn.Module):
    """(batch, 3, height, width) -> (batch, 24, height - 1, width - 1): whitened patches, their negatives, plus a bias.

    The weights are a buffer, as nothing trains them: optimizers, noise on the weights and moving averages leave them
    as they are, and checkpoints have them. They are random until `set_from`.
    """

    def __init__(self, in_channels=3):
        super().__init__()
        size = in_channels * PATCH ** 2
        self.register_buffer('weight', nn.Conv2d(in_channels, 2 * size, PATCH).weight.detach().clone())
        self.bias = nn.Parameter(torch.zeros(2 * size))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)

    @torch.no_grad()
    def set_from(self, images):
        """Eigenvectors v_i of the patches' covariance, with eigenvalues l_i: v_i / sqrt(l_i + EPSILON), and negatives.

        The covariance is taken about 0, the mean colour of normalised images.
        """
        covariance, patches = 0, 0
        for part in images.split(500):  # in double precision all patches at once would take much memory
            flat = F.unfold(part.double().cpu(), PATCH).transpose(1, 2).flatten(0, 1)
            covariance, patches = covariance + flat.T @ flat, patches + len(flat)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance / patches)
        filters = (eigenvectors / (eigenvalues + EPSILON).sqrt()).T.flip(0)  # the largest eigenvalue first
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))


class BiasNorm(nn.BatchNorm2d):
    """BatchNorm whose scale stays 1: a buffer, so that only the bias is trained."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-12, momentum=0.4)  # which the paper's code calls 0.6, the part that is kept
        del self.weight
        self.register_buffer('weight', torch.ones(channels))


def convolution(in_channels, out_channels):
    """3x3, without a bias; the first channels come out as they went in, the others begin as PyTorch sets them."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])
    return conv


def group(in_channels, out_channels):
    return nn.Sequential(convolution(in_channels, out_channels), nn.MaxPool2d(2), BiasNorm(out_channels), nn.GELU(),
                         convolution(out_channels, out_channels), BiasNorm(out_channels), nn.GELU())


class Airbench(ImageClassifier):
    def __init__(self, widths, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.whitening, self.activation = WhiteningConv(), nn.GELU()
        channels = 2 * 3 * PATCH ** 2
        for number, width in enumerate(widths, start=1):
            self.add_module(f'layer{number}', group(channels, width))
            channels = width
        self.set_head(channels, num_classes, classifier)

    def prepare(self, images):
        self.whitening.set_from(images)

    def features(self, x):
        x = self.activation(self.whitening(x))
        return SCALE * global_max_pool(self.layer3(self.layer2(self.layer1(x))))


def airbench(num_classes=10, classifier=nn.Linear, widths='64-256-256'):
    """widths: channels of the three groups; ValueError unless it is three numbers of 1 to 10000."""
    return Airbench(read_widths(widths, example='64-256-256'), num_classes, classifier)
