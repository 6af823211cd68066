"""Edits of the loop, and commands given once more with a change: what they do to the numbers, and what is said."""
import json
import pathlib
import random
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import cifar
import compare
from helpers import broken_off, call, write_run
from utils import checkpoint, methods, output, resume
from utils.errors import UserError
from utils.eval import Meter
from utils.lab.runs import Flags
from utils.logger import read_log
from utils.parts import Batch, Parts

ROOT = pathlib.Path(__file__).parent.parent
# Of 80 images, so five steps an epoch.
RUN = '--dataset digits --arch lenet --epochs 2 --schedule 1 --train-batch 16 --lr 0.02 --test-every 1 --manualSeed 1'
pytestmark = pytest.mark.usefixtures('few_digits')


def read(folder):
    return torch.load(folder / output.LAST, weights_only=True)


def result(folder, name='result.json'):
    return json.loads((folder / name).read_text())


def at_each_step(monkeypatch, edit):
    """Let `edit(run, batch, step)` be called before each step; it may give another batch, or 'break' for after it."""
    steps = cifar.Run.steps

    def edited(run, epoch):
        for step, batch in steps(run, epoch):
            found = edit(run, batch, step)
            yield step, batch if found in (None, 'break') else found
            if found == 'break':
                break

    monkeypatch.setattr(cifar.Run, 'steps', edited)


def edited_fit(monkeypatch, before=lambda run: None, after=lambda run, epoch, trained, tested: None):
    """Let `before(run)` run before the epochs, and `after(...)` before `end_epoch`, as lines that one writes into fit.
    """
    epochs, end_epoch = cifar.Run.epochs, cifar.Run.end_epoch

    def begun(run):
        before(run)
        yield from epochs(run)

    def ended(run, *words):
        after(run, *words)
        end_epoch(run, *words)

    monkeypatch.setattr(cifar.Run, 'epochs', begun)
    monkeypatch.setattr(cifar.Run, 'end_epoch', ended)


# Edits of the loop

@pytest.mark.parametrize('script', ['cifar', 'imagenet'])
def test_a_test_between_two_steps_leaves_the_network_in_training(script):
    test = __import__(script).test
    frozen = torch.nn.BatchNorm1d(3).eval()
    network = torch.nn.Sequential(torch.nn.Flatten(), frozen, torch.nn.Linear(3, 2))
    args = cifar.make_parser().parse_args([])
    images = [(torch.zeros(2, 3, 1, 1), torch.zeros(2, dtype=torch.long))]

    class Two(list):
        num_classes, device = 2, torch.device('cpu')

    for mode in (True, False):
        network.train(mode)
        frozen.eval()
        test(Two(images), network, args)
        assert (network.training, network[2].training, frozen.training) == (mode, mode, False)


def test_an_epoch_that_the_loop_ends_early_is_ended_like_any_other(monkeypatch, tmp_path):
    """A break: --swa takes the weights, losses that are not finite are found, and the steps are those that were made.
    """
    at_each_step(monkeypatch, lambda run, batch, step: 'break' if step % 5 == 3 else None)
    call(monkeypatch, cifar, f'{RUN} --swa 0.4 -c {tmp_path}/a')
    assert read(tmp_path / 'a')['ema']['n_averaged'] == 2
    assert result(tmp_path / 'a')['steps'] == read(tmp_path / 'a')['steps'] == 8

    at_each_step(monkeypatch, lambda run, batch, step: 'break')  # after one step of each epoch
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/one')
    assert result(tmp_path / 'one')['steps'] == 2
    assert read_log(tmp_path / 'one/log.txt')['Learning Rate'] == [0.02, 0.002]

    def broken(run, batch, step):
        return 'break' if step == 3 else None if step else batch._replace(images=batch.images * torch.nan)

    at_each_step(monkeypatch, broken)
    with pytest.raises(UserError, match='the loss became nan in epoch 1, batch 1 of 5'):
        call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/b')


