"""Bad luck and bad files: damage is noticed, wrong values get a sentence, a full disk loses nothing, runs do not mix."""
import copy
import json
import os
import pathlib
import random
import resource
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import cifar
import imagenet
from helpers import call
from utils import checkpoint, datasets, output
from utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SHORT = '-d digits --arch lenet --train-batch 16 --lr 0.02 --manualSeed 2'


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    load = datasets.load
    monkeypatch.setattr(datasets, 'load', lambda name, root, part, *rest:
                        load('digits', None, part).subset(torch.arange(64 if part == 'train' else 40)))
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr('utils.metrics.write_confusion', lambda *args: None)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """The checkpoint of a run with much in it, in the middle of its second epoch."""
    folder, load = tmp_path_factory.mktemp('run'), datasets.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, 'load', lambda name, root, part, *rest:
                      load('digits', None, part).subset(torch.arange(64 if part == 'train' else 40)))
        patch.setattr('utils.run.plot_log', lambda *args: None)
        saved, save = [], checkpoint.save

        def keep(path, state):
            save(path, state)
            if state['epoch'] == 1 and state['step'] == 3:
                saved.append(copy.deepcopy(state))
                raise KeyboardInterrupt

        patch.setattr(checkpoint, 'save', keep)
        with pytest.raises(KeyboardInterrupt):
            call(patch, cifar, f'{SHORT} --method lsoftmax amp --ema 0.9 --epochs 2 --checkpoint-every 3 -c {folder}')
    return folder / 'checkpoint.pth.tar', saved[0]


# Damage

def leaves(value):
    if isinstance(value, (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in leaves(part)] + [len(value)]
    return [value]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b for a, b in zip(first, second))


def test_a_flipped_bit_is_noticed_or_changes_nothing(interrupted, tmp_path):
    """Only what no reader uses, such as padding, may differ in silence."""
    whole, expected, damaged = interrupted[0].read_bytes(), leaves(checkpoint.read(str(interrupted[0]))), 0
    generator = random.Random(0)
    for _ in range(60):
        bit, path = generator.randrange(8 * len(whole)), tmp_path / 'flipped'
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert equal(leaves(checkpoint.read(str(path))), expected), bit
        except UserError as error:
            assert 'damaged' in str(error) or 'not a checkpoint' in str(error)
            damaged += 1
    assert damaged > 50


def places(value, path=()):
    """Every place in a checkpoint, of tensors and numbers in one dict or list only the first."""
    yield path
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    alike = len(parts) > 6 and path not in ((), ('args',))
    for name, part in parts[:2] if alike else parts:
        yield from places(part, (*path, name))


def with_value(state, path, value):
    if not path:
        return value
    state = copy.copy(state)
    state[path[0]] = with_value(state[path[0]], path[1:], value)
    return state


WRONG = {'none': None, 'word': 'x', 'negative': -3, 'fraction': 0.3, 'list': [1, 'x'], 'dict': {'x': 1},
         'tensor': torch.zeros(7), 'integers': torch.zeros(2, 3, dtype=torch.int32)}


@pytest.mark.parametrize('kind', WRONG)
def test_a_wrong_value_anywhere_in_a_checkpoint_is_a_sentence(kind, interrupted, monkeypatch, tmp_path, capsys):
    """Each place in turn: resuming refuses it in one line, or does not mind."""
    path, state = interrupted
    monkeypatch.setattr(checkpoint, 'save', lambda *args: None)  # trains, but writes no checkpoint
    refused = 0
    for place in places(state):
        damaged = tmp_path / 'checkpoint.pth.tar'
        torch.save(with_value(state, place, WRONG[kind]), damaged)
        try:
            call(monkeypatch, cifar, f'--resume {damaged} --epochs 2 -c {tmp_path}/out --overwrite')
        except UserError as error:
            assert '\n' not in str(error), place
            refused += 1
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count('\n') == 1, place
            refused += 1
        except Exception as error:
            raise AssertionError(f'{place} as {WRONG[kind]}') from error
        capsys.readouterr()
    assert refused > 50
