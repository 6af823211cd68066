"""--feature-dim: a layer to N features before the head of any network, with any method."""
import copy
import shlex

import pytest
import torch
from helpers import broken_off, call, few_digits, refused, toy_runs
from torch import nn

import cifar
import compare
import evaluate
import measure_margins
from models import cifar as models
from utils import checkpoint, methods
from utils.activations import Activations
from utils.errors import UserError

runs = toy_runs(plain='-a lenet', two='-a lenet --feature-dim 2')
OPTIONS = {'vgg11_bn': '', 'mlp': '', 'resnet': '--depth 8', 'preresnet': '--depth 8', 'airbench': '--widths 4-4-4'}
METHODS = ('dma --dropout 0.1', 'lsoftmax', 'large_margin --large-margin-layers features', 'arcface')


def built(flags, num_classes=5):
    args = cifar.make_parser().parse_args(shlex.split(flags))
    architecture = {'arch': args.arch, **cifar.arch_options(args), 'num_classes': num_classes}
    return args, cifar.build(args, architecture | ({'feature_dim': args.feature_dim} if args.feature_dim else {}))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('arch', OPTIONS)
def test_any_network_with_any_method_trains_on_n_features(arch, method):
    args, model = built(f'-a {arch} {OPTIONS[arch]} --feature-dim 2 --method {method}')
    criterion = methods.build_criterion(args, model)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    criterion(model(images, targets), targets).backward()
    assert model.in_features == 2 and model.head.weight.shape == (5, 2) and model.features(images).shape == (4, 2)
    assert model.feature_layer.weight.grad.any() and next(model.parameters()).grad is not None
    assert list(dict(model.named_children()))[-2:] == ['feature_layer', 'head']


def test_the_features_are_those_of_the_network_through_the_layer():
    _, plain = built('-a lenet')
    _, model = built('-a lenet --feature-dim 3')
    model.load_state_dict(plain.state_dict() | {f'{part}.{name}': value for part in ('feature_layer', 'head')
                                                for name, value in getattr(model, part).state_dict().items()})
    images = torch.randn(2, 3, 32, 32)
    activations = Activations(model, ['features'])
    expected = plain.features(images) @ model.feature_layer.weight.T + model.feature_layer.bias
    logits = model(images)
    torch.testing.assert_close(activations.read()[0], expected)
    torch.testing.assert_close(logits, expected @ model.head.weight.T + model.head.bias)
    twin = copy.deepcopy(model)
    twin.feature_layer.bias.data.add_(1)
    torch.testing.assert_close(twin.features(images), model.features(images) + 1)


def test_without_the_flag_nothing_is_different(runs):
    torch.manual_seed(0)
    model = models.build('lenet', 5, nn.Linear)
    torch.manual_seed(0)
    other = models.MODELS['lenet'](5, nn.Linear)
    assert type(model) is type(other) and not hasattr(model, 'feature_layer')
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert 'feature_dim' not in checkpoint.read(f'{runs}/plain/checkpoint.pth.tar')['network']


def test_killed_and_resumed_bit_for_bit(monkeypatch, tmp_path):
    few_digits(monkeypatch, 160, 60)
    flags = '-d digits -a lenet --feature-dim 2 --method lsoftmax --epochs 2 --train-batch 16 --manualSeed 3'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    whole, parts = (checkpoint.read(f'{tmp_path}/{name}/checkpoint.pth.tar') for name in ('whole', 'parts'))
    assert whole['network']['feature_dim'] == 2 and whole['epoch'] == parts['epoch'] == 2
    assert whole['state_dict'].keys() == parts['state_dict'].keys()
    assert all(torch.equal(value, parts['state_dict'][name]) for name, value in whole['state_dict'].items())
    assert whole['log'] == parts['log']


def test_other_scripts_rebuild_it(runs, monkeypatch, capsys, tmp_path):
    file = f'{runs}/two/checkpoint.pth.tar'
    monkeypatch.chdir(tmp_path)
    few_digits(monkeypatch, 160, 60)
    call(monkeypatch, cifar, f'--evaluate --resume {file}')
    call(monkeypatch, evaluate, f'{file} --images 20 -o {tmp_path}')
    call(monkeypatch, measure_margins, f'{file} --angles --images 20 -o {tmp_path}')
    capsys.readouterr()
    call(monkeypatch, compare, f'{runs}')
    assert '--feature-dim 2' in capsys.readouterr().out


@pytest.mark.parametrize('flags, sentence', [
    ('--feature-dim 1', 'argument --feature-dim: must be a whole number of at least 2'),
    ('--feature-dim two', 'argument --feature-dim: must be a whole number of at least 2'),
    ('--feature-dim 100001', 'and at most 100000'),
    ('-d digits --resume {two} --feature-dim 3', 'holds feature_dim 2, but feature_dim 3 was asked for'),
    ('-d digits --resume {plain} --feature-dim 3', 'holds nothing of the kind, but feature_dim 3 was asked for'),
    ('-d digits --resume {two} --evaluate --feature-dim 3', 'holds feature_dim 2, but feature_dim 3 was asked for'),
])
def test_a_mistake_is_one_sentence(flags, sentence, runs, monkeypatch, capsys, tmp_path):
    files = {name: f'{runs}/{name}/checkpoint.pth.tar' for name in ('plain', 'two')}
    if 'resume' not in flags:
        assert sentence in refused(monkeypatch, capsys, tmp_path, flags)
        return
    with pytest.raises(UserError, match=sentence):
        call(monkeypatch, cifar, flags.format(**files))