def test_a_flag_that_the_loop_sets_and_nothing_reads_is_told_once(monkeypatch, tmp_path, capfd):
    def edit(run, batch, step):
        if step == 1:
            run.args.label_smoothing, run.args.flood, run.args.clip_norm = 0.3, 0.1, None  # the last two are read
        run.args.own = torch.ones(2)  # no flag, and set again

    at_each_step(monkeypatch, edit)
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/a')
    assert [line for line in capfd.readouterr().out.splitlines() if 'the loop has set' in line] == [
        'the loop has set args.label_smoothing, which nothing has read since; what was made from it before the loop '
        'stays as it was']
    edited_fit(monkeypatch, after=lambda run, epoch, *_: setattr(run.args, 'mixup', 1.0 + epoch))
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/b')
    told = capfd.readouterr().out
    assert told.count('the loop has set args.mixup') == 1
    assert told.index('epoch 1/2 |') < told.index('the loop has set args.mixup') < told.index('epoch 2/2 |')


def test_a_batch_that_the_loop_skips_counts_as_one_without_images(monkeypatch, tmp_path):
    """Also in a checkpoint of the middle of an epoch, from which the run goes on."""
    steps, killed = cifar.Run.steps, []

    def edited(run, epoch):
        for step, batch in steps(run, epoch):
            if step == 6:
                continue
            if step == 9 and not killed:
                killed.append(step)
                raise KeyboardInterrupt
            yield step, batch

    monkeypatch.setattr(cifar.Run, 'steps', edited)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, cifar, f'{RUN} --checkpoint-every 3 -c {tmp_path}/a')
    call(monkeypatch, cifar, f'--resume {tmp_path}/a/checkpoint.pth.tar')
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/b')
    a, b = read(tmp_path / 'a')['state_dict'], read(tmp_path / 'b')['state_dict']
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_loop_that_counts_a_batch_twice_or_none_is_told(monkeypatch, tmp_path):
    update = Meter.update
    for changed, sentence in ((lambda *args: (update(*args), update(*args)), 'for each batch once, and the loop has'),
                              (lambda *args: None, 'can be read, or the loop leaves out meter.update')):
        monkeypatch.setattr(Meter, 'update', changed)
        with pytest.raises(UserError, match=sentence):
            call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/{len(sentence)}')
    monkeypatch.undo()
    meter, batch = Meter(1, 10, 'cpu'), (torch.zeros(2, 10), torch.zeros(2, dtype=torch.long), torch.tensor(1.0))
    meter.update(*batch)
    with pytest.raises(UserError, match='for each batch once'):
        meter.update(*batch)


def test_a_criterion_that_is_called_twice_on_one_pass_is_refused_if_it_looks_at_layers(monkeypatch, tmp_path):
    build = methods.build_criterion

    def twice(*args):
        criterion = build(*args)
        call_of = type(criterion).__call__
        twofold = type('Twofold', (type(criterion),), {'__call__': lambda self, *pair: call_of(self, *pair)
                                                       + call_of(self, *pair)})
        criterion.__class__ = twofold
        return criterion

    monkeypatch.setattr(methods, 'build_criterion', twice)
    call(monkeypatch, cifar, f'{RUN} --method dma -c {tmp_path}/without_layers')
    with pytest.raises(UserError, match='^the criterion needs the layers input of a forward pass .* once for each$'):
        call(monkeypatch, cifar, f'{RUN} --method large_margin -c {tmp_path}/a')


def test_an_average_of_the_script_is_tested_kept_and_resumed(monkeypatch, tmp_path):
    """As README has it: run.average, also for the epoch that validation chooses."""
    tested = []

    def with_average(run):
        run.average = torch.optim.swa_utils.AveragedModel(run.model).eval()
        if run.state.get('ema'):
            run.average.load_state_dict(run.state['ema'])

    def test(batches, model, args, meter=None, plain=cifar.test):
        tested.append(model)
        return plain(batches, model, args, meter)

    edited_fit(monkeypatch, before=with_average)
    monkeypatch.setattr(cifar, 'test', test)
    flags, plain_end = f'{RUN} --val-split 0.2', cifar.Run._end_steps

    def end_steps(run):
        if run.left is not None:
            run.average.update_parameters(run.model)
        plain_end(run)

    monkeypatch.setattr(cifar.Run, '_end_steps', end_steps)
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    assert len(tested) == 3 and all(model is tested[0] for model in tested)  # two epochs and the report
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    whole, parts = read(tmp_path / 'whole')['ema'], read(tmp_path / 'parts')['ema']
    assert whole['n_averaged'] == 2 and all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert result(tmp_path / 'whole')['test loss'] == result(tmp_path / 'parts')['test loss']


