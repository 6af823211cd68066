import inspect
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dma import DMA_Linear
from models import cifar as models
from models.base import blocks_per_stage
from models.cifar.pyramidnet import BLOCKS as PYRAMIDAL_BLOCKS

# Small members of the larger families, so that every architecture is built and run in seconds.
SMALL = {'resnext': {'cardinality': 2, 'widen_factor': 1, 'depth': 11}, 'wrn': {'widen_factor': 1, 'depth': 10},
         'densenet': {'depth': 10, 'growth_rate': 4}, 'pyramidnet': {'depth': 8, 'alpha': 12},
         'airbench': {'widths': '8-8-8'}}
ANY_SIZE = ('pyramidnet', 'lenet', 'lenet_bn', 'shallow', 'mlp', 'resnet9', 'airbench')


def small(arch, classifier=nn.Linear, num_classes=10):
    torch.manual_seed(0)
    return models.build(arch, num_classes, classifier, **SMALL.get(arch, {}))


def count(arch, num_classes=10, **options):
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in models.build(arch, num_classes, **options).parameters())


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
    assert round(count(arch, **options) / 1e6, 2) == published


def batch_norm(features):
    return 2 * features


@pytest.mark.parametrize('arch, parameters', [
    ('lenet', (5 * 5 * 3 * 20 + 20) + (5 * 5 * 20 * 50 + 50) + (4 * 4 * 50 * 500 + 500) + (500 * 10 + 10)),
    ('lenet_bn', 5 * 5 * 3 * 32 + batch_norm(32) + 5 * 5 * 32 * 64 + batch_norm(64)
     + (7 * 7 * 64 * 512 + 512) + (512 * 10 + 10)),
    ('shallow', 5 * 5 * 3 * 64 + batch_norm(64) + 5 * 5 * 64 * 64 + batch_norm(64)
     + 7 * 7 * 64 * 384 + batch_norm(384) + 384 * 192 + batch_norm(192) + (192 * 10 + 10)),
    ('mlp', (32 * 32 * 3 * 512 + 512 + batch_norm(512)) + 4 * (512 * 512 + 512 + batch_norm(512)) + (512 * 10 + 10)),
])
def test_every_parameter_counted_by_hand(arch, parameters):
    assert count(arch) == parameters


