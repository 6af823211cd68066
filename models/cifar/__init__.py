"""Architectures for 32x32 images; `--arch` offers what is in MODELS.

`build` makes one of them. Every constructor takes num_classes and classifier, and the options that its signature names;
OPTION_FLAGS has the flags that set these. A model of your own is a file here, an import and a line in MODELS.
"""
import inspect

import torch.nn as nn

from models.base import add_feature_layer, with_defaults
from models.cifar.airbench import airbench
from models.cifar.alexnet import alexnet
from models.cifar.densenet import densenet
from models.cifar.lenet import lenet, lenet_bn
from models.cifar.mlp import mlp
from models.cifar.preresnet import preactresnet18, preresnet
from models.cifar.pyramidnet import pyramidnet
from models.cifar.resnet import resnet, resnet18
from models.cifar.resnet9 import resnet9
from models.cifar.resnext import resnext
from models.cifar.shallow import shallow
from models.cifar.vgg import vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from models.cifar.wrn import wrn

MODELS = {
    'alexnet': alexnet,
    'vgg11': vgg11, 'vgg11_bn': vgg11_bn, 'vgg13': vgg13, 'vgg13_bn': vgg13_bn,
    'vgg16': vgg16, 'vgg16_bn': vgg16_bn, 'vgg19': vgg19, 'vgg19_bn': vgg19_bn,
    'resnet': resnet, 'resnet18': resnet18,
    'preresnet': preresnet, 'preactresnet18': preactresnet18,
    'resnext': resnext, 'wrn': wrn, 'densenet': densenet, 'pyramidnet': pyramidnet,
    'lenet': lenet, 'lenet_bn': lenet_bn, 'shallow': shallow, 'mlp': mlp,
    'resnet9': resnet9, 'airbench': airbench,
}

OPTION_FLAGS = {
    'depth': '--depth', 'block_name': '--block-name', 'cardinality': '--cardinality', 'widen_factor': '--widen-factor',
    'growth_rate': '--growthRate', 'compression_rate': '--compressionRate', 'drop_rate': '--drop',
    'alpha': '--alpha', 'widths': '--widths', 'feature_dim': '--feature-dim',
}
OF_ANY = {'feature_dim'}  # options of every architecture, which `build` itself sees to; not there unless given


def resolve_options(arch, options):
    """Every option of `arch`, from `options` (None = not given) or its default.

    ValueError if `options` has one that the architecture does not know.
    """
    known = {name: parameter.default for name, parameter in inspect.signature(MODELS[arch]).parameters.items()
             if name not in ('num_classes', 'classifier')}
    of_any = {name: value for name, value in options.items() if name in OF_ANY and value is not None}
    own = {name: value for name, value in options.items() if name not in OF_ANY}
    return {**with_defaults(arch, own, known, OPTION_FLAGS), **of_any}


def build(arch, num_classes, classifier=nn.Linear, feature_dim=None, **options):
    """The network `arch`. ValueError for an option it does not know or a depth that it cannot have.

    feature_dim: a linear layer to so many features comes before the head.
    """
    options = resolve_options(arch, options)
    if feature_dim is None:
        return MODELS[arch](num_classes, classifier, **options)
    model = MODELS[arch](num_classes, lambda *sizes: nn.Identity(), **options)
    return add_feature_layer(model, feature_dim, classifier)