def test_a_head_is_told_once_of_each_step_of_an_optimizer_of_the_script(monkeypatch, tmp_path):
    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure=None):
            return self.inner.step(closure)

    class Bare:
        def __init__(self, inner):
            self.inner, self.param_groups, self.state_dict = inner, inner.param_groups, inner.state_dict

    build, flags = methods.build_optimizer, f'{RUN} --method lsoftmax --beta-schedule decay --beta 10 --beta-decay 0.8'

    def made(args, model, *rest, **more):
        return torch.optim.SGD(model.parameters(), lr=0.02) if rest == (5,) else build(args, model, *rest, **more)

    for name, edit in (('flags', build), ('own', made), ('around', lambda *args, **more: Around(build(*args, **more))),
                       ('own around', lambda *args, **more: Around(made(*args, **more)))):
        monkeypatch.setattr(methods, 'build_optimizer', edit)
        call(monkeypatch, cifar, f'{flags} -c "{tmp_path}/{name}"')
        assert read(tmp_path / name)['state_dict']['head.beta'].item() == pytest.approx(10 * 0.8 ** 10), name
    monkeypatch.setattr(methods, 'build_optimizer', lambda *args, **more: Bare(made(*args, **more)))
    with pytest.raises(UserError, match='^--method lsoftmax needs an optimizer that calls hooks .* and Bare '):
        call(monkeypatch, cifar, f'{flags} -c {tmp_path}/bare')


def test_an_optimizer_that_is_made_in_fit_is_refused(monkeypatch, tmp_path):
    """As checkpoints, averages and the log are of the one that the run was given."""
    train = cifar.train
    monkeypatch.setattr(cifar, 'train', lambda run, criterion, optimizer, *words: train(
        run, criterion, torch.optim.AdamW(run.model.parameters(), lr=1e-3), *words))
    with pytest.raises(UserError, match='^the optimizer that Run was given, SGD, has made no step in epoch 1; one of '):
        call(monkeypatch, cifar, f'{RUN} -c {tmp_path}')


def test_a_rate_that_schedule_apply_would_set_again_is_refused(monkeypatch, tmp_path):
    def after_an_epoch(run, *words):
        run.optimizer.param_groups[0]['lr'] *= 0.1

    def args_lr(run, *words):
        run.args.lr *= 0.1

    for edit, sentence in ((after_an_epoch, 'has set the learning rate to 0.002, and schedule.apply sets it again'),
                           (args_lr, 'has set args.lr to 0.002, which is read once')):
        with monkeypatch.context() as patch:
            edited_fit(patch, after=edit)
            with pytest.raises(UserError, match=sentence):
                call(patch, cifar, f'{RUN} -c {tmp_path}/{edit.__name__}')
    # Between schedule.apply and the step it is used, as the loop says.
    apply = cifar.schedule.apply

    def halved(optimizer, *words):
        apply(optimizer, *words)
        optimizer.param_groups[0]['lr'] *= 0.5

    monkeypatch.setattr(cifar.schedule, 'apply', halved)
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/halved')
    assert read_log(tmp_path / 'halved/log.txt')['Learning Rate'] == [0.01, 0.001]


def test_what_the_loop_adds_to_what_was_measured_does_not_shift_the_log(monkeypatch, tmp_path, capsys):
    edited_fit(monkeypatch, after=lambda run, epoch, trained, tested: trained.update({'Gradient': 1.0}) or tested.pop(
        'Top-5'))
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}')
    assert capsys.readouterr().out.count('log.txt has no column for Gradient') == 2
    log = read_log(tmp_path / 'log.txt')
    assert log['Test Loss'][-1] == pytest.approx(result(tmp_path)['test loss'], rel=1e-4)
    assert all(value != value for value in log['Test Top-5'])
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 3')


def test_what_the_run_keeps_in_state_is_not_overwritten_without_a_word(monkeypatch, tmp_path):
    for name in ('ema', 'optimizer', 'seconds'):
        with monkeypatch.context() as patch:
            edited_fit(patch, after=lambda run, *words: run.state.update({name: {'mine': 1}}))
            with pytest.raises(UserError, match=f"^state\\['{name}'\\] is the run's own, .* put yours under another "):
                call(patch, cifar, f'{RUN} -c {tmp_path}/{name}')


