"""airbench and resnet9: their shapes, what `prepare` takes from training images, the rate of BatchNorm biases."""
import pytest
import torch
from torch import nn

import cifar
from helpers import broken_off, call, few_digits, refused
from models import cifar as models
from models.cifar.airbench import EPSILON, SCALE, Airbench, BiasNorm, WhiteningConv
from utils import checkpoint, datasets, folders, methods, schedule
from utils.batches import Batches, Split, spread
from utils.errors import UserError
from utils.own_dataset import LazySplit

SHORT = '-d digits -a airbench --widths 8-8-8 --epochs 2 --train-batch 16 --lr 0.05 --manualSeed 3'


@pytest.fixture
def few(monkeypatch):
    few_digits(monkeypatch, 48, 16)
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr('utils.metrics.write_confusion', lambda *args: None)


@pytest.fixture
def prepared(monkeypatch):
    """The images of each call of `prepare`."""
    calls, prepare = [], Airbench.prepare
    monkeypatch.setattr(Airbench, 'prepare', lambda model, images: (calls.append(images), prepare(model, images)))
    return calls


def read(folder):
    return torch.load(folder / 'checkpoint.pth.tar', weights_only=True)


def coloured(number=20, size=8):
    """Images whose neighbouring pixels and channels are alike, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(number, size, size, 3, generator=generator)
    smooth = noise.cumsum(dim=1).cumsum(dim=2) + 2 * noise + noise.mean(dim=3, keepdim=True)
    images = (smooth * 12 + 128).clamp(0, 255).to(torch.uint8)
    return Split(images, torch.arange(number) % 4, list('abcd'))


# The networks

def test_every_parameter_counted_by_hand():
    for widths, flags in (((64, 256, 256), {}), ((64, 128, 128), {'widths': '64-128-128'}),
                          ((128, 384, 384), {'widths': '128-384-384'})):
        expected, before = 24, 24  # the biases of the whitening; its weights are no parameters
        for width in widths:
            expected += 9 * before * width + width + 9 * width * width + width
            before = width
        with torch.device('meta'):
            model = models.build('airbench', 10, **flags)
        assert sum(p.numel() for p in model.parameters()) == expected + before * 10 + 10
    with torch.device('meta'):
        model = models.build('resnet9', 10)
    convolutions = ((3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512))
    expected = sum(9 * before * width + 2 * width for before, width in convolutions) + 512 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected == 6573130


def test_airbench_is_what_the_paper_draws():
    torch.manual_seed(0)
    model, images = models.build('airbench', 10, widths='8-12-10').double().eval(), torch.randn(2, 3, 32, 32).double()
    activation, x = nn.functional.gelu, images
    x = activation(nn.functional.conv2d(x, model.whitening.weight, model.whitening.bias))
    assert x.shape == (2, 24, 31, 31)
    for layer, side in ((model.layer1, 15), (model.layer2, 7), (model.layer3, 3)):
        x = nn.functional.max_pool2d(nn.functional.conv2d(x, layer[0].weight, padding=1), 2)
        x = activation(x / (1 + 1e-12) ** 0.5)
        x = activation(nn.functional.conv2d(x, layer[4].weight, padding=1) / (1 + 1e-12) ** 0.5)
        assert x.shape[2:] == (side, side)
    x = nn.functional.max_pool2d(x, 3).flatten(1)
    torch.testing.assert_close(model(images), nn.functional.linear(x / 9, model.head.weight, model.head.bias))
    norms = [module for module in model.modules() if isinstance(module, BiasNorm)]
    assert len(norms) == 6 and {(norm.momentum, norm.eps) for norm in norms} == {(0.4, 1e-12)}
    assert all(norm.bias.requires_grad and norm.weight.eq(1).all() for norm in norms)


@pytest.mark.parametrize('arch, options, scale', [('airbench', {'widths': '4-4-4'}, SCALE), ('resnet9', {}, 0.125)])
def test_logits_are_scaled_by_scaling_the_features(arch, options, scale):
    torch.manual_seed(0)
    model, images = models.build(arch, 10, **options).eval(), torch.randn(2, 3, 32, 32)
    last = []
    model.layer3.register_forward_hook(lambda module, inputs, output: last.append(output))
    logits, largest = model(images), last[0].amax(dim=(2, 3))
    nn.init.zeros_(model.head.bias)
    torch.testing.assert_close(model(images), scale * nn.functional.linear(largest, model.head.weight))
    assert logits.shape == (2, 10)


@pytest.mark.parametrize('widths', [(24, 24, 24), (64, 8, 30)])
def test_convolutions_begin_as_the_identity_where_channels_allow_it(widths):
    model, before = Airbench(widths), 24
    for layer, width in zip((model.layer1, model.layer2, model.layer3), widths):
        for conv in (layer[0], layer[4]):
            x = torch.randn(2, conv.in_channels, 6, 6)
            same = min(conv.in_channels, width)
            torch.testing.assert_close(conv(x)[:, :same], x[:, :same])
            assert conv.weight[same:].ne(0).all() and conv.bias is None
        assert (layer[0].in_channels, layer[0].out_channels) == (before, width)
        before = width


@pytest.mark.parametrize('widths', ['64', '64-128', '64-128-128-128', '0-8-8', '8-8-10001', '8--8', 'a-b-c', '8-8-8 '])
def test_widths_that_are_invalid_are_refused(widths):
    with pytest.raises(ValueError, match='--widths must be 3 whole numbers of 1 to 10000, such as 64-256-256, was'):
        models.build('airbench', 10, widths=widths)
    with pytest.raises(ValueError, match='--widths must be 5 whole numbers of 1 to 10000, such as 64-128-256-512-512'):
        models.build('vgg11_bn', 10, widths=widths)


def test_widths_of_vgg_are_the_channels_of_its_stages():
    model = models.build('vgg13', 10, widths='4-6-8-10-12')
    channels = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert channels == [4, 4, 6, 6, 8, 8, 10, 10, 12, 12] and model.in_features == 12
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    whole = models.build('vgg13', 10, widths='64-128-256-512-512'), models.build('vgg13', 10)
    assert len({tuple(p.shape for p in one.parameters()) for one in whole}) == 1


def test_a_checkpoint_of_before_an_option_was_there_has_its_default(few, monkeypatch, tmp_path):
    flags = '-d digits -a airbench --widths 64-256-256 --epochs 2 --train-batch 48 --lr 0.01 --manualSeed 3'
    broken_off(monkeypatch, f'{flags} -c {tmp_path}', epoch=1)
    state = read(tmp_path)
    del state['network']['widths'], state['args']['widths']
    checkpoint.save(tmp_path / 'checkpoint.pth.tar', state)
    resumed = f'--resume {tmp_path}/checkpoint.pth.tar'
    with pytest.raises(UserError, match='holds widths 64-256-256, but widths 8-8-8 was asked for'):
        call(monkeypatch, cifar, f'{resumed} --widths 8-8-8')
    call(monkeypatch, cifar, resumed)
    assert read(tmp_path)['epoch'] == 2


# The whitening

def test_whitened_patches_of_the_training_images_have_the_identity_as_covariance():
    split = coloured()
    images = Batches(split, *split.mean_and_std(), 4, 'cpu').normalised(torch.arange(20)).double()
    layer = WhiteningConv().double()
    layer.set_from(images)
    filters, total, patches = layer.weight.flatten(1), torch.zeros(24, 24, dtype=torch.double), 0
    for image in images:
        for row in range(7):
            for column in range(7):
                patch = image[:, row:row + 2, column:column + 2].flatten()
                total += torch.outer(filters @ patch, filters @ patch)
                patches += 1
    identity = torch.eye(12, dtype=torch.double)
    expected = torch.cat([torch.cat([identity, -identity]), torch.cat([-identity, identity])], dim=1)
    assert (total / patches - expected).abs().max() < 0.02  # EPSILON shrinks the smallest eigenvalues a little
    assert torch.equal(layer.weight[:12], -layer.weight[12:])
    lengths = layer.weight[:12].flatten(1).norm(dim=1)
    assert (lengths.diff() >= -1e-12).all() and lengths.max() < EPSILON ** -0.5  # the largest eigenvalue first


def test_the_images_are_spread_over_the_training_set_and_not_augmented():
    split = coloured(20)
    batches = Batches(split, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 4, 'cpu', padding=2, flip=True, cutout=3)
    expected = ((split.images.float() - torch.tensor([1.0, 2, 3])) / torch.tensor([4.0, 5, 6])).permute(0, 3, 1, 2)
    assert torch.equal(spread(batches, 5), expected[[0, 4, 8, 12, 16]])
    assert torch.equal(spread(batches, 8), expected[[0, 2, 5, 7, 10, 12, 15, 17]])
    assert torch.equal(spread(batches), expected)


def test_images_that_are_read_one_by_one_are_the_same():
    split = coloured(10)
    pairs = list(zip(split.images, split.labels.tolist()))
    lazy = LazySplit(pairs, torch.arange(10), split.labels, split.classes, 8, torch.ones(3, 256))
    transform = folders.small_image_transform(padding=2, flip=True)
    mean, std = split.mean_and_std()
    one_by_one = folders.ImageBatches(lazy, mean, std, 4, 'cpu', transform, workers=0)
    for number in (3, 10):
        torch.testing.assert_close(spread(one_by_one, number), spread(Batches(split, mean, std, 4, 'cpu'), number))


# Whole runs

@pytest.mark.parametrize('flags', ['', '--ema 0.9 --mini-batch 8', '--method amp --epsilon 0.05 --weight-decay 0.1',
                                   '--method smoothout --ss 0.05 --perturb-batch-norm', '--optimizer AdamW --wd 0.5'])
def test_what_prepare_has_set_does_not_move_in_training(flags, few, prepared, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} {flags} -c {tmp_path}')
    split, state = datasets.load('digits', None, 'train'), read(tmp_path)
    layer = WhiteningConv()
    layer.set_from(Batches(split, state['mean'], state['std'], 4, 'cpu').normalised(torch.arange(48)))
    held = [state['state_dict']]
    if state['ema']:
        held.append({name.removeprefix('module.'): value for name, value in state['ema'].items()})
    for weights in held:
        assert torch.equal(weights['whitening.weight'], layer.weight) and weights['whitening.bias'].ne(0).any()
        for name in ('layer1.2', 'layer3.5'):
            assert weights[f'{name}.weight'].eq(1).all() and weights[f'{name}.bias'].ne(0).any()
    assert len(prepared) == 1 and len(prepared[0]) == 48


@pytest.mark.parametrize('flags', ['', '--ema 0.9 --bias-lr-factor 64 --nesterov --lr-schedule linear --warmup 1 '
                                       '--lr-start 0.2 --lr-floor 0.07 --crop-padding 2 --crop-mode reflect'])
def test_a_killed_run_is_resumed_to_the_same_bits_and_prepared_once(flags, few, prepared, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} {flags} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{SHORT} {flags} -c {tmp_path}/parts', epoch=1)
    assert len(prepared) == 2 and torch.equal(*prepared)
    torch.rand(7)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert len(prepared) == 2
    whole, parts = read(tmp_path / 'whole'), read(tmp_path / 'parts')
    for part in ('state_dict', 'ema') if '--ema' in flags else ('state_dict',):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name
    assert [row[:2] for row in whole['log']] == [row[:2] for row in parts['log']]
    call(monkeypatch, cifar, f'--evaluate --resume {tmp_path}/parts/checkpoint.pth.tar')
    call(monkeypatch, cifar, f'{SHORT} {flags} --init {tmp_path}/parts/checkpoint.pth.tar -c {tmp_path}/init')
    assert len(prepared) == 2
    assert torch.equal(read(tmp_path / 'init')['state_dict']['whitening.weight'],
                       whole['state_dict']['whitening.weight'])


# The rate of BatchNorm biases

def groups(flags, model):
    parser = cifar.make_parser()
    args = parser.parse_args(['--epochs', '4', *flags.split()])
    schedule.fill_in(args, None, parser)
    optimizer = methods.build_optimizer(args, model, 5)
    schedule.apply(optimizer, 0, 5, args)
    return optimizer.param_groups


@pytest.mark.parametrize('flags', ['', '--method amp --epsilon 0.1', '--lr-schedule linear --warmup 2 --lr-start 0.5'])
def test_batch_norm_biases_have_a_group_whose_rate_is_a_multiple_and_whose_decay_is_not(flags):
    for arch, options, number in (('airbench', {'widths': '4-4-4'}, 6), ('resnet9', {}, 8)):
        model = models.build(arch, 10, **options)
        others, biases = groups(f'--lr 0.4 --wd 0.01 --bias-lr-factor 64 {flags}', model)
        expected = {id(module.bias) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        assert {id(p) for p in biases['params']} == expected and len(expected) == number
        assert len(others['params']) + number == len(list(model.parameters()))
        assert biases['lr'] == pytest.approx(64 * others['lr']) and others['lr'] > 0
        assert others['weight_decay'] == 0.01 and biases['weight_decay'] == pytest.approx(0.01 / 64)
        assert biases['momentum'] == others['momentum'] == 0.9


def test_without_the_flag_there_is_one_group():
    for flags in ('', '--bias-lr-factor 1'):
        assert len(groups(flags, models.build('airbench', 10, widths='4-4-4'))) == 1


# What goes wrong

@pytest.mark.parametrize('flags, sentence', [
    ('-a vgg11 --bias-lr-factor 64', '--bias-lr-factor 64 is for the biases of BatchNorm, and --arch vgg11 has none'),
    ('--bias-lr-factor 0', 'at least 0.001'), ('-a airbench --widths 64', 'was given 64'),
    ('-a resnet --widths 8-8-8', '--widths is not used by --arch resnet'),
    ('-a airbench --depth 8', '--depth is not used by --arch airbench, which takes --widths'),
    ('--lr-floor 0.1', '--lr-floor belongs to --lr-schedule linear, not step'),
    ('--lr-schedule cosine --lr-start 0.1', '--lr-start belongs to --lr-schedule linear, not cosine'),
    ('--lr-schedule linear --lr-start 0.1', '--lr-start is where the warm-up begins, and there is none'),
    ('--lr-schedule linear --gamma 0.5', '--gamma belongs to --lr-schedule step, not linear'),
    ('--lr-schedule linear --lr-floor 1.5', 'at most 1'),
    ('--no-augment --crop-padding 2', '--no-augment and --crop-padding exclude each other'),
    ('--no-augment --crop-mode zero', '--no-augment and --crop-mode exclude each other'),
    ('--crop-padding 32', '--crop-padding 32 must be less than the side of the images, which have 32 pixels'),
    ('--crop-padding 0 --crop-mode reflect', '--crop-mode is not used with --crop-padding 0'),
    ('--crop-mode mirror', "invalid choice: 'mirror'"),
])
def test_wrong_flags_are_refused_before_any_data_is_loaded(flags, sentence, monkeypatch, tmp_path, capsys):
    assert sentence in refused(monkeypatch, capsys, tmp_path, f'-d digits {flags}')
