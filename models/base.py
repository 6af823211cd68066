"""What architectures share: a swappable classifier head, stages, options with defaults, initialisation, depths."""
import inspect
import re
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class WithAuxiliary(NamedTuple):
    """What a network with auxiliary classifiers returns in training; in evaluation it returns what its head does.

    outputs: what the head returned. auxiliary: logits (batch, num_classes) of each auxiliary classifier.
    weight: of each one's cross-entropy, beside that of the head.
    """
    outputs: Tensor | tuple
    auxiliary: list[Tensor]
    weight: float


class ImageClassifier(nn.Module):
    """Features, then a head that can be swapped.

    A subclass builds its layers, calls `set_head`, and defines `features(x)`, which maps images (batch, 3, height,
    width) to features (batch, in_features). `in_features` and `num_classes` are the sizes of the head.

    It may also say how it wants to be trained, or leave these None:
    regime: a dict of epoch -> settings (optimizer, lr, momentum, weight_decay) that hold from that epoch on, or a
    method regime(self, epoch) that gives such settings.
    input_transform: {'train': f, 'eval': f}, f: PIL image -> float tensor (3, height, width), instead of the script's
    cropping, mirroring and normalising.

    A method prepare(self, images) is called once, where a new run of cifar.py begins, with up to 5000 training images
    (number, 3, height, width), normalised and not augmented, for what the network takes from them before training.
    It must not draw random numbers. A run that begins with the weights of a file does not call it.
    """
    regime = None
    input_transform = None
    head_dropout = 0.0  # the share of the features that is dropped before the head in training, whatever the head is

    def set_head(self, in_features, num_classes, classifier):
        """`classifier` is any callable (in_features, num_classes) -> module."""
        self.in_features, self.num_classes = in_features, num_classes
        self.head = classifier(in_features, num_classes)
        # A method's head is called with the targets too; nn.Linear knows only features.
        _, *others = inspect.signature(self.head.forward).parameters
        self.head_takes_targets = bool({*others[:1]} & {'targets', 'target', 'labels', 'label'})

    def features(self, x):
        raise NotImplementedError

    def forward(self, x, targets=None):
        """Whatever the head returns: logits (batch, num_classes), or a tuple that begins with them.

        x: images (batch, 3, height, width). targets: class indices (batch,), for heads that use them.
        """
        return self.classify(self.features(x), targets)

    def classify(self, features, targets=None):
        """The head alone, features (batch, in_features)."""
        if self.head_dropout:
            features = F.dropout(features, self.head_dropout, self.training)
        return self.head(features, targets) if self.head_takes_targets else self.head(features)

    def train(self, mode=True):
        """As in nn.Module, but BatchNorm inside of a module whose parameters are all frozen keeps its statistics."""
        super().train(mode)
        for module in self.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                for norm in module.modules():
                    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                        norm.eval()
        return self


class _WithFeatureLayer:
    """A mixin before the class of a network, whose features go through `feature_layer`."""

    def features(self, x):
        return self.feature_layer(super().features(x))


def add_feature_layer(model, feature_dim, classifier):
    """Put a linear layer to `feature_dim` features before the head of an ImageClassifier, which `classifier` makes
    again. Returns the model.
    """
    del model.head  # so that the new one is the last module
    model.feature_layer = nn.Linear(model.in_features, feature_dim)
    # A subclass rather than an attribute `features`, which a copy of the model would share.
    model.__class__ = type(type(model).__name__, (_WithFeatureLayer, type(model)), {})
    model.set_head(feature_dim, model.num_classes, classifier)
    return model


class StagedClassifier(ImageClassifier):
    """A network of stages `layer1`, `layer2`, ...: every stage after the first halves the resolution."""

    def add_stages(self, block, blocks, in_channels, widths):
        """`blocks` blocks a stage, `widths` their output channels; block(in_channels, out_channels, stride) makes one.
        """
        for number, width in enumerate(widths, start=1):
            first = block(in_channels, width, 1 if number == 1 else 2)
            rest = [block(width, width, 1) for _ in range(blocks - 1)]
            self.add_module(f'layer{number}', nn.Sequential(first, *rest))
            in_channels = width
        self.stages = len(widths)

    def run_stages(self, x):
        for number in range(1, self.stages + 1):
            x = getattr(self, f'layer{number}')(x)
        return x


def with_defaults(arch, options, known, flags):
    """`options` (None = not given), with the defaults of `known`, the options of `arch`; flags: the flag of each
    option.

    ValueError if an option is given that the architecture does not know.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            takes = ', '.join(flags[option] for option in known) or 'no such option'
            raise ValueError(f'{flags[name]} is not used by --arch {arch}, which takes {takes}')
    return {**known, **given}


def read_widths(text, example):
    """The numbers of `--widths`, such as 64-128-128: as many as `example` has, each of 1 to 10000; else ValueError."""
    count = example.count('-') + 1
    fits = re.fullmatch('-'.join(['[0-9]{1,5}'] * count), text)
    widths = [int(word) for word in text.split('-')] if fits else []
    if not fits or not all(1 <= width <= 10000 for width in widths):
        raise ValueError(f'--widths must be {count} whole numbers of 1 to 10000, such as {example}, was given {text}')
    return widths


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def global_average_pool(x):
    """(batch, channels, height, width) -> (batch, channels), for any height and width."""
    return x.mean(dim=(2, 3))


def global_max_pool(x):
    """(batch, channels, height, width) -> (batch, channels), for any height and width.

    Where several places share the largest value they share its gradient; on CUDA that is deterministic, and the
    gradient of AdaptiveMaxPool2d is not.
    """
    return x.amax(dim=(2, 3))


def he_initialise(model):
    """He et al. (2015), normal, by fan-out: every convolution of `model`; batch norms and biases as PyTorch sets them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def blocks_per_stage(network, depth, layers_per_block, extra_layers):
    """The n of depth = layers_per_block * n + extra_layers; ValueError, naming the nearest depths, if there is none."""
    blocks, rest = divmod(depth - extra_layers, layers_per_block)
    if rest == 0 and blocks >= 1:
        return blocks
    below = max(blocks, 1) * layers_per_block + extra_layers
    above = max(blocks + 1, 1) * layers_per_block + extra_layers
    nearest = f'{below} and {above}' if above > below else f'{below}'
    raise ValueError(f'{network} has a depth of {layers_per_block}n+{extra_layers}, so {depth} is impossible; '
                     f'the nearest possible: {nearest}')