def test_a_checkpoint_of_the_script_in_the_middle_of_an_epoch_is_refused(monkeypatch, tmp_path):
    def saved(run, batch, step):
        if step == 7:
            run.save('step.pth.tar')

    with monkeypatch.context() as patch:
        at_each_step(patch, saved)
        with pytest.raises(UserError, match='^run.save."step.pth.tar". within an epoch would be resumed from its '):
            call(patch, cifar, f'{RUN} -c {tmp_path}')
    end_epoch = cifar.Run.end_epoch
    monkeypatch.setattr(cifar.Run, 'end_epoch', lambda run, epoch, *words: (
        end_epoch(run, epoch, *words), run.save(f'epoch{epoch}.pth.tar')))
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/after')
    assert torch.load(tmp_path / 'after/epoch0.pth.tar', weights_only=True)['epoch'] == 1


@pytest.mark.parametrize('flags', ['dma --method-start 0.5', 'ldam --deferred 0.5', 'amp',
                                   'large_margin lsoftmax --margin 2 --cross-entropy-weight 1 --clip-norm 1'])
def test_a_criterion_around_that_of_the_methods_is_told_or_refused(flags, monkeypatch, tmp_path):
    build, built = methods.build_criterion, []

    def around(told):
        def wrapped(args, *words):
            built.append(build(args, *words))
            criterion = lambda outputs, targets: built[-1](outputs, targets) + 0.0  # noqa: E731
            if told:
                criterion.before_step = built[-1].before_step
            return criterion
        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(cifar.methods, 'build_criterion', around(told=False))
        if 'lsoftmax' in flags or flags == 'amp':  # whose loss terms stay as they are; heads are told with the network
            call(patch, cifar, f'{RUN} --method {flags} -c {tmp_path}/a')
        else:
            with pytest.raises(UserError, match='give it that one\'s: criterion.before_step = built.before_step$'):
                call(patch, cifar, f'{RUN} --method {flags} -c {tmp_path}/a')
    with monkeypatch.context() as patch:
        patch.setattr(cifar.methods, 'build_criterion', around(told=True))
        call(patch, cifar, f'{RUN} --method {flags} -c {tmp_path}/b')
    call(monkeypatch, cifar, f'{RUN} --method {flags} -c {tmp_path}/plain')
    told, plain = (read(tmp_path / name)['state_dict'] for name in ('b', 'plain'))
    assert all(torch.equal(told[name], plain[name]) for name in told)


def test_the_noise_of_smoothout_goes_by_the_position_also_after_a_resume_with_another_batch(monkeypatch, tmp_path):
    steps = []
    noise = methods.METHODS['smoothout'].SmoothOut._add_noise

    def seen(optimizer):
        steps.append(optimizer.steps)
        noise(optimizer)

    monkeypatch.setattr(methods.METHODS['smoothout'].SmoothOut, '_add_noise', seen)
    call(monkeypatch, cifar, f'{RUN} --method smoothout --ss 0.01 --smoothing-type tanh -c {tmp_path}')
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --train-batch 40 --epochs 4')
    assert steps == [*range(10), 4, 5, 6, 7]  # of 10, then of 8


def test_batch_norm_of_a_head_has_statistics_for_the_mean_of_the_weights(monkeypatch, tmp_path):
    class Neck(torch.nn.Module):
        def __init__(self, in_features, num_classes):
            super().__init__()
            self.norm, self.linear = torch.nn.BatchNorm1d(in_features), torch.nn.Linear(in_features, num_classes)

        def forward(self, features):
            return self.linear(self.norm(features))

    @torch.no_grad()
    def check(run, *words):
        if run.averaging:
            norm, network = run.average.module.head.norm, run.average.module
            expected = torch.cat([network.features(images) for images, _ in run.batches['train']]).mean(dim=0)
            checked.append(torch.allclose(norm.running_mean, expected, rtol=1e-4) and norm.num_batches_tracked == 5)

    checked = []
    edited_fit(monkeypatch, after=check)
    monkeypatch.setitem(methods.METHODS, 'neck', types.SimpleNamespace(head=lambda args: Neck))
    call(monkeypatch, cifar, f'{RUN} --no-augment --method neck --swa 0.4 -c {tmp_path}')
    assert len(checked) == 2 and all(checked)


