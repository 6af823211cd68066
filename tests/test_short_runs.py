"""Runs on few images: tests do not outweigh training, pictures are drawn seldom, and no number changes by that."""
import json
import math
import time

import pytest

import cifar
from helpers import broken_off, call, few_digits
from utils.errors import UserError
from utils.logger import read_lines

FEW = '-d digits -a lenet --train-batch 10 --lr 0.01 --epochs 7 --manualSeed 5'


@pytest.fixture
def few(monkeypatch):
    """40 images to train, 100 to test; a list of the number of images of each test, and another of each picture."""
    few_digits(monkeypatch, 40, 100)
    tests, pictures, test = [], [], cifar.test

    def counted(batches, *rest):
        tests.append(len(batches.labels))
        return test(batches, *rest)

    monkeypatch.setattr(cifar, 'test', counted)
    monkeypatch.setattr('utils.run.plot_log', lambda log, *files: pictures.append(len(read_lines(log)) - 1))
    monkeypatch.setattr('utils.run.metrics.write_confusion', lambda *args: None)
    return tests, pictures


def rows(folder):
    names, *rows = read_lines(folder / 'log.txt')
    return [dict(zip(names[:-1], row)) for row in rows]  # without the seconds


def result(folder):
    held = json.loads((folder / 'result.json').read_text())
    return {name: held[name] for name in held if name.startswith('test')}


def test_no_more_images_are_tested_than_trained_on(few, monkeypatch, tmp_path, capsys):
    tests, _ = few
    call(monkeypatch, cifar, f'{FEW} -c {tmp_path / "default"}')
    assert tests == [100] * 3  # the last test is the report
    assert 'tested after every 3 epochs and after the last' in capsys.readouterr().out
    own = rows(tmp_path / 'default')
    assert [row['Epoch'] for row in own if row['Test Top-1'] != 'nan'] == ['3', '6', '7']

    call(monkeypatch, cifar, f'{FEW} --test-every 1 -c {tmp_path / "each"}')
    assert tests[3:] == [100] * 7 and 'tested after' not in capsys.readouterr().out
    each = rows(tmp_path / 'each')
    for row, other in zip(own, each, strict=True):
        assert row == other or {**other, **dict.fromkeys([name for name in row if 'Test' in name], 'nan')} == row
    assert result(tmp_path / 'default') == result(tmp_path / 'each')


@pytest.mark.parametrize('epochs, every, tested', [(7, 7, [7]), (7, 100, [7]), (4, 2, [2, 4]), (1, 3, [1])])
def test_the_last_epoch_is_always_tested(epochs, every, tested, few, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{FEW} --epochs {epochs} --test-every {every} -c {tmp_path}')
    assert [int(row['Epoch']) for row in rows(tmp_path) if row['Test Loss'] != 'nan'] == tested
    assert few[0] == [100] * len(tested)


def test_validation_images_choose_among_the_tested_epochs(few, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{FEW} --val-split 0.5 --test-every 3 -c {tmp_path}')
    own = {int(row['Epoch']): float(row['Val Top-1']) for row in rows(tmp_path) if row['Val Top-1'] != 'nan'}
    assert list(own) == [3, 6, 7] and len(few[0]) == 4 and few[0][-1] == 100
    assert json.loads((tmp_path / 'result.json').read_text())['epoch'] == max(own, key=own.get)


@pytest.mark.parametrize('epoch', [2, 3, 6])
def test_resumed_between_tests_it_is_the_same_run(epoch, few, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{FEW} -c {tmp_path / "whole"}')
    broken_off(monkeypatch, f'{FEW} -c {tmp_path / "broken"}', epoch)
    call(monkeypatch, cifar, f'--resume {tmp_path / "broken" / "checkpoint.pth.tar"}')
    assert rows(tmp_path / 'broken') == rows(tmp_path / 'whole')
    assert result(tmp_path / 'broken') == result(tmp_path / 'whole')


def test_the_result_has_what_a_table_needs(few, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{FEW} -c {tmp_path}')
    held = json.loads((tmp_path / 'result.json').read_text())
    log = read_lines(tmp_path / 'log.txt')
    assert held['steps'] == 7 * 4 and held['seconds'] == sum(float(row[-1]) for row in log[1:])
    assert held['test nll'] == held['test loss'] == pytest.approx(float(log[-1][5]), rel=1e-5)
    assert held['test ece'] == held['test calibration error'] and 0 <= held['test ece'] <= 100


def test_pictures_are_drawn_at_the_end_and_at_most_every_30_seconds(few, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{FEW} -c {tmp_path / "short"}')
    assert few[1] == [7]
    clock, seconds = time.perf_counter, [0.0]
    monkeypatch.setattr('utils.run.time.perf_counter', lambda: clock() + seconds[0])
    train = cifar.train

    def slow(*args):
        seconds[0] += 12  # so that two epochs take less than 30 seconds, and three take more
        return train(*args)

    monkeypatch.setattr(cifar, 'train', slow)
    call(monkeypatch, cifar, f'{FEW} -c {tmp_path / "long"}')
    assert few[1][1:] == [3, 6, 7]


def test_a_run_that_fails_draws_what_it_has(few, monkeypatch, tmp_path):
    train = cifar.train

    def failing(run, criterion, optimizer, epoch, args):
        if epoch == 2:
            return {'Loss': math.nan, 'Top-1': 0.0}
        return train(run, criterion, optimizer, epoch, args)

    test = cifar.test
    monkeypatch.setattr(cifar, 'train', failing)
    monkeypatch.setattr(cifar, 'test', lambda *args: {**test(*args), 'Loss': math.nan if len(few[0]) == 3 else 1.0})
    with pytest.raises(UserError, match='the test loss became nan after epoch 3'):
        call(monkeypatch, cifar, f'{FEW} --test-every 1 -c {tmp_path}')
    assert few[1] == [2]
