import argparse
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image
from torch import nn

import cifar
from helpers import refused
from utils import checkpoint, datasets, methods
from utils.batches import mean_and_std
from utils.errors import UserError
from utils.logger import read_log

ROOT = pathlib.Path(__file__).parent.parent
# A small network with dropout, so that PyTorch's own random state matters, on data that needs no download.
RUN = '--dataset digits --arch densenet --depth 10 --growthRate 4 --drop 0.2 --method dma --epochs 4 ' \
      '--lr-schedule cosine ' \
      '--train-fraction 0.2 --test-every 1 --manualSeed 123 --deterministic'


def start(flags, **options):
    return subprocess.Popen([sys.executable, 'cifar.py', *shlex.split(flags)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **options)


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stdout + stderr
    return stdout


def call(monkeypatch, flags):
    """main() in this process, which saves the seconds that importing PyTorch takes."""
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *shlex.split(flags)])
    cifar.main()


def tensors(value, path=''):
    """Every tensor and number in a checkpoint, by its path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {path: value}
    return {key: leaf for name, part in value for key, leaf in tensors(part, f'{path}/{name}').items()}


def assert_same_run(folder, reference):
    for name in ('checkpoint.pth.tar', 'model_best.pth.tar'):
        ours, theirs = (tensors(torch.load(os.path.join(path, name), weights_only=True)) for path
                        in (folder, reference))
        assert ours.keys() == theirs.keys() and len(ours) > 100
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    logs = [[line.split('\t')[:-1] for line in pathlib.Path(path, 'log.txt').read_text().splitlines()] for path
            in (folder, reference)]
    assert logs[0] == logs[1] and len(logs[0]) == 5


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('runs') / 'reference')
    finish(start(f'{RUN} --checkpoint {folder}'))
    return folder


# Exactness

def test_the_same_seed_gives_the_same_bits(reference, monkeypatch, tmp_path):
    finish(start(f'{RUN} --checkpoint {tmp_path}/again'))
    assert_same_run(f'{tmp_path}/again', reference)
    other = torch.load(f'{reference}/checkpoint.pth.tar', weights_only=True)
    call(monkeypatch, f'{RUN} --manualSeed 124 --checkpoint {tmp_path}/other')
    different = torch.load(f'{tmp_path}/other/checkpoint.pth.tar', weights_only=True)
    assert not torch.equal(different['state_dict']['head.weight'], other['state_dict']['head.weight'])


@pytest.mark.parametrize('kill, epochs_done', [(signal.SIGKILL, 0), (signal.SIGKILL, 2), (signal.SIGINT, 1),
                                               (signal.SIGTERM, 2)])
def test_stopped_in_the_middle_of_an_epoch_and_resumed(kill, epochs_done, reference, monkeypatch, tmp_path):
    folder = tmp_path / 'a run'
    process = start(f'{RUN} --checkpoint {shlex.quote(str(folder))}')
    path = folder / 'checkpoint.pth.tar'
    while not path.exists() or torch.load(path)['epoch'] < epochs_done:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(kill)
    _, stderr = process.communicate(timeout=60)
    resume = f'--resume {shlex.quote(str(folder / "checkpoint.pth.tar"))}'
    if kill == signal.SIGKILL:
        assert process.returncode == -kill
    else:
        assert process.returncode == 128 + kill
        assert f'Resume with: python cifar.py {resume}' in stderr and 'Traceback' not in stderr
    assert torch.load(folder / 'checkpoint.pth.tar', weights_only=True)['epoch'] < 4
    call(monkeypatch, resume)
    assert_same_run(folder, reference)


def test_rows_of_epochs_that_no_checkpoint_has_are_dropped(monkeypatch, tmp_path):
    folder = tmp_path / 'run'
    call(monkeypatch, f'{RUN} --epochs 2 --schedule 1 --lr-schedule step --checkpoint {folder}')
    rows = (folder / 'log.txt').read_text()
    (folder / 'log.txt').write_text(rows + '3\t0.1\t9\t9\t9\t9\t9\t9\t9\n4\t0.')
    call(monkeypatch, f'--resume {folder}/checkpoint.pth.tar --epochs 3')
    resumed = (folder / 'log.txt').read_text()
    assert resumed.startswith(rows) and resumed.count('\n') == rows.count('\n') + 1 and '\t9\t' not in resumed


@pytest.mark.parametrize('where', ['run', 'fork'])
def test_a_best_epoch_of_later_is_none_of_a_run_that_goes_on_from_earlier(where, monkeypatch, tmp_path, capsys):
    """As where a copy of an earlier checkpoint was kept, and the run is resumed from it, in its folder or another."""
    last, best = (tmp_path / 'run' / name for name in ('checkpoint.pth.tar', 'model_best.pth.tar'))
    call(monkeypatch, f'-d digits -a mlp --epochs 2 --lr 0.1 --train-fraction 0.2 --val-split 0.2 -c {last.parent}')
    early = torch.load(last, weights_only=True)
    checkpoint.save(str(best), early | {'epoch': 9, 'best': {'top1': 100.0, 'epoch': 9}})
    with pytest.raises(UserError, match='model_best.pth.tar is of epoch 9, which .* of epoch 2 does not know; no '):
        call(monkeypatch, f'--resume {last}')
    call(monkeypatch, f'--resume {last} --epochs 3 -c {tmp_path / where}')
    assert f'{best} is of epoch 9, which {last} of epoch 2 does not know' in capsys.readouterr().out
    result = json.loads((tmp_path / where / 'result.json').read_text())
    assert result['epoch'] == result['best']['epoch'] == 3 and result['best']['top1'] < 100
    if where == 'fork':
        assert torch.load(best, weights_only=True)['epoch'] == 9
    best.write_bytes(best.read_bytes()[:-1000])
    with pytest.raises(UserError, match='move it away, and the best epoch is looked for from epoch 4 on' if where ==
                       'run' else 'from epoch 3 on'):
        call(monkeypatch, f'--resume {last} --epochs 4 -c {tmp_path}/other')


# The command line

def test_a_run_prints_and_writes_what_it_promises(reference, monkeypatch, capsys):
    call(monkeypatch, f'--resume {reference}/checkpoint.pth.tar')  # a finished run: only the result is told again
    printed = capsys.readouterr()
    assert 'arch densenet, depth 10' in printed.out
    assert 'million parameters' in printed.out and 'method: dma' in printed.out
    assert re.search(r'epoch 4 \| test loss \d.* top-1 \d.*% top-5 .*\| best test epoch \d: ', printed.out)
    for name in ('log.txt', 'log.png', 'log.pdf', 'checkpoint.pth.tar', 'model_best.pth.tar', 'result.json',
                 'args.json'):
        assert os.path.getsize(f'{reference}/{name}') > 0
        assert f'{reference}/{name}' in printed.out or name == 'args.json'
    assert '\r' not in printed.err
    log, result = read_log(f'{reference}/log.txt'), json.load(open(f'{reference}/result.json'))
    assert log['Epoch'] == [1, 2, 3, 4] and log['Test Top-1'][-1] == pytest.approx(result['test top-1'], rel=1e-5)
    assert result['best']['top1'] == pytest.approx(max(log['Test Top-1']), rel=1e-5)
    args = json.load(open(f'{reference}/args.json'))
    assert args['arch'] == 'densenet' and args['dma_coef'] == 0.5 and args['seed'] == 123


def test_evaluate_reads_the_checkpoint_and_writes_nothing(reference, monkeypatch, capsys):
    before = sorted((file.name, file.stat().st_mtime_ns) for file in pathlib.Path(reference).iterdir())
    call(monkeypatch, f'-e --resume {reference}/model_best.pth.tar')
    best = json.load(open(f'{reference}/result.json'))['best']
    assert f'of epoch {best["epoch"]} | test loss' in (out := capsys.readouterr().out)
    assert f'top-1 {best["top1"]:.2f}%' in out
    assert sorted((file.name, file.stat().st_mtime_ns) for file in pathlib.Path(reference).iterdir()) == before


def test_validation_chooses_the_epoch_and_the_test_set_is_read_once(monkeypatch, tmp_path, capsys):
    calls, test = [], cifar.test
    monkeypatch.setattr(cifar, 'test', lambda batches, *rest: calls.append(len(batches.labels)) or test(batches, *rest))
    call(monkeypatch, f'-d digits --depth 8 --epochs 3 --lr-schedule onecycle --val-split 0.1 -c {tmp_path}')
    assert calls == [142, 142, 142, 360]  # a tenth of each class
    log, result = read_log(f'{tmp_path}/log.txt'), json.load(open(f'{tmp_path}/result.json'))
    assert 'Val Top-1' in log and not any(column.startswith('Test') for column in log)
    assert result['epoch'] == log['Val Top-1'].index(max(log['Val Top-1'])) + 1 and result['chosen by'] == 'validation'
    assert 'chosen by validation' in capsys.readouterr().out


@pytest.mark.parametrize('epochs, schedule', [(1, []), (2, [1]), (3, [1, 2]), (4, [2, 3]), (300, [150, 225])])
def test_milestones_left_open_are_at_half_and_three_quarters(epochs, schedule, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', '--epochs', str(epochs)])
    assert cifar.parse_arguments()[0].schedule == schedule


def test_start_epoch_begins_the_schedule_there(monkeypatch, tmp_path):
    call(monkeypatch, f'-d digits --depth 8 --epochs 4 --schedule 2 --start-epoch 3 --train-fraction 0.2 -c {tmp_path}')
    log = read_log(f'{tmp_path}/log.txt')
    assert log['Epoch'] == [4] and log['Learning Rate'] == [pytest.approx(0.01)]


def test_resuming_into_another_folder_leaves_the_first_alone(reference, monkeypatch, tmp_path):
    before = pathlib.Path(reference, 'checkpoint.pth.tar').read_bytes()
    call(monkeypatch, f'--resume {reference}/checkpoint.pth.tar --epochs 5 --lr 0.01 -c {tmp_path}/fork')
    assert pathlib.Path(reference, 'checkpoint.pth.tar').read_bytes() == before
    assert read_log(f'{tmp_path}/fork/log.txt')['Epoch'] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize('flags', ['--precision bf16 --clip-norm 1 --nesterov --warmup 0.5', '--arch alexnet --lr 0.01',
                                   '--lr-schedule onecycle --method dma --dma_coef 0.1', '--momentum 0 --wd 0'])
def test_other_flags_train_too(flags, monkeypatch, tmp_path):
    depth = '' if 'alexnet' in flags else '--depth 8'
    call(monkeypatch, f'-d digits {depth} --epochs 1 --train-fraction 0.2 -c {tmp_path} {flags}')
    assert math.isfinite(read_log(f'{tmp_path}/log.txt')['Train Loss'][0])


def test_clip_norm_bounds_the_gradient(monkeypatch, tmp_path):
    norms, step = [], torch.optim.SGD.step

    def recording(self, closure):
        result = step(self, closure)
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group['params']]).norm().item())
        return result

    monkeypatch.setattr(torch.optim.SGD, 'step', recording)
    call(monkeypatch, f'-d digits --depth 8 --epochs 1 -c {tmp_path} --clip-norm 0.05')
    assert len(norms) == 12 and max(norms) <= 0.0501


def test_it_learns(monkeypatch, tmp_path):
    call(monkeypatch, '-d digits --depth 8 --epochs 6 --lr-schedule onecycle --train-batch 32 --manualSeed 0 '
                      '--method dma '
                      f'--coef 0.5 -c {tmp_path}')
    log = read_log(f'{tmp_path}/log.txt')
    assert log['Test Top-1'][-1] > 95 and log['Train Loss'][-1] < log['Train Loss'][0]


def test_a_folder_of_64_pixel_images_end_to_end(monkeypatch, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for part in ('train', 'test'):
        for name, level in (('bright', 200), ('dark', 50)):
            os.makedirs(tmp_path / part / name)
            for index in range(8):
                pixels = level + torch.randint(50, (64, 64, 3), generator=generator).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f'{index}.jpg')
    flags = f'-d folder --data {tmp_path} --image-size 64 -j 2 --depth 8 --epochs 3 --train-batch 8 -c {tmp_path}/run'
    call(monkeypatch, flags)
    assert set(read_log(f'{tmp_path}/run/log.txt')) == {'Epoch', 'Learning Rate', 'Train Loss', 'Train Top-1',
                                                        'Test Loss',
                                                        'Test Top-1', 'Seconds'}  # two classes: no top-5
    state = torch.load(f'{tmp_path}/run/checkpoint.pth.tar', weights_only=True)
    split = datasets.load('folder', str(tmp_path), 'train', 64)
    assert (state['mean'], state['std']) == mean_and_std(split.images) and state['classes'] == ['bright', 'dark']
    call(monkeypatch, f'-e --resume {tmp_path}/run/checkpoint.pth.tar')  # the folder and its image size are remembered


# What goes wrong

def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch, tmp_path):
    with pytest.raises(UserError) as error:
        call(monkeypatch, f'-d digits --depth 8 --epochs 2 --lr 1e30 -c {tmp_path}/run')
    assert re.search(r'the loss became (nan|inf) in epoch 1, batch \d+ of 12, at learning rate 1e\+30',
                     str(error.value))
    state = torch.load(f'{tmp_path}/run/checkpoint.pth.tar', weights_only=True)
    assert state['epoch'] == 0 and all(value.isfinite().all() for value in state['state_dict'].values())


@pytest.mark.parametrize('flags, sentence', [
    ('--arch resnet21', "invalid choice: 'resnet21'"), ('--method dmaa', "invalid choice: 'dmaa'"),
    ('--lr -0.1', 'of at least 0'),
    ('--epochs 100 --schedule 50 150', '--schedule 50 150 goes past the last epoch; --epochs is 100'),
    ('--coef 0.5', '--method (none) has none'),
    ('--dma-coef 0.5', '--dma-coef is a flag of --method dma, which is not selected'),
    ('--method dma dma', 'names dma twice'), ('--train-batch 50001', 'larger than the training set of 50000 images'),
    ('--depth 21', '20 and 26'), ('--val-split 1.5', 'at most 0.9'),
    ('--widen-factor 2', '--widen-factor is not used by --arch resnet'),
    ('--arch vgg16 --drop 0.1', '--drop is not used'),
    ('--image-size 64', '--image-size is for --dataset folder'), ('--workers 2', '--workers is for --dataset folder'),
    ('-d digits --data x', '--data is not used by --dataset digits'),
    ('--gamma 0.5 --lr-schedule cosine', '--gamma belongs'),
    ('--schedule 2 --lr-schedule onecycle', '--schedule belongs'), ('--warmup 400', 'longer than the whole training'),
    ('--nesterov --momentum 0', '--nesterov needs'), ('--evaluate', 'needs --resume'),
    ('--start-epoch 300', 'nothing to train'),
    ('--resume nowhere.pth.tar', 'there is no checkpoint nowhere.pth.tar'),
    ('-d folder --data /nowhere', 'no folder /nowhere/train'),
    ('--gpu-id 0,1', '--gpu-id: must be one CUDA device, such as 0 (torchrun uses several), was given 0,1'),
    ('--manualSeed -1', 'of at least 0'),
    ('--manualSeed 4294967296', 'at most'), ('--method dma --coef 1 --dma-coef 2', 'the same weight'),
    ('--val-split 1', 'at most 0.9'),
    ('--method dma --coef nan', 'was given nan'), ('-a densenet --compressionRate 1e9', 'leaves none'),
    ('--resume .', 'is a folder'),
    ('-d folder --image-size 16', 'of at least 32'),
    ('--method amp --inner-lr 0 --perturbation global', '--perturbation does nothing with --inner-lr 0'),
    ('--method smoothout --ss 0 --adapt-type filter', '--adapt-type does nothing with --ss 0, which is plain SGD'),
    ('--method large_margin --coef 0 --cross-entropy-weight 1 --norm inf', '--norm does nothing with --large-margin-'),
    ('--method lsoftmax --beta 0 --beta-gamma 3', '--beta-gamma does nothing with --beta 0, which stays 0'),
])
def test_wrong_flags_are_refused_before_any_data_is_loaded(flags, sentence, monkeypatch, tmp_path, capsys):
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags)
    assert not list(tmp_path.rglob('*.*'))


def test_a_batch_larger_than_what_the_conditions_leave_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError) as error:
        call(monkeypatch, f'-d digits --val-split 0.5 --train-fraction 0.5 --train-batch 400 -c {tmp_path}')
    assert re.fullmatch('--train-batch 400 is larger than the training set of 3[56][0-9] images that --val-split 0.5 '
                        'and '
                        '--train-fraction 0.5 leaves', str(error.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, sentence', [
    ('--epochs 3', 'less than the 4'), ('--manualSeed 5', '--manualSeed cannot change'),
    ('--val-split 0.1', '--val-split cannot change'),
    ('--start-epoch 1', '--start-epoch is where a new run begins'), ('--arch vgg16', 'holds the architecture densenet'),
    ('-e --lr 0.1', 'not used by --evaluate'),
    ('-e --compile', '--compile is not used by --evaluate'),
    ('--depth 16 -c fork', 'holds depth 10, but depth 16 was asked for'),
    ('-d cifar100 -c fork', 'num_classes 10, but num_classes 100'),
])
def test_what_contradicts_the_checkpoint_is_refused(flags, sentence, reference, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    with pytest.raises((SystemExit, UserError)) as error:
        call(monkeypatch, f'--resume {reference}/checkpoint.pth.tar {flags}')
    assert sentence in capsys.readouterr().err + str(error.value)


def test_other_classes_of_the_same_number_are_refused(reference, monkeypatch):
    load = datasets.load
    monkeypatch.setattr(datasets, 'load', lambda *args: load(*args)._replace(classes=list('abcdefghij')))
    with pytest.raises(UserError, match='knows the classes 0 1 2 .* but digits has a b c'):
        call(monkeypatch, f'-e --resume {reference}/checkpoint.pth.tar')


def test_flags_given_when_resuming_win_and_derived_ones_are_derived_anew(monkeypatch, tmp_path):
    call(monkeypatch, f'-d digits --depth 8 --epochs 2 --train-fraction 0.2 --method dma --coef 0.5 -c {tmp_path}/a')
    call(monkeypatch, f'--resume {tmp_path}/a/checkpoint.pth.tar --epochs 4 --momentum 0.5 --nesterov --dma-coef 0.1')
    args = json.load(open(f'{tmp_path}/a/args.json'))
    assert (args['epochs'], args['schedule'], args['momentum'], args['dma_coef']) == (4, [2, 3], 0.5, 0.1)
    group, = torch.load(f'{tmp_path}/a/checkpoint.pth.tar', weights_only=True)['optimizer']['param_groups']
    assert group['momentum'] == 0.5 and group['nesterov']
    call(monkeypatch, f'--resume {tmp_path}/a/checkpoint.pth.tar --epochs 5')
    assert json.load(open(f'{tmp_path}/a/args.json'))['dma_coef'] == 0.1


def test_a_fork_takes_the_best_epoch_along(monkeypatch, tmp_path):
    call(monkeypatch, f'-d digits --depth 8 --epochs 2 --val-split 0.1 --train-fraction 0.3 -c {tmp_path}/a')
    call(monkeypatch, f'--resume {tmp_path}/a/checkpoint.pth.tar -c {tmp_path}/b')
    results = [json.load(open(f'{tmp_path}/{name}/result.json')) for name in 'ab']
    assert results[0] == results[1]


def test_overwriting_begins_only_when_the_new_run_can(monkeypatch, tmp_path):
    call(monkeypatch, f'-d digits --depth 8 --epochs 1 --train-fraction 0.2 -c {tmp_path}')
    before = (tmp_path / 'checkpoint.pth.tar').read_bytes()
    for flags in ('-d folder --data /nowhere', '--depth 9', '-d digits --train-batch 9999'):
        with pytest.raises((SystemExit, UserError)):
            call(monkeypatch, f'{flags} --overwrite -c {tmp_path}')
    assert (tmp_path / 'checkpoint.pth.tar').read_bytes() == before
    call(monkeypatch, f'-d digits --depth 8 --epochs 1 --train-fraction 0.2 --overwrite -c {tmp_path}')
    assert (tmp_path / 'checkpoint.pth.tar').read_bytes() != before


def test_a_mistake_ends_with_one_sentence_and_status_1_not_a_traceback(reference, monkeypatch, tmp_path):
    cut = tmp_path / 'cut.pth.tar'
    cut.write_bytes(pathlib.Path(reference, 'checkpoint.pth.tar').read_bytes()[:-1000])
    process = start(f'--resume {cut}')
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.startswith('error: ') and stderr.count('\n') == 1
    for flags in (f'--resume {reference}/checkpoint.pth.tar --arch vgg16', f'-d digits --checkpoint {reference}',
                  f'--resume {reference}/model_best.pth.tar --epochs 9'):
        with pytest.raises(UserError) as error:
            call(monkeypatch, flags)
        assert '\n' not in str(error.value)


def test_the_users_command_without_a_network_or_data(tmp_path):
    command = [sys.executable, str(ROOT / 'cifar.py'), '--arch', 'resnet', '--method', 'dma', '--coef', '0.5']
    offline = {**os.environ, **dict.fromkeys(('http_proxy', 'https_proxy'), 'http://127.0.0.1:9'), 'no_proxy': ''}
    result = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and 'cifar-10-python.tar.gz' in result.stderr
    assert 'python cifar.py --dataset digits' in result.stderr and os.listdir(tmp_path / 'data') == []


# Methods

class Scaled(nn.Linear):
    def forward(self, x, targets=None):
        assert (targets is not None) == self.training
        return super().forward(x)


class TwiceSGD(torch.optim.SGD):
    def step(self, closure):
        with torch.enable_grad():
            closure()
        return super().step(closure)


def a_method(**parts):
    return types.SimpleNamespace(add_arguments=lambda parser: parser.add_argument('--sixth-coef', type=float,
                                                                                  default=1.0), **parts)


def test_a_sixth_method_is_one_file_and_one_line(monkeypatch, tmp_path):
    seen = []

    monkeypatch.setitem(methods.METHODS, 'sixth',
                        a_method(head=lambda args: Scaled, loss_term=lambda args: lambda o, t, a:
                                                           seen.append(args.sixth_coef) or 0.0,
                                                           optimizer=lambda *args: TwiceSGD))
    call(monkeypatch, f'-d digits --depth 8 --epochs 1 --train-fraction 0.3 --method sixth --coef 3 -c {tmp_path}')
    assert seen == [3.0] * 9  # a rehearsal, and four steps of two closures each


def test_two_heads_or_two_optimizers_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, 'sixth', a_method(head=lambda args: Scaled, loss_term=lambda args: None))
    monkeypatch.setitem(methods.METHODS, 'seventh', types.SimpleNamespace(add_arguments=lambda parser: None))
    with pytest.raises(SystemExit):
        call(monkeypatch, '--method dma sixth')
    assert 'dma and sixth cannot combine: each brings its own head' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, '--method seventh --coef 1')
    assert '--method seventh has none' in capsys.readouterr().err


def test_the_total_loss_is_cross_entropy_plus_coef_times_dma():
    from dma import dma_loss
    criterion = methods.build_criterion(argparse.Namespace(method=['dma'], dma_coef=0.3, label_smoothing=0.0),
                                        model=None)
    outputs, targets = (torch.randn(4, 3), torch.rand(4, 3)), torch.tensor([0, 1, 2, 0])
    expected = nn.functional.cross_entropy(outputs[0], targets) + 0.3 * dma_loss(outputs[1])
    torch.testing.assert_close(criterion(outputs, targets), expected)
    plain = methods.build_criterion(argparse.Namespace(method=[], label_smoothing=0.0), model=None)
    torch.testing.assert_close(plain(outputs[0], targets), nn.functional.cross_entropy(outputs[0], targets))