def test_a_single_image_that_the_loop_has_left_is_named_as_such(monkeypatch, tmp_path):
    at_each_step(monkeypatch, lambda run, batch, step: batch._replace(
        images=batch.images[:1], targets=batch.targets[:1], size=1))
    with pytest.raises(UserError, match='^BatchNorm cannot train on a single image, and a part of a batch has one, '):
        call(monkeypatch, cifar, f'{RUN.replace("lenet", "mlp")} -c {tmp_path}')


def test_a_test_of_the_run_between_two_steps_changes_nothing(monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{RUN} --swa 0.4 -c {tmp_path}/plain')
    at_each_step(monkeypatch, lambda run, batch, step: cifar.test(
        run.batches['test'], run.to_test, run.args, run.test_meter(step // 5)) and None)
    call(monkeypatch, cifar, f'{RUN} --swa 0.4 -c {tmp_path}/tested')
    plain, tested = read(tmp_path / 'plain'), read(tmp_path / 'tested')
    assert plain['ema']['n_averaged'] == tested['ema']['n_averaged'] == 2
    assert all(torch.equal(value, tested['state_dict'][name]) for name, value in plain['state_dict'].items())


def test_a_batch_that_the_loop_makes_longer_passes_whole(monkeypatch, tmp_path):
    at_each_step(monkeypatch, lambda run, batch, step: batch._replace(
        images=torch.cat([batch.images, batch.images[:1]]), targets=torch.cat([batch.targets, batch.targets[:1]])))
    seen = []
    forward = torch.nn.BatchNorm1d.forward

    def counted(module, x):
        if module.training:
            seen.append(len(x))
        return forward(module, x)

    monkeypatch.setattr(torch.nn.BatchNorm1d, 'forward', counted)
    call(monkeypatch, cifar, f'{RUN.replace("lenet", "mlp")} --epochs 1 --schedule 0 -c {tmp_path}')
    assert seen.count(17) and seen.count(17) % 5 == 0 and {*seen} <= {17, 2}  # of two blank images, before it begins


@pytest.mark.parametrize('words, made', [
    ('', lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5)), ('', lambda p: torch.optim.SGD([
        {'params': [next(p)], 'lr': 0.3}, {'params': list(p)}], lr=0.02, momentum=0.9, weight_decay=5e-4)),
    ('', lambda p: methods.METHODS['amp'].AMP(p, lr=0.02, epsilon=0.1, momentum=0.9, weight_decay=5e-4)),
    ('--nesterov', lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4)),
    ('--optimizer AdamW', lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.5, 0.9)))])
