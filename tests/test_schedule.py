import argparse
import math
import sys
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import cifar
from helpers import broken_off
from models import cifar as models
from models.base import ImageClassifier, global_average_pool
from models.cifar.mlp import MLP
from models.cifar.shallow import Shallow
from utils import datasets, schedule
from utils.logger import read_log
from utils.schedule import learning_rate


def rates(steps_per_epoch, **flags):
    args = argparse.Namespace(**{'lr': 0.1, 'gamma': 0.1, 'schedule': None, 'lr_step_size': None, 'warmup': 0,
                                 'lr_start': 0, 'lr_floor': 0, **flags})
    return [learning_rate(step, steps_per_epoch, args) for step in range(args.epochs * steps_per_epoch)]


def torchs(scheduler, steps, lr=0.1, per_step=1, **options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler, result = scheduler(optimizer, **options), []
    for step in range(steps):
        result.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        if (step + 1) % per_step == 0:
            scheduler.step()
    return result


def test_step_is_multisteplr():
    expected = torchs(torch.optim.lr_scheduler.MultiStepLR, 50, per_step=5, milestones=[3, 7], gamma=0.2)
    assert rates(5, epochs=10, lr_schedule='step', schedule=[3, 7], gamma=0.2) == pytest.approx(expected)


def test_cosine_is_cosineannealinglr():
    expected = torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 50, T_max=50)
    assert rates(5, epochs=10, lr_schedule='cosine') == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('warmup', [2, 3, 5])
