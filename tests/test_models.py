import inspect
import math

import pytest
import torch
from torch import nn

from dma import DMA_Linear
from models import cifar as models
from models.base import blocks_per_stage

# Small members of the larger families, so that every architecture is built and run in seconds.
SMALL = {'resnext': {'cardinality': 2, 'widen_factor': 1, 'depth': 11}, 'wrn': {'widen_factor': 1, 'depth': 10},
         'densenet': {'depth': 10, 'growth_rate': 4}}


def small(arch, classifier=nn.Linear, num_classes=10):
    torch.manual_seed(0)
    return models.build(arch, num_classes, classifier, **SMALL.get(arch, {}))


def millions(arch, **options):
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in models.build(arch, 10, **options).parameters()) / 1e6


@pytest.mark.parametrize('arch, options, published', [
    ('alexnet', {}, 2.47), ('vgg19_bn', {}, 20.04), ('wrn', {'depth': 28, 'widen_factor': 10}, 36.48),
    ('resnext', {'depth': 29, 'cardinality': 8, 'widen_factor': 4}, 34.43),
    ('resnext', {'depth': 29, 'cardinality': 16, 'widen_factor': 4}, 68.16),
    ('densenet', {'depth': 100, 'growth_rate': 12}, 0.77), ('densenet', {'depth': 190, 'growth_rate': 40}, 25.62),
    ('resnet', {'depth': 110}, 1.73), ('preresnet', {'depth': 110}, 1.73),
    ('resnet', {'depth': 20}, 0.27), ('resnet', {'depth': 164, 'block_name': 'Bottleneck'}, 1.70),
    ('resnet18', {}, 11.17), ('preactresnet18', {}, 11.17),
])
def test_parameter_count(arch, options, published):
    assert round(millions(arch, **options), 2) == published


@pytest.mark.parametrize('arch', models.MODELS)
@pytest.mark.parametrize('size', [32, 64])
def test_every_architecture_takes_larger_images_and_gives_gradients_everywhere(arch, size):
    model = small(arch, num_classes=7).to(memory_format=torch.channels_last)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('arch', models.MODELS)
def test_the_head_is_swappable_and_sees_features_and_targets(arch):
    seen = {}

    class Head(nn.Module):
        def __init__(self, in_features, num_classes):
            super().__init__()
            seen['made'] = in_features, num_classes

        def forward(self, features, targets=None):
            seen['called'] = features.shape, targets
            return features

    model, targets = small(arch, Head, 3), torch.tensor([0, 1])
    model(torch.randn(2, 3, 32, 32), targets)
    assert seen['made'] == (seen['called'][0][1], 3) and seen['called'][1] is targets
    model(torch.randn(2, 3, 32, 32))
    assert seen['called'][1] is None
    outputs = small(arch, DMA_Linear)(torch.randn(2, 3, 32, 32))
    assert [tuple(part.shape) for part in outputs] == [(2, 10), (2, 10)]


@pytest.mark.parametrize('arch', models.MODELS)
def test_convolutions_begin_with_he_initialisation(arch):
    for module in small(arch).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


@pytest.mark.parametrize('arch, options, sentence', [
    ('resnet', {'depth': 21}, '6n+2, so 21 is impossible; the nearest possible: 20 and 26'),
    ('resnet', {'depth': 111, 'block_name': 'Bottleneck'}, '9n+2, so 111 is impossible; the nearest possible: 110 and 119'),
    ('preresnet', {'depth': 1}, 'nearest possible: 8'),
    ('wrn', {'depth': 27}, '22 and 28'), ('resnext', {'depth': 30}, '29 and 38'),
    ('densenet', {'depth': 101}, '100 and 106'), ('densenet', {'depth': 41, 'block_name': 'BasicBlock'}, '40 and 43'),
])
def test_an_impossible_depth_names_the_nearest(arch, options, sentence):
    with pytest.raises(ValueError) as error:
        models.build(arch, 10, **options)
    assert sentence in str(error.value)


@pytest.mark.parametrize('layers, extra', [(6, 2), (9, 2), (6, 4), (3, 4)])
def test_depth_rule_on_a_grid(layers, extra):
    possible = [layers * n + extra for n in range(1, 40)]
    for depth in range(-3, 100):
        if depth in possible:
            assert layers * blocks_per_stage('net', depth, layers, extra) + extra == depth
        else:
            with pytest.raises(ValueError) as error:
                blocks_per_stage('net', depth, layers, extra)
            below, above = max([p for p in possible if p < depth], default=None), min(p for p in possible if p > depth)
            assert str(error.value).endswith(f'{below} and {above}' if below else f': {above}')


def test_an_option_that_an_architecture_does_not_know_is_refused():
    with pytest.raises(ValueError, match='--widen-factor is not used by --arch resnet, which takes --depth, --block-name'):
        models.build('resnet', 10, widen_factor=2)
    with pytest.raises(ValueError, match='--depth is not used by --arch alexnet, which takes no such option'):
        models.build('alexnet', 10, depth=8)


def test_every_option_has_its_flag():
    for constructor in models.MODELS.values():
        assert set(inspect.signature(constructor).parameters) <= {'num_classes', 'classifier', *models.OPTION_FLAGS}


def test_dropout_is_where_the_flag_puts_it():
    for arch in ('wrn', 'densenet'):
        model = models.build(arch, 10, **SMALL[arch], drop_rate=0.3)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