def test_an_optimizer_of_the_script_is_not_folded_with_that_of_the_flags(words, made, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{RUN} --epochs 1 --schedule 0 {words} -c {tmp_path}/plain')
    build = methods.build_optimizer
    monkeypatch.setattr(cifar.methods, 'build_optimizer', lambda args, model, steps_per_epoch, parameters=None:
                        made(model.parameters()) if steps_per_epoch == 5 else build(args, model, steps_per_epoch,
                                                                                   parameters))
    call(monkeypatch, cifar, f'{RUN} --epochs 1 --schedule 0 {words} -c {tmp_path}/own')
    plain, own = (result(tmp_path / name, 'args.json') for name in ('plain', 'own'))
    assert plain['optimizer options'] == '' != own['optimizer options']
    assert Flags().setting(plain) != Flags().setting(own)


def test_what_python_and_numpy_draw_in_the_loop_is_seeded_and_goes_on_after_a_resume(monkeypatch, tmp_path):
    drawn = []
    at_each_step(monkeypatch, lambda run, batch, step: drawn.append(
        (step, random.random(), np.random.beta(1, 1))))
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/whole')
    whole, drawn[:] = [*drawn], []
    broken_off(monkeypatch, f'{RUN} -c {tmp_path}/parts', epoch=1)
    np.random.seed(5), random.seed(5)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    assert drawn == whole and len(set(whole)) == 10
    state = checkpoint.random_state()
    checkpoint.set_random_state({name: state[name] for name in ('cpu', 'cuda')})  # of an earlier version


def test_a_scheduler_of_torch_goes_on_after_a_resume_as_readme_keeps_it(monkeypatch, tmp_path):
    """In the middle of an epoch, with one that goes by the number of the epoch alone."""
    held = {}

    def begun(run):
        scheduler = held['scheduler'] = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda epoch: 1 / (1 + epoch))
        if 'scheduler' in run.state:
            scheduler.load_state_dict(run.state['scheduler'])
            for group, rate in zip(run.optimizer.param_groups, scheduler.get_last_lr()):
                group['lr'] = rate

    def ended(run, *words):
        held['scheduler'].step()
        run.state['scheduler'] = held['scheduler'].state_dict()

    monkeypatch.setattr(cifar.schedule, 'apply', lambda *words: None)
    edited_fit(monkeypatch, begun, ended)
    call(monkeypatch, cifar, f'{RUN} --epochs 3 -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{RUN} --epochs 3 -c {tmp_path}/parts', epoch=2)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    rates = [read_log(tmp_path / name / 'log.txt')['Learning Rate'] for name in ('whole', 'parts')]
    assert rates[0] == rates[1] == pytest.approx([0.02, 0.01, 0.02 / 3], rel=1e-4)
    whole, parts = (read(tmp_path / name)['state_dict'] for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize('part', ['strength', 'begins', 'first_values', 'by_position'])
def test_a_methods_value_error_is_a_sentence_whatever_was_asked(part, monkeypatch, tmp_path):
    def refuse(args):
        raise ValueError('--own-coef must be a whole number of moons')

    def add_arguments(parser):
        parser.add_argument('--own-coef', type=float, default=0.1)

    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}')
    own = types.SimpleNamespace(add_arguments=add_arguments, loss_term=lambda args: lambda *_: 0.0, **{part: refuse})
    monkeypatch.setitem(methods.METHODS, 'own', own)
    with pytest.raises(UserError, match='^--own-coef must be a whole number of moons$'):
        call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --method own --epochs 3')


@pytest.mark.parametrize('loss_term', [
    lambda args, class_counts: lambda *_: class_counts, lambda class_counts: lambda *_: class_counts,
    lambda args, model, class_counts: lambda *_: class_counts])
def test_class_counts_are_given_under_their_name(loss_term, monkeypatch):
    monkeypatch.setitem(methods.METHODS, 'own', types.SimpleNamespace(loss_term=loss_term))
    assert methods._loss_term(None, 'own', None, [3, 4])() == [3, 4]


@pytest.mark.parametrize('fraction, images, expected', [
    (0.28, 100, 28), (0.56, 50, 28), (0.14, 100, 14), (0.07, 200, 14), (0.281, 100, 30), (0.001, 100, 2), (0.5, 3, 2),
    (1e-12, 9, 2)])