def test_onecycle_is_onecyclelr(warmup):
    expected = torchs(torch.optim.lr_scheduler.OneCycleLR, 100, max_lr=0.1, total_steps=100, pct_start=warmup / 10,
                      cycle_momentum=False)
    assert rates(10, epochs=10, lr_schedule='onecycle', warmup=warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('start, floor, warmup', [(0, 0, 2), (0.2, 0.07, 2.3), (0.5, 1, 1), (0, 0, 0), (0.1, 0.2, 10)])
def test_linear_climbs_and_falls_in_lines(start, floor, warmup):
    up, down = round(10 * warmup), 100 - round(10 * warmup)
    expected = [0.1 * (start + (1 - start) * (step + 1) / up) for step in range(up)]
    expected += [0.1 + (0.1 * floor - 0.1) * step / down for step in range(down)]
    values = rates(10, epochs=10, lr_schedule='linear', warmup=warmup, lr_start=start, lr_floor=floor)
    assert values == pytest.approx(expected) and max(values) == pytest.approx(0.1)


@pytest.mark.parametrize('schedule', ['step', 'cosine'])
def test_warmup_climbs_in_a_line_to_the_rate_and_no_further(schedule):
    values = rates(10, epochs=8, lr_schedule=schedule, schedule=[6], warmup=2)
    assert values[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert values[20] == pytest.approx(0.1) and max(values) == pytest.approx(0.1)


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'onecycle', 'linear'])
@pytest.mark.parametrize('warmup', [0, 0.3, 1, 3])
@pytest.mark.parametrize('epochs, steps', [(1, 1), (3, 1), (3, 7)])
def test_every_position_has_a_rate_between_0_and_the_highest(schedule, warmup, epochs, steps):
    values = rates(steps, epochs=epochs, lr_schedule=schedule, schedule=[epochs // 2], warmup=min(warmup, epochs))
    assert len(values) == epochs * steps and all(0 <= value <= 0.1 + 1e-12 for value in values)
    assert max(values) > 0


# What the flags settle

def settle(flags, regime=None):
    parser = cifar.make_parser()
    args = parser.parse_args(flags.split())
    schedule.fill_in(args, regime, parser)
    return args


def all_rates(args, steps_per_epoch):
    return [learning_rate(step, steps_per_epoch, args) for step in range(args.epochs * steps_per_epoch)]


@pytest.mark.parametrize('epochs, size', [(10, 3), (10, 5), (7, 1), (5, 5), (5, 20)])
def test_a_step_size_is_steplr(epochs, size):
    args = settle(f'--epochs {epochs} --lr-step-size {size} --gamma 0.5 --lr 0.2')
    expected = torchs(torch.optim.lr_scheduler.StepLR, epochs * 4, lr=0.2, per_step=4, step_size=size, gamma=0.5)
    assert all_rates(args, 4) == pytest.approx(expected)


@pytest.mark.parametrize('flags, factor', [
    ('', 1), ('--train-batch 512', 1), ('--train-batch 512 --lr-scaling none', 1),
    ('--train-batch 512 --lr-scaling sqrt', 2),
    ('--train-batch 512 --lr-scaling linear', 4), ('--train-batch 32 --lr-scaling sqrt', 0.5),
    ('--train-batch 32 --lr-scaling linear', 0.25), ('--batch-multiplier 4 --lr-scaling linear', 4),
    ('--train-batch 256 --batch-multiplier 2 --lr-scaling sqrt', 2),
    ('--train-batch 64 --base-batch 256 --lr-scaling linear', 0.25),
    ('--train-batch 64 --batch-multiplier 9 --mini-batch 8 --base-batch 64 --lr-scaling sqrt', 3),
])
@pytest.mark.parametrize('rate', ['', '--lr 0.3', '--lr-schedule cosine', '--lr-schedule onecycle', '--optimizer Adam'])
def test_the_learning_rate_is_scaled_with_the_batch(flags, factor, rate):
    plain, scaled = settle(f'--epochs 4 {rate}'), settle(f'--epochs 4 {rate} {flags}')
    assert all_rates(scaled, 3) == pytest.approx([factor * value for value in all_rates(plain, 3)])
    assert scaled.lr == pytest.approx(factor * (0.3 if '0.3' in rate else 0.001 if 'Adam' in rate else 0.1))
    assert (scaled.epochs, scaled.schedule, scaled.warmup) == (plain.epochs, plain.schedule, plain.warmup)


def test_the_rates_of_a_regime_are_scaled_too():
    regime = {0: {'lr': 0.1}, 2: {'lr': 0.03}}
    assert all_rates(settle('--epochs 3 --train-batch 512 --lr-scaling sqrt', regime),
                     1) == pytest.approx([0.2, 0.2, 0.06])


@settings(deadline=None, max_examples=80)
@given(epochs=st.integers(1, 300), batch=st.integers(1, 2000), multiplier=st.integers(1, 4), base=st.integers(1, 500))
@example(epochs=1, batch=1, multiplier=1, base=500)
@example(epochs=120, batch=100, multiplier=1, base=96)  # as floating-point numbers 120 (100 / 96) is more than 125
def test_epoch_scaling_keeps_the_number_of_steps(epochs, batch, multiplier, base):
    args = settle(f'--epochs {epochs} --train-batch {batch} --batch-multiplier {multiplier} --base-batch {base} '
                  '--epoch-scaling')
    stretch = Fraction(batch * multiplier, base)
    # With batch * multiplier * base images, batches of both kinds are whole, and there are `base` large ones in an
    # epoch.
    wanted, steps = epochs * batch * multiplier, args.epochs * base
    assert wanted <= steps < wanted + base and args.epochs >= 1
    milestones = sorted({epochs // 2, epochs * 3 // 4} - {0})
    assert args.schedule == [math.ceil(milestone * stretch) for milestone in milestones]
    assert list(args.regime) == [0] and args.lr == 0.1


@pytest.mark.parametrize('flags', ['--schedule 2 5', '--lr-step-size 2', '--schedule 3 --warmup 2',
                                   '--lr-schedule cosine',
                                   '--lr-schedule cosine --warmup 1.5', '--lr-schedule onecycle',
                                   '--lr-schedule linear --warmup 2 --lr-start 0.2 --lr-floor 0.1'])
@pytest.mark.parametrize('factor', [2, 3])
def test_with_epoch_scaling_every_step_has_the_rate_that_it_has_with_the_small_batch(flags, factor):
    small = settle(f'--epochs 6 {flags}')
    large = settle(f'--epochs 6 {flags} --train-batch {128 * factor} --epoch-scaling')
    assert large.epochs == 6 * factor
    assert all_rates(large, 4) == pytest.approx(all_rates(small, 4 * factor), abs=1e-15)


def test_epoch_scaling_makes_a_regime_as_many_steps_long():
    regime = {0: {'lr': 0.1, 'weight_decay': 0.01}, 1: {'lr': 0.2}, 3: {'weight_decay': 0.02}}
    small = settle('--epochs 4', regime)
    for batch, base in ((256, 128), (384, 128), (100, 25)):
        large = settle(f'--epochs 4 --train-batch {batch} --base-batch {base} --epoch-scaling', regime)
        assert in_each_epoch(large) == [now for now in in_each_epoch(small) for _ in range(batch // base)]
    half = in_each_epoch(settle('--epochs 4 --train-batch 64 --epoch-scaling', regime))
    assert [now['lr'] for now in half] == [0.1, 0.2] and [now['weight_decay'] for now in half] == [0.01, 0.01]
    uneven = in_each_epoch(settle('--epochs 4 --train-batch 192 --epoch-scaling', regime))  # 1 begins at 1.5, 3 at 4.5
    assert [now['lr'] for now in uneven] == [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]
    assert [now['weight_decay'] for now in uneven] == [0.01] * 5 + [0.02]


def in_each_epoch(args):
    return [schedule.options_at(args.regime, epoch) for epoch in range(args.epochs)]


def test_a_million_epochs_cost_nothing():
    began = time.perf_counter()
    for flags in ('', '--lr-step-size 1', '--lr-schedule cosine', '--epoch-scaling --train-batch 100',
                  f'--schedule {" ".join(map(str, range(10 ** 5)))} --gamma 0.999'):
        args = settle(f'--epochs {10 ** 12} --warmup 5 {flags}', REGIME)
        assert len(repr(args.regime)) + (0 if args.schedule else len(repr(args))) < 10000
        for step in range(0, 5 * 10 ** 12, 10 ** 10 + 1):
            assert 0 <= learning_rate(step, 10, args) <= 0.1
            assert schedule.options_at(args.regime, step // 10)['momentum'] in (0.8, 0.7)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize('flags', ['--gamma 3e38', '--lr 1e36', '--lr 1e35 --lr-scaling linear --train-batch 1024',
                                   '--gamma 10 --lr-step-size 1 --epochs 1000', '--lr-step-size 1 --gamma 3e38'])
def test_a_rate_that_becomes_more_than_float32_holds_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        settle(flags)
    printed = capsys.readouterr().err
    assert 'the learning rate must not become more than 3.4e+35' in printed and printed.count('\n') == 1


# Regimes

def by_loop(regime, epochs):
    """What is set in each epoch, as the code of Hoffer et al. reads a regime from its beginning."""
    result = []
    for epoch in range(epochs):
        now = {}
        for e in range(epoch + 1):
            if e in regime:
                now.update(regime[e])
        result.append(now)
    return result


names = st.sampled_from(['lr', 'momentum', 'weight_decay', 'dampening'])
regimes = st.dictionaries(st.integers(0, 9), st.dictionaries(names, st.floats(0.001, 0.9), max_size=4), max_size=5)


@settings(deadline=None, max_examples=60)
@given(regime=regimes, epochs=st.integers(1, 8))
def test_a_regime_holds_from_its_epoch_on_be_it_a_dict_or_a_function(regime, epochs):
    expected = by_loop(regime, epochs)
    for form in (regime, lambda epoch: regime.get(epoch),  # None where nothing is set
                 lambda epoch: expected[epoch]):  # all of it in every epoch
        changes = schedule.changes(form, epochs)
        assert [schedule.options_at(changes, epoch) for epoch in range(epochs)] == expected
    assert schedule.changes(None, epochs) == {0: {}}

    args = settle(f'--epochs {epochs} --start-epoch {epochs - 1}', regime)
    defaults = {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 5e-4}
    if any('lr' in now for now in expected):
        assert all_rates(args, 2) == [now['lr'] for now in in_each_epoch(args) for _ in range(2)]
        steps = [options(step, 2, args) for step in range(2 * epochs)]
        assert steps == [now for now in in_each_epoch(args) for _ in range(2)]
    assert in_each_epoch(args) == [{**defaults, **now} for now in expected]
    assert args.lr_schedule == ('regime' if any('lr' in now for now in expected) else 'step')


REGIME = {0: {'optimizer': 'SGD', 'lr': 0.01, 'momentum': 0.8, 'weight_decay': 0.003},
          2: {'lr': 0.02, 'momentum': 0.7, 'weight_decay': 0.004}}


def options(step, steps_per_epoch, args):
    """What an optimizer made by the regime has at `step`."""
    optimizer = getattr(torch.optim, args.optimizer)([torch.zeros(1)], **args.regime[0])
    schedule.apply(optimizer, step, steps_per_epoch, args)
    return {name: optimizer.param_groups[0][name] for name in schedule.options_at(args.regime, step // steps_per_epoch)}


def columns(args):
    return {name: [options(epoch, 1, args).get(name) for epoch in range(args.epochs)]
            for name in ('lr', 'momentum', 'weight_decay')}


def test_a_regime_is_used_where_no_flag_says_otherwise():
    args = settle('--epochs 4', REGIME)
    assert columns(args) == {'lr': [0.01, 0.01, 0.02, 0.02], 'momentum': [0.8, 0.8, 0.7, 0.7],
                             'weight_decay': [0.003, 0.003, 0.004, 0.004]}
    assert args.optimizer == 'SGD' and args.lr_schedule == 'regime'


@pytest.mark.parametrize('flags, changed', [
    ('--momentum 0.5', {'momentum': [0.5] * 4}), ('--momentum 0', {'momentum': [0] * 4}),
    ('--wd 0', {'weight_decay': [0] * 4}), ('--weight-decay 0.1', {'weight_decay': [0.1] * 4}),
    ('--momentum 0.5 --wd 0.1', {'momentum': [0.5] * 4, 'weight_decay': [0.1] * 4}),
    ('--lr 0.3', {'lr': [0.3, 0.3, 0.03, 0.003]}), ('--gamma 0.5', {'lr': [0.1, 0.1, 0.05, 0.025]}),
    ('--schedule 1', {'lr': [0.1, 0.01, 0.01, 0.01]}), ('--lr-step-size 3', {'lr': [0.1, 0.1, 0.1, 0.01]}),
    ('--lr-schedule step', {'lr': [0.1, 0.1, 0.01, 0.001]}), ('--warmup 1', {'lr': [0.1, 0.1, 0.01, 0.001]}),
    ('--lr-schedule cosine', {'lr': [0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]}),
    ('--optimizer SGD', {'lr': [0.1, 0.1, 0.01, 0.001]}),
    ('--optimizer RMSprop', {'lr': [0.001, 0.001, 0.0001, 0.00001]}),
    ('--optimizer Adam', {'lr': [0.001, 0.001, 0.0001, 0.00001], 'momentum': [None] * 4}),
    ('--optimizer AdamW --lr 0.3 --wd 0.1', {'lr': [0.3, 0.3, 0.03, 0.003], 'momentum': [None] * 4,
                                             'weight_decay': [0.1] * 4}),
])
def test_flags_win_over_a_regime_one_by_one(flags, changed):
    args = settle(f'--epochs 4 {flags}', REGIME)
    for name, values in columns(settle('--epochs 4', REGIME)).items():
        assert columns(args)[name] == pytest.approx(changed.get(name, values)), name
    assert (args.lr_schedule == 'regime') == ('lr' not in changed)
    assert args.optimizer == (flags.split()[1] if '--optimizer' in flags else 'SGD')


@pytest.mark.parametrize('optimizer', ['Adam', 'AdamW', 'RMSprop', 'SGD'])
def test_the_optimizer_is_that_of_the_regime(optimizer):
    args = settle('--epochs 2', {0: {'optimizer': optimizer, 'lr': 0.03},
                                 1: {'optimizer': optimizer, 'weight_decay': 0.1}})
    assert args.optimizer == optimizer
    momentum = {'SGD': 0.9, 'RMSprop': 0}.get(optimizer)
    assert columns(args) == {'lr': [0.03] * 2, 'momentum': [momentum] * 2, 'weight_decay': [5e-4, 0.1]}
    assert not any('optimizer' in now for now in args.regime.values())


class Own(ImageClassifier):
    """A small network with dropout, so that PyTorch's own random state matters, and a regime that each test sets."""

    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.set_head(4, num_classes, classifier)

    def features(self, x):
        return global_average_pool(self.layers(x))


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(models.MODELS, 'own', Own)
    return lambda regime: monkeypatch.setattr(Own, 'regime', regime)


def call(monkeypatch, flags):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split()])
    cifar.main()


@pytest.mark.parametrize('regime, flags, sentence', [
    ({0: {'optimizer': 'SGD'}, 2: {'optimizer': 'Adam'}}, '',
     'asks for the optimizer SGD and then Adam, and a run has one of SGD'),
    ({2: {'optimizer': 'RMSprop'}}, '', 'asks for the optimizer SGD and then RMSprop'),
    ({0: {'optimizer': 'LBFGS'}}, '', 'asks for the optimizer LBFGS, and a run has one of SGD, RMSprop, Adam, AdamW'),
    ({0: {'optimizer': 'adam'}}, '', 'choose it with --optimizer'),
    ({0: {'learning_rate': 0.1}}, '', 'the regime of --arch own sets learning_rate, which SGD does not have'),
    ({3: {'betas': (0.9, 0.9)}}, '', 'sets betas, which SGD does not have'),
    ({0: {'dampening': 0.1}}, '--optimizer Adam', 'sets dampening, which Adam does not have'),
    ({0: {'optimizer': 'Adam'}}, '--momentum 0.9', '--momentum is not used by --optimizer Adam'),
    ({0: {'lr': -0.1}}, '', 'Invalid learning rate: -0.1'),
])
def test_a_regime_that_cannot_be_is_refused(regime, flags, sentence, own, monkeypatch, tmp_path, capsys):
    own(regime)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, f'-d digits --arch own --epochs 4 {flags}')
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count('\n') == 1 and error.value.code == 2 and not list(tmp_path.iterdir())


def test_an_epoch_that_is_never_reached_and_an_optimizer_that_a_flag_replaces_are_no_obstacle(own, monkeypatch):
    own({0: {'optimizer': 'SGD'}, 2: {'optimizer': 'Adam'}})
    for flags, optimizer in (('--epochs 2', 'SGD'), ('--epochs 4 --optimizer AdamW', 'AdamW')):
        monkeypatch.setattr(sys, 'argv', ['cifar.py', '--arch', 'own', *flags.split()])
        assert cifar.parse_arguments()[0].optimizer == optimizer


# Whole runs

@pytest.fixture
def few(monkeypatch):
    """40 images of digits, no pictures, and a list of the options that every optimizer step had."""
    load, step, seen = datasets.load, torch.optim.SGD.step, []
    monkeypatch.setattr(datasets, 'load', lambda *args: load(*args).subset(torch.arange(40)))
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr('utils.metrics.write_confusion', lambda *args: None)

    def recording(self, closure=None):
        group, = self.param_groups
        seen.append((group['lr'], group['momentum'], group['weight_decay']))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, 'step', recording)
    return seen


@pytest.mark.parametrize('arch, scaled, expected', [
    ('shallow', '--epochs 240 --base-batch 960', [1e-3, 1e-2, 1e-3, 1e-4]),
    ('mlp', '--epochs 40 --base-batch 160', [1e-1, 1e-2, 1e-3, 1e-4]),
])
def test_shallow_and_mlp_train_with_the_rates_they_were_published_with(arch, scaled, expected, few, monkeypatch,
                                                                       tmp_path):
    call(monkeypatch, f'-d digits -a {arch} --train-batch 16 --epoch-scaling {scaled} -c {tmp_path}')
    log = read_log(tmp_path / 'log.txt')
    assert log['Epoch'] == [1, 2, 3, 4] and log['Learning Rate'] == pytest.approx(expected)
    decay = 5e-4 if arch == 'shallow' else 1e-4
    assert few == [pytest.approx((rate, 0.9, decay)) for rate in expected for _ in range(3)]


def test_those_regimes_as_published():
    args = settle('--epochs 240', Shallow.regime)
    assert columns(args)['lr'] == [1e-3] * 60 + [1e-2] * 60 + [1e-3] * 60 + [1e-4] * 60
    args = settle('--epochs 40', MLP.regime)
    assert columns(args)['lr'] == [0.1] * 10 + [1e-2] * 10 + [1e-3] * 10 + [1e-4] * 10


@pytest.mark.parametrize('regime', [REGIME, staticmethod(REGIME.get), lambda self, epoch: REGIME.get(epoch)],
                         ids=['a dict', 'a function', 'a method'])
@pytest.mark.parametrize('flags', ['', '--method amp', '--method smoothout'])
def test_what_a_regime_sets_reaches_every_step(regime, flags, own, few, monkeypatch, tmp_path):
    own(regime)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --epochs 3 {flags} -c {tmp_path}')
    assert few == [(0.01, 0.8, 0.003)] * 6 + [(0.02, 0.7, 0.004)] * 3
    assert read_log(tmp_path / 'log.txt')['Learning Rate'] == [0.01, 0.01, 0.02]


def test_a_run_that_starts_late_begins_in_the_middle_of_the_regime(own, few, monkeypatch, tmp_path):
    own(REGIME)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --epochs 3 --start-epoch 1 --momentum 0.5 -c {tmp_path}')
    assert few == [(0.01, 0.5, 0.003)] * 3 + [(0.02, 0.5, 0.004)] * 3


def leaves(value, path=''):
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in leaves(part, f'{path}/{name}').items()}
    return {path: value}


def assert_same_run(folder, other):
    for name in ('checkpoint.pth.tar', 'model_best.pth.tar'):
        ours, theirs = (leaves(torch.load(path / name, weights_only=True)) for path in (folder, other))
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    logs = [[line.split('\t')[:-1] for line in (path / 'log.txt').read_text().splitlines()] for path in (folder, other)]
    assert logs[0] == logs[1] and len(logs[0]) == 5


CHANGING = {0: {'lr': 0.01, 'weight_decay': 0.01}, 1: {'momentum': 0.5}, 2: {'lr': 0.02, 'weight_decay': 0.1},
            3: {'weight_decay': 0}}


@pytest.mark.parametrize('regime, flags', [
    (CHANGING, ''), (CHANGING, '--method amp'),
    (CHANGING, '--method smoothout --train-batch 8 --base-batch 16 --epoch-scaling --epochs 8'),
    ({0: {'optimizer': 'Adam'}, **CHANGING, 1: {'lr': 0.03}}, ''), (None, '--optimizer Adam --lr-schedule cosine'),
    (None, '--optimizer AdamW --method amp --lr-step-size 2'), (None, '--optimizer RMSprop --wd 0.1 --lr 0.01'),
])
def test_killed_after_two_epochs_and_resumed_is_the_run_that_was_not(regime, flags, own, few, monkeypatch, tmp_path):
    own(regime)
    run = f'-d digits -a own --train-batch 16 --epochs 4 --manualSeed 3 {flags}'
    call(monkeypatch, f'{run} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{run} -c {tmp_path}/parts', epoch=2)
    torch.rand(7)  # whatever else was drawn in between
    call(monkeypatch, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_more_epochs_of_a_stretched_run_are_counted_as_they_were_given(own, few, monkeypatch, tmp_path):
    own(None)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --base-batch 8 --epoch-scaling --epochs 2 -c {tmp_path}')
    assert len(read_log(tmp_path / 'log.txt')['Epoch']) == 4
    call(monkeypatch, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 3')
    assert len(read_log(tmp_path / 'log.txt')['Epoch']) == 6


def test_fewer_epochs_than_a_stretched_run_has_behind_it_are_refused(own, few, monkeypatch, tmp_path):
    own(None)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --base-batch 32 --epoch-scaling --epochs 4 -c {tmp_path}')
    assert len(read_log(tmp_path / 'log.txt')['Epoch']) == 2
    with pytest.raises(SystemExit):
        call(monkeypatch, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')


@pytest.mark.parametrize('optimizer, state', [('Adam', 'exp_avg_sq'), ('AdamW', 'exp_avg_sq'),
                                              ('RMSprop', 'square_avg')])
def test_other_optimizers_alone_and_inside_of_methods(optimizer, state, own, few, monkeypatch, tmp_path):
    own(None)
    results = {}
    for name, flags in (('alone', ''), ('in amp, idle', '--method amp --inner-iter 0'),
                        ('in amp', '--method amp --epsilon 0.1'),
                        ('in smoothout, idle', '--method smoothout --ss 0'),
                        ('in smoothout', '--method smoothout --ss 0.05')):
        folder = tmp_path / name.replace(' ', '-')
        run = '-d digits -a own --train-batch 16 --epochs 1 --manualSeed 3'
        call(monkeypatch, f'{run} --optimizer {optimizer} {flags} -c {folder}')
        results[name] = torch.load(folder / 'checkpoint.pth.tar', weights_only=True)
        moments = results[name]['optimizer']['state']
        assert len(moments) == 6 and all(state in each and each['step'] == 3 for each in moments.values()), name
        group, = results[name]['optimizer']['param_groups']
        assert (group['lr'], group['weight_decay']) == (0.001, 5e-4)
    weights = {name: result['state_dict']['head.weight'] for name, result in results.items()}
    assert not few and all(value.isfinite().all() for value in weights.values())
    assert torch.equal(weights['alone'], weights['in amp, idle']) and torch.equal(weights['alone'],
                                                                                  weights['in smoothout, idle'])
    assert len({tuple(value.flatten().tolist()) for value in weights.values()}) == 3


@pytest.mark.parametrize('before, after', [('SGD', 'Adam'), ('Adam', 'SGD'), ('Adam', 'RMSprop'), ('RMSprop', 'AdamW')])
def test_the_optimizer_cannot_change_when_a_run_is_resumed(before, after, own, few, monkeypatch, tmp_path, capsys):
    own(None)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --epochs 1 --optimizer {before} -c {tmp_path}')
    call(monkeypatch, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2 --optimizer {before}')
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call(monkeypatch, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 3 --optimizer {after}')
    printed = capsys.readouterr().err
    assert '--optimizer cannot change' in printed and f'of {before}' in printed and f'given {after}' in printed


def test_a_resumed_run_may_take_another_schedule_than_its_flags_said(own, few, monkeypatch, tmp_path):
    own(REGIME)
    call(monkeypatch, f'-d digits -a own --train-batch 16 --epochs 3 --schedule 1 2 --gamma 0.5 --lr 0.2 -c {tmp_path}')
    call(monkeypatch, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 4 --lr-schedule cosine')
    log = read_log(tmp_path / 'log.txt')
    assert log['Learning Rate'] == pytest.approx([0.2, 0.1, 0.05, 0.1 * (1 + math.cos(math.pi * 3 / 4))], rel=1e-5)
    assert [weight_decay for _, _, weight_decay in few] == [0.003] * 6 + [0.004] * 6
