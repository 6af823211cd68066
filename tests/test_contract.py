"""What an edited script, and a method of one's own, can rely on: optimizers, parameter groups, loss terms with
parameters.
"""
import collections
import functools
import json
import re
import shlex
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import amp
import center
import cifar
import compare
import imagenet
from helpers import broken_off, call, few_digits as digits, unrecorded
from models import cifar as models
from models import imagenet as torchvision_models
from utils import checkpoint, flags, methods, output, schedule
from utils.activations import Activations
from utils.batches import Batches, Split
from utils.errors import UserError
from utils.logger import read_log
from utils.run import Run

SHORT = '-d digits --depth 8 --epochs 2 --lr-schedule onecycle --train-batch 16 --manualSeed 3'


class Lion(torch.optim.Optimizer):
    """As somebody would copy it: Chen et al., arXiv 2302.06675, algorithm 2; its options are its own."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01):
        super().__init__(params, {'lr': lr, 'betas': betas, 'weight_decay': weight_decay, 'steps': 0})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            result = closure()
        for group in self.param_groups:
            group['steps'] += 1
            for p in group['params']:
                average = self.state[p].setdefault('average', torch.zeros_like(p))
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(group['lr'] * average.lerp(p.grad, 1 - group['betas'][0]).sign())
                average.lerp_(p.grad, 1 - group['betas'][1])
        return result


@pytest.fixture
def lion(monkeypatch):
    """The edit of `main` that puts Lion in place of what methods.build_optimizer gives."""
    monkeypatch.setattr(methods, 'build_optimizer', lambda args, model, *rest,
                        **more: Lion(model.parameters(), lr=1e-4))


def read(folder, name=output.LAST):
    return torch.load(folder / name, weights_only=True)


def leaves(value, path=''):
    if not isinstance(value, (dict, list, tuple)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, part in items for key, leaf in leaves(part, f'{path}/{name}').items()}


def assert_same_state(first, second):
    first, second = ({key: value for key, value in leaves(state).items() if not key.startswith(('/seconds', '/args'))}
                     for state in (first, second))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key], key


# Optimizers

def test_an_optimizer_written_into_main_keeps_its_rate_and_options(lion, few_digits, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} -c {tmp_path}/whole')
    state = read(tmp_path / 'whole')
    group, = state['optimizer']['param_groups']
    assert state['optimizer_class'] == 'Lion' and group['weight_decay'] == 0.01 and group['steps'] == 10
    assert 'momentum' not in group and group['made_with']['lr'] == 1e-4 and 0 < group['lr'] < 1e-4
    assert json.load(open(tmp_path / 'whole/args.json'))['optimizer class'] == 'Lion'
    rates = read_log(tmp_path / 'whole/log.txt')['Learning Rate']
    assert rates[0] == pytest.approx(1e-4 / 25) and max(rates) <= 1e-4

    broken_off(monkeypatch, f'{SHORT} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert_same_state(state, read(tmp_path / 'parts'))


def test_what_the_loop_sets_by_hand_stays_and_is_the_same_after_a_resume(few_digits, monkeypatch, tmp_path):
    """Momentum and epsilon by epoch, and a rate in the place of schedule.apply, which is then that of the log."""
    train, used = cifar.train, []

    def edited(run, criterion, optimizer, epoch, args):
        for group in optimizer.param_groups:
            group.update(momentum=0.5 + 0.2 * epoch, epsilon=0.01 * (epoch + 1), lr=0.02 / 2 ** epoch)
        result = train(run, criterion, optimizer, epoch, args)
        used.append([optimizer.param_groups[0][name] for name in ('momentum', 'epsilon', 'lr')])
        return result

    monkeypatch.setattr(cifar, 'train', edited)
    monkeypatch.setattr(schedule, 'apply', lambda *args: None)
    flags = f'{SHORT} --epochs 3 --method amp --epsilon 0.3'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    whole, used[:] = [*used], []
    assert whole == [pytest.approx([0.5, 0.01, 0.02]), pytest.approx([0.7, 0.02, 0.01]),
                     pytest.approx([0.9, 0.03, 0.005])]
    assert read_log(tmp_path / 'whole/log.txt')['Learning Rate'] == [0.02, 0.01, 0.005]
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert used[-2:] == whole[1:]
    assert_same_state(read(tmp_path / 'whole'), read(tmp_path / 'parts'))
    assert json.load(open(tmp_path / 'parts/args.json'))['changes'] == []


def test_with_the_schedule_in_the_loop_other_options_set_by_hand_stay_too(few_digits, monkeypatch, tmp_path):
    train, used = cifar.train, []

    def edited(run, criterion, optimizer, epoch, args):
        optimizer.param_groups[0].update(momentum=0.5 + 0.2 * epoch, epsilon=0.01 * (epoch + 1))
        result = train(run, criterion, optimizer, epoch, args)
        used.append([optimizer.param_groups[0][name] for name in ('momentum', 'epsilon')])
        return result

    monkeypatch.setattr(cifar, 'train', edited)
    call(monkeypatch, cifar, f'{SHORT} --method amp -c {tmp_path}')
    assert used == [[0.5, 0.01], [0.7, 0.02]]


def test_flags_that_change_on_resume_win_over_what_the_loop_has_set(few_digits, monkeypatch, tmp_path):
    """Also over an epsilon of 0 before --method-start: without that flag nothing would ever scale it again."""
    flags = f'{SHORT} --method amp --epsilon 0.3 --momentum 0.9'
    broken_off(monkeypatch, f'{flags} --method-start 0.5 -c {tmp_path}', epoch=1)
    assert read(tmp_path)['optimizer']['param_groups'][0]['epsilon'] == 0
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --method-start 0 --momentum 0.8')
    group, = read(tmp_path)['optimizer']['param_groups']
    assert (group['epsilon'], group['momentum']) == (0.3, 0.8)


def test_state_of_another_class_is_refused(few_digits, lion, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}')
    monkeypatch.undo()
    with pytest.raises(UserError, match='is that of Lion, but the optimizer is SGD'):
        call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')


def test_one_more_optimizer_is_one_line(few_digits, monkeypatch, tmp_path):
    monkeypatch.setitem(schedule.OPTIMIZERS, 'Lion', functools.partial(Lion, lr=3e-4, weight_decay=0.1))
    call(monkeypatch, cifar, f'{SHORT} --optimizer Lion --lr-schedule step -c {tmp_path}')
    group, = read(tmp_path)['optimizer']['param_groups']
    assert group['made_with']['lr'] == 3e-4 and group['weight_decay'] == 0.1
    assert read_log(tmp_path / 'log.txt')['Learning Rate'] == pytest.approx([3e-4, 3e-5])


def test_a_method_brings_its_default_rate(few_digits, monkeypatch, tmp_path):
    method = types.SimpleNamespace(add_arguments=lambda parser: None, DEFAULT_LR=2e-4,
                                   optimizer=lambda args: lambda params, lr, **options: Lion(params, lr))
    monkeypatch.setitem(methods.METHODS, 'lion', method)
    for rate, given in ((2e-4, ''), (1e-3, '--lr 0.001')):
        call(monkeypatch, cifar, f'{SHORT} --epochs 1 --lr-schedule step --method lion {given} -c {tmp_path}/{rate}')
        assert read_log(tmp_path / f'{rate}/log.txt')['Learning Rate'] == [rate]


def a_step_more(change):
    """SGD, which then does `change(self, its first parameter)`."""
    class Own(torch.optim.SGD):
        def step(self, closure):
            result = super().step(closure)
            change(self, self.param_groups[0]['params'][0])
            return result
    return lambda args, model, *rest, **more: Own(model.parameters(), lr=0.01)


@pytest.mark.parametrize('flags', ['', '--val-split 0.2', '--checkpoint-every 2'])
@pytest.mark.parametrize('change, held', [
    (lambda self, p: self.state[p].update(history=collections.deque([1])), 'collections.deque'),
    (lambda self, p: self.param_groups[0].update(distance=np.float64(1e-6)), 'numpy'),
    (lambda self, p: self.state.update({('a', 'tuple'): 1}), 'optimizer is not')])
def test_what_could_not_be_read_again_ends_the_run_where_it_is_first_kept(change, held, flags, few_digits, monkeypatch,
                                                                          tmp_path):
    monkeypatch.setattr(methods, 'build_optimizer', a_step_more(change))
    with pytest.raises(UserError, match='the run could not be resumed, as the checkpoint that it has just written '
                                        f'cannot be read .*{held}.*must be tensors, numbers, strings, lists and dicts'):
        call(monkeypatch, cifar, f'{SHORT} {flags} -c {tmp_path}')
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == (1 if 'every' in flags else 2)


def test_an_optimizer_may_count_for_all_parameters_together(few_digits, monkeypatch, tmp_path):
    def count(self, p):
        self.state['steps'] = self.state.get('steps', 0) + 1

    monkeypatch.setattr(methods, 'build_optimizer', a_step_more(count))
    broken_off(monkeypatch, f'{SHORT} -c {tmp_path}', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar')
    assert read(tmp_path)['optimizer']['state']['steps'] == 10


def test_a_method_that_is_an_optimizer_is_not_left_out_silently(lion, few_digits, monkeypatch, tmp_path):
    for name, option in (('amp', 'epsilon'), ('smoothout', 'ss'), ('sam', 'rho')):
        with pytest.raises(UserError, match=f'--method {name} is an optimizer, and the script trains with Lion '
                                            f'instead, which has no option {option}'):
            call(monkeypatch, cifar, f'{SHORT} --method {name} -c {tmp_path}')
    monkeypatch.setattr(methods, 'build_optimizer', lambda args, model, *rest, **more: amp.AMP(
        model.parameters(), lr=1e-3, epsilon=0.1, base_optimizer=torch.optim.Adagrad))
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 --method amp -c {tmp_path}/inside')


def test_ema_needs_an_optimizer_that_calls_hooks(few_digits, monkeypatch, tmp_path):
    class Wrapper:
        def __init__(self, inner):
            self.inner, self.param_groups, self.state_dict = inner, inner.param_groups, inner.state_dict

    monkeypatch.setattr(methods, 'build_optimizer', lambda args, model, *rest, **more: Wrapper(
        torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(UserError, match='--ema needs an optimizer that calls hooks after a step, .* and Wrapper does'):
        call(monkeypatch, cifar, f'{SHORT} --ema 0.9 -c {tmp_path}')


def test_runs_with_an_optimizer_of_ones_own_are_another_setting(few_digits, lion, monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}/lion')
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        digits(patch, 80, 40)
        call(patch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}/sgd')
        capsys.readouterr()
        call(patch, compare, f'{tmp_path}')
    printed = capsys.readouterr().out
    assert '--optimizer-class Lion' in printed and printed.count(' 1   ') == 2 and 'left out' not in printed


def test_an_optimizer_without_weight_decay_is_one_line_too(few_digits, monkeypatch, tmp_path):
    monkeypatch.setitem(schedule.OPTIMIZERS, 'Rprop', functools.partial(torch.optim.Rprop, lr=1e-3))
    for more in ('', '--bias-lr-factor 4'):
        call(monkeypatch, cifar, f'{SHORT} --epochs 1 --optimizer Rprop {more} --overwrite -c {tmp_path}')
    assert read(tmp_path)['optimizer_class'] == 'Rprop'


@pytest.mark.parametrize('script', [cifar, imagenet])
def test_a_methods_optimizer_gets_the_network_before_the_data_are_read(script, monkeypatch):
    seen = []

    def optimizer(args, model, steps_per_epoch):
        seen.append(type(model.head) if script is cifar else model.num_classes)
        return torch.optim.SGD

    monkeypatch.setitem(methods.METHODS, 'heavy', types.SimpleNamespace(optimizer=optimizer))
    monkeypatch.setattr(sys, 'argv', shlex.split(f'{script.__name__}.py --method heavy --data x -a '
                                                 f'{"resnet" if script is cifar else "resnet18"}'))
    script.parse_arguments()
    assert seen == [nn.Linear if script is cifar else 2]


def reads_a_tensor(num_classes=10, classifier=nn.Linear):
    """LeNet that, as networks with drop path do, makes rates as a tensor and reads one by one."""
    network = models.MODELS['lenet'](num_classes, classifier)
    network.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
    return network


def test_a_network_may_read_tensors_where_it_is_built(few_digits, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, 'reads', reads_a_tensor)
    for name in ('reads', 'lenet'):
        call(monkeypatch, cifar, f'-d digits -a {name} --epochs 1 --train-batch 16 --manualSeed 3 -c {tmp_path}/{name}')
    first, second = (read(tmp_path / name)['state_dict'] for name in ('reads', 'lenet'))
    assert all(torch.equal(first[key], second[key]) for key in second)  # nothing was drawn on the way


def a_flag(*words, **options):
    return types.SimpleNamespace(add_arguments=lambda parser: parser.add_argument(*words, **options))


@pytest.mark.parametrize('method, sentence', [
    (a_flag('--gamma', type=float, default=2.0), '--gamma of --method focal is a flag of the script; give it another'),
    (a_flag('--focal-rate', '--wd', type=float), '--focal-rate of --method focal is a flag of the script'),
    (a_flag('--decay', dest='momentum', type=float), '--decay of --method focal is a flag of the script'),
    (a_flag('--margin', type=float, default=0.35), '--margin of --method focal is a flag of --method lsoftmax, with'),
    (a_flag('--scale', type=float, default=64.0), '--scale of --method focal is a flag of --method arcface, with'),
    (a_flag('--focus', type=float, required=True), '--focus of --method focal is required, also of runs without it')])
def test_a_flag_of_ones_own_that_is_there_already_is_not_dropped(method, sentence, monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, 'focal', method)
    with pytest.raises(SystemExit):
        cifar.make_parser()
    assert sentence in capsys.readouterr().err


def test_methods_may_share_a_flag_that_means_the_same_and_need_none(monkeypatch):
    monkeypatch.setitem(methods.METHODS, 'cosine', a_flag('--scale', type=float, default=30.0, help='mine'))
    monkeypatch.setitem(methods.METHODS, 'flagless', types.SimpleNamespace(DEFAULT_LR=0.3))
    args = cifar.make_parser().parse_args('--method cosine flagless --scale 5'.split())
    assert args.scale == 5 and methods.flags(methods.METHODS['flagless']) == set()


def groups_after(regime, step, made, epochs=4, flags=''):
    parser = cifar.make_parser()
    args = parser.parse_args(f'--epochs {epochs} {flags}'.split())
    schedule.fill_in(args, regime, parser)
    optimizer = torch.optim.SGD([{'params': [torch.zeros(1)], **options} for options in made],
                                **{key: args.regime[0][key] for key in ('lr', 'momentum', 'weight_decay')})
    for earlier in range(step + 1):
        schedule.apply(optimizer, earlier, 5, args)
    return args, optimizer.param_groups


@pytest.mark.parametrize('rates', ['', '--lr-schedule cosine --warmup 1', '--lr-schedule onecycle',
                                   '--lr-schedule linear --lr-floor 0.1', '--gamma 0.5 --schedule 1 2'])
def test_a_factor_between_groups_survives_every_schedule(rates):
    for step in (0, 3, 7, 13, 19):
        args, (plain, other) = groups_after(None, step, [{}, {'lr': 0.007}], flags=f'--lr 0.1 {rates}')
        assert plain['lr'] == schedule.learning_rate(step, 5, args)
        assert other['lr'] == pytest.approx(0.07 * plain['lr'], rel=1e-12)


def test_groups_follow_a_regime_only_in_what_they_were_made_with():
    regime = {0: {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4},
              2: {'lr': 0.02, 'weight_decay': 0.0, 'momentum': 0.5}}
    _, (plain, other) = groups_after(regime, 12, [{}, {'lr': 1.0, 'weight_decay': 0.3}])
    assert (plain['lr'], plain['momentum'], plain['weight_decay']) == (0.02, 0.5, 0.0)
    assert (other['lr'], other['momentum'], other['weight_decay']) == (pytest.approx(0.2), 0.5, 0.3)


def test_flags_win_over_the_checkpoint_but_what_an_optimizer_counts_is_resumed():
    def made(weight_decay):
        return Lion([nn.Parameter(torch.ones(2))], weight_decay=weight_decay)

    first = made(0.01)
    schedule.made_with(first.param_groups[0])
    first.param_groups[0].update(steps=7, lr=5.0)
    state = {'optimizer': first.state_dict(), 'optimizer_class': 'Lion'}
    same, other = made(0.01), made(0.2)
    for optimizer in (same, other):
        checkpoint.load_optimizer(optimizer, state, 'x')
    assert same.param_groups[0]['steps'] == other.param_groups[0]['steps'] == 7
    assert other.param_groups[0]['weight_decay'] == 0.2 and other.param_groups[0]['made_with']['lr'] == 1e-4


def test_an_optimizer_of_a_method_that_wraps_none_is_not_given_one(monkeypatch, tmp_path, capsys):
    """--optimizer is refused in one sentence beside a method whose `optimizer` is a class such as SGD."""
    own = types.ModuleType('own', 'Own.')
    own.optimizer = lambda args: torch.optim.SGD
    monkeypatch.setitem(methods.METHODS, 'own', own)
    with pytest.raises(SystemExit, match='2'):
        call(monkeypatch, cifar, f'-d digits -a lenet --epochs 1 --method own --optimizer AdamW --wd 0 -c {tmp_path}/a')
    assert capsys.readouterr().err.endswith('error: the optimizer of --method own has no base_optimizer, so it cannot '
                                            'have --optimizer AdamW inside of it; leave out one of the two\n')


def test_options_that_an_optimizer_changes_in_place_are_resumed():
    """A list, a dict, tensors, and what is None until the first step."""
    def made():
        group = {'params': [nn.Parameter(torch.ones(2))], 'history': [], 'count': {'n': 0}, 'moved': torch.zeros(()),
                 'each': torch.zeros(2), 'scale': None}
        optimizer = torch.optim.SGD([group], lr=0.1)
        schedule.made_with(optimizer.param_groups[0])
        return optimizer

    first, resumed = made(), made()
    group = first.param_groups[0]
    group['history'].append(0.5)
    group['count']['n'] += 1
    group['moved'] += 2
    group['each'] += 3
    group['scale'] = 4.0
    checkpoint.load_optimizer(resumed, {'optimizer': first.state_dict(), 'optimizer_class': 'SGD'}, 'x')
    held = resumed.param_groups[0]
    assert (held['history'], held['count'], held['moved'], held['scale']) == ([0.5], {'n': 1}, 2, 4.0)
    assert held['each'].tolist() == [3, 3] and held['made_with']['history'] == [] and held['made_with']['moved'] == 0


# Loss terms with parameters

@pytest.fixture
def with_center(monkeypatch):
    monkeypatch.setitem(methods.METHODS, 'center', center)


@pytest.mark.parametrize('flags', ['--method center',
                                   '--method lsoftmax center --margin 2 --beta-min 5 --mini-batch 8 --ema 0.9',
                                   '--method center amp --epsilon 0.05 --clip-norm 1'])
def test_center_loss_trains_its_centres_and_resumes(flags, with_center, few_digits, monkeypatch, tmp_path):
    flags = f'{SHORT} {flags} --center-coef 0.1'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    state = read(tmp_path / 'whole')
    torch.manual_seed(3)
    centres = state['state_dict']['loss_terms.center.centres']
    assert centres.shape == (10, 64)
    others, own = state['optimizer']['param_groups']
    assert own['made_with']['lr'] == 0.5 and own['weight_decay'] == 0 and own['lr'] == pytest.approx(5 * others['lr'])
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    first = read(tmp_path / 'parts')['state_dict']['loss_terms.center.centres']
    assert (first - centres).abs().max() > 1e-3
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert_same_state(state, read(tmp_path / 'parts'))


def test_the_lab_looks_at_the_network_without_the_centres(with_center, few_digits, monkeypatch, tmp_path, capsys):
    import evaluate
    import measure_sharpness
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 --method center -c {tmp_path}')
    tested = json.load(open(tmp_path / 'result.json'))['test loss']
    for script, more in ((evaluate, '--ss 0 --draws 1'), (measure_sharpness, '--noise --draws 1 --mode test')):
        capsys.readouterr()
        call(monkeypatch, script, f'{tmp_path}/checkpoint.pth.tar -o {tmp_path}/out {more}')
        numbers = map(float, re.findall(r'\d+\.\d+', capsys.readouterr().out))
        assert any(number == pytest.approx(tested, rel=1e-3) for number in numbers)


def test_a_head_that_is_not_told_the_strength_cannot_begin_late(few_digits, monkeypatch, tmp_path):
    class Own(nn.Linear):
        def forward(self, features, targets=None):
            return super().forward(features)

    monkeypatch.setitem(methods.METHODS, 'own', types.ModuleType('own', 'Own.'))
    methods.METHODS['own'].head = lambda args: Own
    for late in ('--method-start 0.5', '--method-ramp 1'):
        with pytest.raises(UserError, match='cannot scale --method own, whose head has no before_step'):
            call(monkeypatch, cifar, f'{SHORT} --method own {late} -c {tmp_path}')
    Own.before_step = lambda self, behind, strength: None
    call(monkeypatch, cifar, f'{SHORT} --method own --method-start 0.5 -c {tmp_path}')


@pytest.mark.parametrize('family, arch', [('cifar', 'lenet'), ('cifar', 'vgg11_bn'), ('cifar', 'densenet'),
                                          ('cifar', 'mlp'),
                                          ('cifar', 'preresnet'), ('imagenet', 'resnet18'),
                                          ('imagenet', 'mobilenet_v3_small')])
@pytest.mark.parametrize('method', [[], ['lsoftmax']])
def test_features_are_what_goes_into_the_head(family, arch, method):
    module, parser = (models, cifar.make_parser()) if family == 'cifar' else (torchvision_models,
                                                                              imagenet.make_parser())
    args = parser.parse_args(['--method', *method] if method else [])
    model = module.build(arch, 7, methods.build_head(args))
    read, images = Activations(model, ['features']).read, torch.randn(4, 3, 32, 32)
    with torch.random.fork_rng():
        outputs = model(images, torch.arange(4))
    features, = read()
    assert features.shape == (4, model.in_features) and features.requires_grad and model.num_classes == 7
    if not method:
        torch.testing.assert_close(model.head(features), outputs)


# The run

def noise_run(flags='', train_batch=8):
    parser = cifar.make_parser()
    args = parser.parse_args(f'--epochs 1 --lr 0.01 --train-batch {train_batch} --manualSeed 1 {flags}'.split())
    schedule.fill_in(args, None, parser)
    torch.manual_seed(0)
    split = Split(torch.randint(256, (24, 32, 32, 3), dtype=torch.uint8), torch.arange(24) % 4, list('abcd'))
    model = models.build('resnet', 4, depth=8)
    batches = Batches(split, *split.mean_and_std(), train_batch, 'cpu')
    return args, model, batches


def test_a_frozen_backbone_keeps_its_statistics_and_weights():
    args, model, batches = noise_run()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.layer3.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = methods.build_optimizer(args, model, len(batches))
    cifar.train(unrecorded(args, model, optimizer, batches), methods.build_criterion(args, model), optimizer, 0, args)
    for name, value in model.state_dict().items():
        trained = name.startswith(('head', 'layer3'))
        assert torch.equal(value, before[name]) != trained, name
    assert model.layer3.training and not model.layer1[0].bn1.training and model.layer1[0].training
    model.requires_grad_(True)
    assert model.train().layer1[0].bn1.training


def test_mixup_is_an_edit_of_two_lines(monkeypatch):
    args, model, batches = noise_run()
    optimizer = methods.build_optimizer(args, model, len(batches))
    run, seen = unrecorded(args, model, optimizer, batches), []
    steps = run.steps

    def mixed(epoch):
        for step, batch in steps(epoch):
            shares = torch.eye(4)[batch.targets]
            yield step, batch._replace(images=0.7 * batch.images + 0.3 * batch.images.flip(0),
                                       targets=0.7 * shares + 0.3 * shares.flip(0))
            seen.append(batch.size)

    run.steps = mixed
    measured = cifar.train(run, methods.build_criterion(args, model), optimizer, 0, args)
    assert seen == [8, 8, 8] and measured['Loss'] > 0


def test_say_prints_in_training(few_digits, monkeypatch, tmp_path, capsys):
    steps = Run.steps

    def saying(run, epoch):
        for step, batch in steps(run, epoch):
            yield step, batch
            run.say(f'step {step} is done')

    monkeypatch.setattr(Run, 'steps', saying)
    call(monkeypatch, cifar, f'{SHORT} -c {tmp_path}')
    assert 'step 9 is done' in capsys.readouterr().out


def test_files_that_the_project_does_not_know_stay_and_do_not_matter(few_digits, monkeypatch, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'notes.txt').write_text('mine')
    flags = f'{SHORT} --epochs 1 -c {folder}'
    call(monkeypatch, cifar, flags)
    (folder / 'events.out.tfevents.1').write_bytes(b'x')
    (folder / 'board').mkdir()
    first = read(folder)
    with pytest.raises(UserError, match='is not empty; use --resume'):
        call(monkeypatch, cifar, flags)
    call(monkeypatch, cifar, f'{flags} --overwrite')
    assert_same_state(first, read(folder))
    for name in output.RESULTS[:2]:
        (folder / name).unlink()
    for name in ('result.json', 'confusion.csv', 'confusion.png', 'log.png', 'log.pdf'):
        (folder / name).unlink(missing_ok=True)
    call(monkeypatch, cifar, f'{flags} --resume auto')  # as after a kill before the first checkpoint
    call(monkeypatch, cifar, f'{flags} --resume auto')
    assert_same_state(first, read(folder))
    assert (folder / 'notes.txt').read_text() == 'mine'
    assert (folder / 'events.out.tfevents.1').exists() and (folder / 'board').is_dir()


def test_a_checkpoint_never_says_where_to_write(few_digits, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}/run')
    state = read(tmp_path / 'run')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/log.txt').write_text('precious')
    state['args'] |= {'checkpoint': f'{tmp_path}/other', 'overwrite': True, 'evaluate': False, 'resume': 'x',
                      'coef': 3.0}
    torch.save(state, tmp_path / 'run/checkpoint.pth.tar')
    call(monkeypatch, cifar, f'--resume {tmp_path}/run/checkpoint.pth.tar --epochs 2')
    assert (tmp_path / 'other/log.txt').read_text() == 'precious' and len(list((tmp_path / 'other').iterdir())) == 1
    assert read(tmp_path / 'run')['epoch'] == 2


# --init

def test_init_begins_with_the_weights_that_fit(few_digits, monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}/first')
    source = read(tmp_path / 'first')['state_dict']
    plain = {f'module.{name}': value for name, value in source.items() if not name.startswith('layer1')}
    torch.save({**plain, 'module.head.weight': torch.zeros(7, 64)}, tmp_path / 'weights.pt')
    begun = []
    monkeypatch.setattr(Run, 'epochs', lambda run: begun.append({k: v.clone() for k, v
                                                                 in run.model.state_dict().items()}) or [])
    monkeypatch.setattr(Run, 'report', lambda *args: None)
    for file in (f'{tmp_path}/first/checkpoint.pth.tar', f'{tmp_path}/weights.pt'):
        capsys.readouterr()
        call(monkeypatch, cifar, f'{SHORT} --manualSeed 8 --init {file} --overwrite -c {tmp_path}/second')
        printed = capsys.readouterr().out
    whole, part = begun
    assert all(torch.equal(whole[name], value) for name, value in source.items())
    for name, value in source.items():
        left_out = name.startswith('layer1') or name == 'head.weight'
        assert torch.equal(part[name], value) != left_out or name.startswith('layer1') and value.abs().max() <= 1, name
    assert 'of another shape there, so left out: head.weight (10x64)' in printed
    assert 'not there, so new: layer1.' in printed
    assert json.load(open(tmp_path / 'second/args.json'))['init'] == f'{tmp_path}/weights.pt'


def test_what_cannot_be_the_beginning_is_refused(few_digits, monkeypatch, tmp_path, capsys):
    torch.save({'a': torch.zeros(3)}, tmp_path / 'other.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    (tmp_path / 'text.pt').write_text('no')
    for file, sentence in (('other.pt', 'nothing in --init .* fits this network: it holds a .3.'),
                           ('list.pt', 'must hold a checkpoint or a state_dict'), ('text.pt', 'is not a checkpoint'),
                           ('nowhere', 'there is no checkpoint')):
        with pytest.raises(UserError, match=sentence):
            call(monkeypatch, cifar, f'{SHORT} --init {tmp_path}/{file} -c {tmp_path}/run')
    assert not (tmp_path / 'run').exists()
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}/run')
    with pytest.raises(SystemExit):
        call(monkeypatch, cifar, f'--resume {tmp_path}/run/checkpoint.pth.tar --init {tmp_path}/other.pt')
    assert '--init is where a new run begins' in capsys.readouterr().err


# Flags

@pytest.mark.parametrize('script', [cifar, imagenet])
def test_every_flag_is_in_the_table(script):
    of_methods = set().union(*(methods.flags(module) for module in methods.METHODS.values()))
    names = script.make_parser().names() - {'help'}
    assert not names - of_methods - flags.FLAGS.keys()


def test_the_table_knows_no_other_flag():
    assert not flags.FLAGS.keys() - cifar.make_parser().names() - imagenet.make_parser().names()


def test_a_harmless_flag_does_not_tell_runs_apart(few_digits, monkeypatch, tmp_path, capsys):
    import compare
    make_parser = cifar.make_parser

    def with_note():
        parser = make_parser()
        parser.add_argument('--note')
        return parser

    monkeypatch.setattr(cifar, 'make_parser', with_note)
    monkeypatch.setitem(flags.FLAGS, 'note', flags.Meaning(False, flags.FREE, False))
    for seed, note in ((1, 'x'), (2, 'y')):
        call(monkeypatch, cifar, f'{SHORT} --epochs 1 --manualSeed {seed} --note {note} -c {tmp_path}/{note}')
    capsys.readouterr()
    call(monkeypatch, compare, f'{tmp_path} --csv')
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert row.split(',')[header.split(',').index('n')] == '2'


def test_bearpaws_names_are_read():
    args = cifar.make_parser().parse_args('--learning-rate 0.3 --drop 0.2 --autoaugment'.split())
    assert (args.lr, args.drop_rate, args.auto_augment) == (0.3, 0.2, 'autoaugment')
    assert imagenet.make_parser().parse_args(['--auto-augment']).auto_augment == 'autoaugment'
    assert flags.with_todays_names({'autoaugment': True}) == {'auto_augment': 'autoaugment'}
    assert flags.with_todays_names({'autoaugment': False}) == {'auto_augment': None}


# A run that an earlier version began

def test_a_run_of_an_earlier_version_resumes_and_evaluates(monkeypatch, tmp_path, capsys):
    import pathlib
    shutil.copytree(pathlib.Path(__file__).parent / 'old_run', tmp_path / 'run')
    call(monkeypatch, cifar, f'-e --resume {tmp_path}/run/model_best.pth.tar')
    assert 'of epoch 4 | test loss 1.6930 top-1 35.00%' in capsys.readouterr().out
    assert read(tmp_path / 'run')['step'] > 0  # in the middle of its last epoch
    call(monkeypatch, cifar, f'--resume {tmp_path}/run/checkpoint.pth.tar')
    log = read_log(tmp_path / 'run/log.txt')
    assert log['Epoch'] == [1, 2, 3, 4, 5] and log['Train Loss'][-1] == pytest.approx(1.83427, rel=1e-3)
    assert log['Val Loss'][-1] == pytest.approx(1.61514, rel=1e-3) and log['Learning Rate'][-1] == 0.0359551