def test_the_share_of_a_batch_that_climbs_is_not_rounded_twice(fraction, images, expected):
    args = types.SimpleNamespace(adversarial=None, mini_batch=None, train_batch=images, batch_multiplier=1)
    for local in (False, True):
        optimizer = types.SimpleNamespace(pass_fraction=fraction, local_pass=local)
        parts = Parts(torch.nn.Linear(1, 1), optimizer, args)
        batch, = parts.of(Batch(torch.zeros(images, 3, 1, 1), torch.zeros(images), images))
        assert len(batch[0]) == expected and batch[2] == 1


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write_run(tmp_path / 'a')
    command = f'{shlex.quote(sys.executable)} compare.py {shlex.quote(str(tmp_path))} | head -n 0; '
    command += 'echo ${PIPESTATUS[0]}'
    done = subprocess.run(['bash', '-c', command], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == ('141\n', '')


# The same command once more

def test_auto_refuses_a_command_that_says_less_or_other_than_the_run(monkeypatch, tmp_path, capsys):
    def refused(words):
        with pytest.raises(SystemExit):
            call(monkeypatch, cifar, words)
        return capsys.readouterr().err

    flags = f'{RUN} -c {tmp_path} --resume auto'
    broken_off(monkeypatch, f'{flags} --method dma --coef 0.5 --label-smoothing 0.3', epoch=1)
    assert 'which has --label-smoothing 0.3, and this command has not' in refused(f'{flags} --method dma --coef 0.5')
    assert 'which has --dma-coef 0.5, not 0.9' in refused(f'{flags} --method dma --coef 0.9 --label-smoothing 0.3')
    assert 'which has --method dma, and this command has not' in refused(f'{flags} --label-smoothing 0.3')
    call(monkeypatch, cifar, f'{flags} --method dma --coef 0.5 --label-smoothing 0.3')
    call(monkeypatch, cifar, f'{flags} --method dma --dma-coef 0.5 --label-smoothing 0.3')  # the same in other words
    held = result(tmp_path, 'args.json')
    assert held['changes'] == [] and held['dma_coef'] == 0.5
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --method amp --epochs 3')
    call(monkeypatch, cifar, f'{flags} --method amp --epochs 3 --label-smoothing 0.3')  # without the flags of DMA
    capsys.readouterr()


def test_a_finished_run_is_not_given_flags_that_nothing_was_trained_with(monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{RUN} --method dma -c {tmp_path}')
    before = (tmp_path / 'args.json').read_bytes()
    for flags, words in (('--coef 3', 'dma-coef 0.5 -> 3.0'), ('--lr 0.5', 'another learning rate')):
        with pytest.raises(UserError, match=f'has its 2 epochs behind it, so that nothing .* with {words}; give a'):
            call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar {flags}')
        assert (tmp_path / 'args.json').read_bytes() == before
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --coef 3 --epochs 3')
    assert result(tmp_path, 'args.json')['changes'] == ['after epoch 2: dma-coef 0.5 -> 3.0']


@pytest.mark.parametrize('flags, goes_by_it', [
    ('', False), ('--swa 0.5', True), ('--method dma', False), ('--method dma --method-start 0.5', True),
    ('--method amp --method-ramp 0.5', True), ('--method lsoftmax', True), ('--method lsoftmax --margin 1', False),
    ('--method lsoftmax --beta-schedule decay', False), ('--method ldam', True), ('--method ldam --deferred 1', False),
    ('--method arcface', False), ('--method smoothout', False), ('--method smoothout --smoothing-type tanh', True),
    ('--method smoothout --smoothing-type anneal', False)])
def test_a_longer_training_is_another_one_for_what_goes_by_its_share(flags, goes_by_it, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *shlex.split(f'{RUN} {flags}')])
    assert resume.by_position(cifar.parse_arguments()[0]) is goes_by_it


def test_a_run_that_was_made_longer_says_so_where_that_matters(monkeypatch, tmp_path):
    for name, flags, changes in (('plain', '', []), ('swa', '--swa 0.4', ['after epoch 2: epochs 2 -> 4'])):
        call(monkeypatch, cifar, f'{RUN} {flags} -c {tmp_path}/{name}')
        call(monkeypatch, cifar, f'--resume {tmp_path}/{name}/checkpoint.pth.tar --epochs 4')
        assert result(tmp_path / name, 'args.json')['changes'] == changes


def test_another_rate_in_the_middle_of_an_epoch_is_a_change_and_not_that_of_the_log(monkeypatch, tmp_path):
    def killed(run, batch, step):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_each_step(patch, killed)
        call(patch, cifar, f'{RUN} --checkpoint-every 1 -c {tmp_path}')
    assert (read(tmp_path)['step'], read(tmp_path)['rate']) == (3, 0.02)
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --lr 0.001')
    assert result(tmp_path, 'args.json')['changes'] == ['after epoch 0 and 3 batches: another learning rate']
    assert read_log(tmp_path / 'log.txt')['Learning Rate'] == [0.02, pytest.approx(0.0001)]


def test_seconds_are_told_only_where_all_are_known(monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{RUN} -c {tmp_path}/a')
    assert result(tmp_path / 'a')['seconds'] > 0
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / output.LAST).write_bytes((tmp_path / 'a' / output.LAST).read_bytes())
    call(monkeypatch, cifar, f'--resume {tmp_path}/b/checkpoint.pth.tar --epochs 3')
    assert result(tmp_path / 'b')['seconds'] is None and result(tmp_path / 'b')['seconds per epoch'] > 0
    monkeypatch.setattr(sys, 'argv', ['compare.py', str(tmp_path / 'b')])
    compare.main()
    assert 'broken' not in capsys.readouterr().out