# The paper gives 1.7, 3.8, 28.3 (28.4 to 28.5 with 100 classes) and 27.0 million.
@pytest.mark.parametrize('num_classes, depth, alpha, block_name, published', [
    (10, 110, 48, 'BasicBlock', 1.7), (10, 110, 84, 'BasicBlock', 3.8), (10, 110, 270, 'BasicBlock', 28.3),
    (100, 110, 270, 'BasicBlock', 28.4), (10, 164, 270, 'Bottleneck', 27.0),
])
def test_pyramidnet_parameter_count_and_widths(num_classes, depth, alpha, block_name, published):
    total = (depth - 2) // (2 if block_name == 'BasicBlock' else 3)
    inner = [round(16 + Fraction(alpha * k, total)) for k in range(1, total + 1)]
    before, expected = 16, 3 * 3 * 3 * 16 + batch_norm(16)
    for width in inner:
        if block_name == 'BasicBlock':
            expected += batch_norm(before) + 3 * 3 * before * width + 2 * batch_norm(width) + 3 * 3 * width * width
            before = width
        else:
            expected += batch_norm(before) + before * width
            expected += batch_norm(width) + 3 * 3 * width * width + batch_norm(width)
            expected += width * 4 * width + batch_norm(4 * width)
            before = 4 * width
    expected += batch_norm(before) + before * num_classes + num_classes
    options = {'depth': depth, 'alpha': alpha, 'block_name': block_name}
    assert count('pyramidnet', num_classes, **options) == expected == pytest.approx(published * 1e6, rel=0.05)

    with torch.device('meta'):
        model = models.build('pyramidnet', num_classes, **options)
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    assert [block.conv2.out_channels for block in blocks] == inner and inner[-1] == 16 + alpha
    assert model.head.in_features == (16 + alpha) * (1 if block_name == 'BasicBlock' else 4)
    strided = [number for number, block in enumerate(blocks) if any(getattr(block, conv).stride == (2, 2)
                                                                    for conv in ('conv1', 'conv2'))]
    assert strided == [total // 3, 2 * total // 3]


def test_pyramidnet_is_the_default_and_widths_do_not_drift():
    assert count('pyramidnet') == count('pyramidnet', depth=110, alpha=270, block_name='BasicBlock')
    for alpha in (1, 7, 48, 84, 271):
        with torch.device('meta'):
            model = models.build('pyramidnet', 10, depth=110, alpha=alpha)
        widths = [block.conv2.out_channels for layer in (model.layer1, model.layer2, model.layer3) for block in layer]
        assert widths == [round(16 + Fraction(alpha * k, 54)) for k in range(1, 55)]


@pytest.mark.parametrize('block_name', PYRAMIDAL_BLOCKS)
@pytest.mark.parametrize('stride, size', [(1, 5), (2, 6), (2, 5)])
def test_a_pyramidal_block_without_residual_pools_and_pads_its_input(block_name, stride, size):
    block = PYRAMIDAL_BLOCKS[block_name](3, 8, stride)
    last = block.bn3 if block_name == 'BasicBlock' else block.bn4
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 3, size, size)
    side = -(-size // stride)
    expected = torch.zeros(2, 8, side, side)
    for row in range(side):
        for column in range(side):
            window = x[:, :, stride * row:stride * row + stride, stride * column:stride * column + stride]
            expected[:, :3, row, column] = window.mean(dim=(2, 3))
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_a_pyramidal_block_begins_without_relu():
    for name, block in PYRAMIDAL_BLOCKS.items():
        torch.manual_seed(0)
        block, x = block(3, 8, 1).double(), torch.randn(4, 3, 5, 5, dtype=torch.double)
        out = block.conv1(F.batch_norm(x, None, None, training=True))
        out = block.conv2(F.batch_norm(out, None, None, training=True).clamp(min=0))
        if name == 'Bottleneck':
            out = block.conv3(F.batch_norm(out, None, None, training=True).clamp(min=0))
        out = F.batch_norm(out, None, None, training=True)
        assert torch.allclose(block(x), out + torch.cat([x, torch.zeros(4, 5, 5, 5)], dim=1))


@pytest.mark.parametrize('arch', ANY_SIZE)
@pytest.mark.parametrize('size', [28, 32, 40, 64])
def test_images_of_other_sizes_in_either_memory_format(arch, size):
    model, images = small(arch, num_classes=7).eval(), torch.randn(2, 3, size, size)
    logits = model(images)
    assert logits.shape == (2, 7) and model.features(images).shape == (2, model.head.in_features)
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(model(images.contiguous(memory_format=torch.channels_last)), logits, atol=1e-4)
    with torch.device('meta'):
        assert small(arch)(torch.empty(2, 3, size, size)).shape == (2, 10)


def test_lenet_pools_digits_of_28_pixels_by_two():
    model, images = small('lenet'), torch.randn(2, 3, 28, 28)
    before = F.relu(model.layer2[0](F.max_pool2d(F.relu(model.layer1[0](images)), 2)))
    assert before.shape == (2, 50, 8, 8)
    assert torch.equal(model.layer2(model.layer1(images)), F.max_pool2d(before, 2))


def test_lenet_bn_normalises_what_it_pooled_by_two():
    model, images = small('lenet_bn'), torch.randn(2, 3, 28, 28)
    for layer, shape in ((model.layer1, (2, 32, 14, 14)), (model.layer2, (2, 64, 7, 7))):
        pooled = F.max_pool2d(F.relu(F.conv2d(images, layer[0].weight, padding=2)), 2)
        variance, mean = torch.var_mean(pooled, dim=(0, 2, 3), keepdim=True, correction=0)
        expected = (pooled - mean) / (variance + 1e-5).sqrt()
        images = layer(images)
        assert images.shape == shape and torch.allclose(images, expected, atol=1e-5)


def test_shallow_and_mlp_average_only_images_of_other_sizes(monkeypatch):
    images = torch.randn(2, 3, 32, 32)
    doubled = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    mlp, shallow = small('mlp').eval(), small('shallow').eval()
    assert torch.allclose(mlp(doubled), mlp(images), atol=1e-5)
    assert shallow.layer2(shallow.layer1(images)).shape == (2, 64, 7, 7)
    monkeypatch.setattr(F, 'adaptive_avg_pool2d', None)
    assert mlp(images).shape == shallow(images).shape == (2, 10)


OURS = ('alexnet', 'vgg16', 'vgg19_bn', 'resnet', 'resnet18', 'preresnet', 'preactresnet18', 'resnext', 'wrn',
        'densenet',
        'pyramidnet', 'lenet', 'lenet_bn', 'shallow', 'mlp', 'resnet9', 'airbench')


@pytest.mark.parametrize('arch', OURS)
def test_only_shallow_and_mlp_bring_a_regime(arch):
    with torch.device('meta'):
        model = small(arch)
    assert model.input_transform is None
    if arch not in ('shallow', 'mlp'):
        assert model.regime is None
        return
    rates = {epoch: settings['lr'] for epoch, settings in model.regime.items()}
    assert rates == ({0: 1e-3, 60: 1e-2, 120: 1e-3, 180: 1e-4} if arch == 'shallow'
                     else {0: 0.1, 10: 1e-2, 20: 1e-3, 30: 1e-4})
    assert set().union(*model.regime.values()) <= {'optimizer', 'lr', 'momentum', 'weight_decay'}


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


@pytest.mark.parametrize('name, given', [('target', True), ('labels', True), ('label', True), ('scale', False)])
def test_a_head_may_call_its_targets_otherwise_and_another_argument_is_left_alone(name, given):
    seen = []

    class Head(nn.Module):
        def __init__(self, in_features, num_classes):
            super().__init__()

    exec(f'def forward(self, input, {name}=None): seen.append({name}); return input', {'seen': seen}, made := {})
    Head.forward = made['forward']
    targets = torch.tensor([0, 1])
    small('lenet', Head, 3)(torch.randn(2, 3, 32, 32), targets)
    assert (seen[-1] is targets) == given


@pytest.mark.parametrize('arch', [arch for arch in models.MODELS if arch not in ('resnet9', 'airbench')])
def test_convolutions_begin_with_he_initialisation(arch):
    for module in small(arch).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


@pytest.mark.parametrize('arch, options, sentence', [
    ('resnet', {'depth': 21}, '6n+2, so 21 is impossible; the nearest possible: 20 and 26'),
    ('resnet', {'depth': 111, 'block_name': 'Bottleneck'}, '9n+2, so 111 is impossible; the nearest possible: 110 and '
                                                           '119'),
    ('preresnet', {'depth': 1}, 'nearest possible: 8'), ('pyramidnet', {'depth': 165}, '164 and 170'),
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
    with pytest.raises(ValueError, match='--widen-factor is not used by --arch resnet, which takes --depth, '
                                         '--block-name'):
        models.build('resnet', 10, widen_factor=2)
    with pytest.raises(ValueError, match='--depth is not used by --arch alexnet, which takes no such option'):
        models.build('alexnet', 10, depth=8)


def test_every_option_has_its_flag():
    for constructor in models.MODELS.values():
        assert set(inspect.signature(constructor).parameters) <= {'num_classes', 'classifier', *models.OPTION_FLAGS}


def test_alpha_is_for_pyramidnet_alone():
    with pytest.raises(ValueError, match='--alpha is not used by --arch resnet'):
        models.build('resnet', 10, alpha=48)


def test_dropout_is_where_the_flag_puts_it():
    for arch in ('wrn', 'densenet'):
        model = models.build(arch, 10, **SMALL[arch], drop_rate=0.3)
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}
