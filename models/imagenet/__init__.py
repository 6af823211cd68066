"""Architectures for photographs: torchvision's, and ResNeXts of any cardinality. `--arch` offers what is in MODELS.

`build` makes one of them, with a head that can be swapped; `weights_preset` says how images are to be prepared for
torchvision's weights. OPTION_FLAGS has the flags that set an architecture's options, REGIME how all are trained by
default.
"""
import os
import warnings
from http.client import HTTPException
from pickle import UnpicklingError

import torch
import torch.nn as nn
from torchvision import models as torchvision_models
from torchvision.models.resnet import Bottleneck, ResNet

from models.base import with_defaults
from models.wrapped import TorchvisionClassifier, last_layer

# Blocks in each stage: Xie et al., CVPR 2017 (arXiv 1611.05431), table 1.
RESNEXTS = {'resnext50': [3, 4, 6, 3], 'resnext101': [3, 4, 23, 3]}
MODELS = [*torchvision_models.list_models(module=torchvision_models), *RESNEXTS]

# Usual for ImageNet: He et al., CVPR 2016 (arXiv 1512.03385), section 3.4.
REGIME = {0: {'weight_decay': 1e-4}}

OPTION_FLAGS = {'cardinality': '--cardinality', 'base_width': '--base-width'}

# The auxiliary classifiers, and the weight of each one's cross-entropy. GoogLeNet: Szegedy et al., CVPR 2015 (arXiv
# 1409.4842), section 5. Inception v3: Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 4, gives none; 0.4 is
# usual, as in the TensorFlow code of its authors (tensorflow/models, research/slim/train_image_classifier.py).
AUXILIARY = {'googlenet': (('aux1', 'aux2'), 0.3), 'inception_v3': (('AuxLogits',), 0.4)}


def default_image_size(arch):
    """Side, in pixels, of the images that `arch` is usually trained on; weights_preset(arch).crop_size is that of its
    weights.
    """
    return 299 if arch == 'inception_v3' else 224


def resolve_options(arch, options):
    """Every option of `arch`, from `options` (None = not given) or its default.

    ValueError if `options` has one that the architecture does not know.
    """
    known = {'cardinality': 32, 'base_width': 4} if arch in RESNEXTS else {}
    return with_defaults(arch, options, known, OPTION_FLAGS)


def default_weights(arch):
    """torchvision's best weights of `arch`, not yet downloaded. ValueError if it has none."""
    if arch in RESNEXTS:
        raise ValueError(f'--pretrained: torchvision has no weights of {arch}')
    return torchvision_models.get_model_weights(arch).DEFAULT


def weights_preset(arch):
    """torchvision's preprocessing for its weights of `arch`: crop_size, resize_size, mean, std, interpolation. No
    download.

    Those of GoogLeNet and Inception v3 are for images in [-1, 1], which torchvision's networks make of others only
    where they are built with the weights; here it is in mean and std. ValueError if there are no weights.
    """
    preset = default_weights(arch).transforms()
    if arch in AUXILIARY:
        preset.mean = preset.std = [0.5, 0.5, 0.5]
    return preset


