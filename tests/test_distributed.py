"""Two processes on the CPU, started by torchrun as a user does: the same results as one, a worker that is killed, who
speaks.
"""
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import imagenet
from helpers import call, refused
from utils import distributed
from utils.logger import read_log

ROOT = pathlib.Path(__file__).parent.parent
# it has dropout
NETWORK = '--arch mobilenet_v3_small --image-size 32 --train-batch 8 --test-batch 4 --lr 0.01 -j 0 --manualSeed 4'

LOOPBACK = {'GLOO_SOCKET_IFNAME': 'lo'} if sys.platform == 'linux' else {}  # whatever the name of this machine leads to


def start(processes, script, flags='', options=''):
    command = [sys.executable, *(['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}',
                                  *shlex.split(options)]
                                 if processes else []), script, *shlex.split(flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.DEVNULL,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **LOOPBACK})


def finish(process, status=0):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def leaves(value, path=''):
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in pairs for key, leaf in leaves(part, f'{path}/{name}').items()}
    return {path: value}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """41 images to train on and 13 to test on, of three classes, and in each part one more that is cut short."""
    root, generator = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for part, counts in (('train', (14, 14, 13)), ('val', (5, 4, 4))):
        for label, count in enumerate(counts):
            (root / part / f'class{label}').mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (40, 36, 3)) + 100 * np.eye(3, dtype=int)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / f'class{label}' / f'{number}.jpg')
    for part in ('train', 'val'):
        whole = (root / part / 'class0' / '0.jpg').read_bytes()
        (root / part / 'class1' / 'short.jpg').write_bytes(whole[:len(whole) // 2])
    return root


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What tests/in_processes.py saves, of one process and of two."""
    out = tmp_path_factory.mktemp('results')
    started = [start(processes, 'tests/in_processes.py', f'{out}/{processes}') for processes in (0, 2)]
    for process in started:
        finish(process)
    return [torch.load(f'{out}/{processes}', weights_only=True) for processes in (0, 2)]


def test_two_processes_give_what_one_gives_to_nine_digits(results):
    alone, together = results
    assert len(alone) >= 35 and alone.keys() == together.keys() - {'amp, local', 'amp, local, on a part'}
    for name in alone:
        assert together[name]['agree'], f'{name}: the processes have different weights'
        expected, found = leaves(alone[name]), leaves(together[name])
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=f'{name}: {key}')
            elif isinstance(value, torch.Tensor):
                assert torch.equal(found[key], value), f'{name}: {key}'
            elif isinstance(value, float):
                assert found[key] == pytest.approx(value, rel=1e-9), f'{name}: {key}'
            else:
                assert found[key] == value, f'{name}: {key}'


def test_a_local_perturbation_is_another_one_and_yet_the_processes_agree(results):
    alone, together = results
    for name, other in (('amp, local', 'amp'), ('amp, local, on a part', 'amp, local')):
        assert together[name]['agree']
        loss = (together if other in together else alone)[other]['trained']['Loss']
        assert together[name]['trained']['Loss'] != pytest.approx(loss, rel=1e-6)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None)
def test_shares_together_are_the_batches(images, of_each, processes, first):
    expected = [list(range(images))[begin:begin + of_each * processes] for begin
                in range(0, images, of_each * processes)][first:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, 'world_size', lambda: processes)
        shares = []
        for rank in range(processes):
            patch.setattr(distributed, 'rank', lambda: rank)
            shares.append([list(range(images))[part] for part
                           in distributed.local_slices(images, of_each * processes, first)])
    assert [[position for share in batch for position in share] for batch in zip(*shares)] == expected
    assert all(len(share) <= of_each for batch in zip(*shares) for share in batch)


def test_a_killed_worker_is_started_again_and_the_end_is_the_same(folder, tmp_path, monkeypatch, capsys):
    flags = (f'--data {folder} {NETWORK} --epochs 2 --method dma smoothout --ss 0.01 --ema 0.9 --mixup 0.2 '
             '--checkpoint-every 2 '
             '--resume auto --deterministic')
    # 42 files are 6 batches; after 9 steps, the third of the second epoch, the last checkpoint is of 8.
    killed = start(2, 'tests/killed_once.py', f'9 {flags} --checkpoint {tmp_path}/killed', '--max-restarts=3')
    undisturbed = start(2, 'imagenet.py', f'{flags} --checkpoint {tmp_path}/undisturbed')
    (printed, errors), (quiet, _) = finish(killed), finish(undisturbed)
    assert 'SIGKILL' in errors or 'exitcode: -9' in errors
    assert printed.count('2 processes') == 2 and printed.count('epoch 1/2') == 1 and printed.count('epoch 2/2') == 1
    first, second = ({name: leaves(torch.load(tmp_path / run / name, weights_only=True)) for name in
                      ('checkpoint.pth.tar', 'model_best.pth.tar')} for run in ('killed', 'undisturbed'))
    for name in first:
        assert first[name].keys() == second[name].keys() and any('momentum_buffer' in key for key in first[name])
        for key, value in first[name].items():
            same = torch.equal(value, second[name][key]) if isinstance(value,
                                                                       torch.Tensor) else value == second[name][key]
            assert same, f'{name}: {key}'
    assert '/other_random_states/0/cpu' in first['checkpoint.pth.tar']
    logs = [read_log(tmp_path / run / 'log.txt') for run in ('killed', 'undisturbed')]
    assert len(logs[0]['Epoch']) == 2 and all(logs[0][name] == logs[1][name] for name in logs[0] if name != 'Seconds')

    # One writer, one voice; every image that can be read was tested once; of the others there is word.
    assert quiet.count('epoch 1/2') == 1 and quiet.count('balanced accuracy') == 1
    assert quiet.count('skipped 2 images that cannot be read') == 2 and f'{folder}/train/class1/short.jpg' in quiet
    listed = (tmp_path / 'undisturbed' / 'skipped.txt').read_text()
    assert [line.split('\t')[0] for line in listed.splitlines()] == [f'{folder}/{part}/class1/short.jpg' for part
                                                                     in ('train', 'val')]
    confusion = (tmp_path / 'undisturbed' / 'confusion.csv').read_text().splitlines()[1:]
    assert [sum(map(int, row.split(',')[1:])) for row in confusion] == [5, 4, 4]

    call(monkeypatch, imagenet, f'--evaluate --data {folder} -j 0 --resume {tmp_path}/undisturbed/checkpoint.pth.tar')
    loss, top1 = re.search(r'test loss ([\d.]+) top-1 ([\d.]+)%', capsys.readouterr().out).groups()
    assert float(top1) == pytest.approx(logs[0]['Test Top-1'][-1],
                                        abs=0.01) and float(loss) == pytest.approx(logs[0]['Test Loss'][-1], abs=1e-4)


def test_a_mistake_is_said_once_and_ends_all_processes(tmp_path):
    stdout, stderr = finish(start(2, 'cifar.py', f'-d folder --data {tmp_path}/nowhere -c {tmp_path}/run'), status=1)
    own = [line for line in stderr.splitlines() if line.startswith('error: ')]
    assert len(own) == 1 and f'there is no folder {tmp_path}/nowhere/train' in own[0] and stdout == ''
    assert not (tmp_path / 'run').exists()


def test_what_processes_cannot_share_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(distributed, 'world_size', lambda: 3)
    for flags, sentence in (('--train-batch 128', '3 processes cannot share --train-batch, which is 128; give a '
                                                  'multiple of 3'),
                            ('--train-batch 96 --mini-batch 48',
                             'does not divide the 32 images that each of 3 processes has')):
        assert sentence in refused(monkeypatch, capsys, tmp_path, f'-d digits {flags}')


def test_cifar_trains_in_two_processes(tmp_path):
    process = start(2, 'cifar.py', '-d digits --depth 8 --epochs 1 --train-batch 128 --method lsoftmax --margin 2 '
                                   f'--beta-schedule decay --manualSeed 1 -c {tmp_path}')
    printed, _ = finish(process)
    assert '| 2 processes' in printed and printed.count('epoch 1/1') == 1
    state = torch.load(tmp_path / 'checkpoint.pth.tar', weights_only=True)
    # it falls once in each of 12 steps
    assert state['state_dict']['head.beta'].item() == pytest.approx(100 * 0.99 ** 12, rel=1e-5)
    confusion = (tmp_path / 'confusion.csv').read_text().splitlines()[1:]
    assert sum(int(cell) for row in confusion for cell in row.split(',')[1:]) == 360