def build(arch, num_classes, classifier=nn.Linear, pretrained=False, image_size=None, **options):
    """The network `arch`, an ImageClassifier; in training, one with auxiliary classifiers returns WithAuxiliary.

    classifier: (in_features, num_classes) -> head; nn.Linear stands for torchvision's own last layer and its
    initialisation.
    pretrained: begin with torchvision's weights. Where num_classes is another than theirs, the head and the auxiliary
    classifiers are new; where it is the same, a head gets their last layer's weight if its own has that shape, and
    their bias.
    image_size: of the images, in pixels; None is that of the weights, or torchvision's default. vit and maxvit are
    built for one size alone, inception_v3 for at least 299, the others for any.
    options: those of resolve_options.

    ValueError for an option that it does not know, weights that do not exist or cannot be downloaded, an image size
    that cannot be, or a network that does not end in a linear layer.
    """
    options = resolve_options(arch, options)
    weights = default_weights(arch) if pretrained else None
    options |= _size_option(arch, image_size, weights)
    network = _construct(arch, num_classes=num_classes, **options)
    last = last_layer(arch, network, num_classes)
    auxiliary, auxiliary_weight = AUXILIARY.get(arch, ((), 0))
    same_classes = bool(weights) and num_classes == len(weights.meta['categories'])
    if weights:
        new, network = network, _construct(arch, weights=weights)
        if arch in AUXILIARY:
            network.transform_input = False  # see weights_preset
        for name in () if same_classes else (last, *auxiliary):
            network.set_submodule(name, new.get_submodule(name))
    pretrained_layer = network.get_submodule(last)
    model = TorchvisionClassifier(network, last, classifier, auxiliary_weight)
    model.regime = REGIME
    if same_classes and classifier is not nn.Linear:
        _copy_weights(pretrained_layer, model.head)
    return model


def _size_option(arch, image_size, weights):
    """The option by which torchvision is told the image size, in networks that have parameters for each position."""
    if arch == 'inception_v3' and image_size is not None and image_size < 299:
        # A grid of 17x17 is the least that its auxiliary classifier's convolution takes.
        raise ValueError(f'--arch {arch} has an auxiliary classifier, for images of at least 299 pixels, was given '
                         f'{image_size}')
    if image_size is None or not arch.startswith(('vit_', 'maxvit_')):
        return {}
    # vit_b_16 cuts patches of 16 pixels; maxvit halves the image 5 times and then still needs windows of 7.
    unit = 224 if arch.startswith('maxvit_') else int(arch.rsplit('_', 1)[1])
    if weights and image_size != weights.meta['min_size'][0]:
        raise ValueError(f'--pretrained: the weights of {arch} are for images of {weights.meta["min_size"][0]} pixels, '
                         f'was given {image_size}')
    if image_size < unit or image_size % unit:
        raise ValueError(f'--arch {arch} takes images whose side is a multiple of {unit} pixels, was given '
                         f'{image_size}')
    return {'image_size': image_size} if arch.startswith('vit_') else {'input_size': (image_size, image_size)}


def _construct(arch, **options):
    """torchvision's network as torchvision makes it, but with its auxiliary classifiers."""
    if arch in RESNEXTS:
        return ResNet(Bottleneck, RESNEXTS[arch], options['num_classes'], groups=options['cardinality'],
                      width_per_group=options['base_width'])
    if arch in AUXILIARY:
        options['aux_logits'] = True
        if 'weights' not in options:
            options['init_weights'] = True  # what None means, without the FutureWarning
    with warnings.catch_warnings():
        # True of GoogLeNet's weights, but training here always trains the auxiliary classifiers too.
        warnings.filterwarnings('ignore', 'auxiliary heads in the pretrained googlenet')
        try:
            return torchvision_models.get_model(arch, **options)
        except (OSError, EOFError, RuntimeError, HTTPException, UnpicklingError) as error:
            if not options.get('weights'):
                raise
            raise ValueError(_without_weights(options['weights'].url, error)) from error


def _without_weights(url, error):
    """Why weights could not be loaded, and what to do about it, in a sentence."""
    file = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(url))
    reason = ' '.join(str(getattr(error, 'reason', error)).split())
    if os.path.exists(file):
        return f'--pretrained: {file} is damaged ({reason[:200]}); remove it, or replace it by {url}'
    return (f'--pretrained: {url} could not be downloaded ({reason[:200]}); put it by hand where it is looked for, '
            f'{file}')


@torch.no_grad()
def _copy_weights(layer, head):
    weight = getattr(head, 'weight', None)
    if weight is None or weight.shape != layer.weight.shape:
        return
    weight.copy_(layer.weight)
    if getattr(head, 'bias', None) is not None:
        # maxvit's last layer has no bias, which is one of 0.
        head.bias.copy_(layer.bias) if layer.bias is not None else head.bias.zero_()
