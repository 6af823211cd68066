"""Odd words on the command line: each is read as what it is, or ends the script with one line."""
import argparse
import math
import sys

import pytest
from helpers import toy_runs

import cifar
import compare
import evaluate
import imagenet
import measure_margins
import measure_sharpness
import visualize2_sharpness
import visualize_features
import visualize_sharpness
from utils.errors import UserError, shown
from utils.flags import FLOAT32, Parser, bounded

runs = toy_runs(plain='-a lenet')
SCRIPTS = (cifar, imagenet, compare, evaluate, measure_sharpness, measure_margins, visualize_sharpness,
           visualize2_sharpness, visualize_features)
ODD = ('', ' ', '--', '-', '\n', 'a\nb', '\x1b[31m', '\u2028', '\udcff', '%s %', '1e39', '-1e39', '1e-320', '1e-400',
       'nan', 'inf', '1e999999999', '1e-999999999', '9223372036854775808', '9' * 5000, '1:2', '1e99:1:2',
       '0:1e-320:1', '-1', '0')


def actions(script, monkeypatch):
    """The flags of a script, taken from the parser that it makes."""
    with monkeypatch.context() as patch, pytest.raises(StopIteration) as made:
        def parse_args(self, *args, **options):
            raise StopIteration(self._actions)
        patch.setattr(Parser, 'parse_args', parse_args)
        script.parse_arguments()
    return made.value.value


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.__name__)
def test_an_odd_value_is_read_or_refused_in_one_line(script, runs, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    start = {cifar: ['-d', 'digits'], imagenet: ['--data', 'DIR'], compare: [str(runs)]}.get(
        script, [f'{runs}/plain/checkpoint.pth.tar'])
    values = [(action.option_strings[-1], value) for action in actions(script, monkeypatch) if action.option_strings
              for value in ODD if action.nargs != 0 and action.dest != 'help']
    refused = 0
    for index, (flag, value) in enumerate(values):
        if index % 3:  # a third of all pairs will do
            continue
        monkeypatch.setattr(sys, 'argv', [script.__name__, *start, f'{flag}={value}'])
        try:
            script.parse_arguments()
        except SystemExit as error:
            printed, refused = capsys.readouterr().err, refused + 1
            assert error.code == 2 and printed.count('\n') == 1, (flag, value, printed)
            assert printed.strip().isprintable(), (flag, value, printed)
        except (UserError, OSError) as error:
            assert str(error).isprintable(), (flag, value)
            refused += 1
    assert refused > len(values) / 6


@pytest.mark.parametrize('kind, text', [
    (float, '1e39'), (float, '-1e39'), (float, 'inf'), (float, '-inf'), (float, 'nan'), (float, '1e-39'),
    (float, '-1e-320'), (float, '1e-400'), (float, ''), (float, '1,5'), (float, '1e309'),
    (int, '9223372036854775808'), (int, '-9223372036854775809'), (int, '1.0'), (int, '9' * 5000), (int, '')])
def test_numbers_that_no_library_holds_are_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match='^must be .*, was given ') as error:
        bounded(kind)(text)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize('kind, text, value', [
    (float, '0', 0), (float, '-0.0', 0), (float, '0e-400', 0), (float, '1.2e-38', 1.2e-38), (float, '3.4e38', 3.4e38),
    (float, '-3.4e38', -3.4e38), (int, '9223372036854775807', 2 ** 63 - 1), (int, '-5', -5)])
def test_numbers_that_are_read(kind, text, value):
    assert bounded(kind)(text) == value


def test_the_bounds_are_those_of_float32():
    import torch
    assert FLOAT32 == (torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny)
    assert math.isinf(torch.tensor(FLOAT32[0] * (1 + 1e-6), dtype=torch.float64).float())


def parser():
    result = Parser(prog='x.py')
    result.add_argument('files', nargs='*')
    result.add_argument('-c', '--checkpoint')
    result.add_argument('--own', type=float)  # as a method of one's own declares it
    result.add_argument('--many', nargs='+')
    return result


@pytest.mark.parametrize('words, expected', [
    (['--'], []), (['--', 'a'], ['a']), (['a', '--', '-b', '--c'], ['a', '-b', '--c']),
    (['--many', '1', '2', '--', 'a'], ['a']), (['a', '-c', 'x', '--', 'b'], ['a', 'b'])])
def test_what_follows_two_dashes_is_positional(words, expected):
    assert (parser().parse_args(words).files or []) == expected


@pytest.mark.parametrize('words, sentence', [
    (['-c=--'], 'argument -c/--checkpoint: must have a value, was given --'),
    (['-c--'], 'argument -c/--checkpoint: must have a value, was given --'),
    (['--checkpoint=--'], 'must have a value, was given --'), (['--checkpoint='], 'was given an empty one'),
    (['-c', ''], 'was given an empty one'), ([''], 'argument files: must have a value'),
    (['--', 'a', ''], 'argument files: must have a value'), (['--many', 'a', ''], 'was given an empty one'),
    (['-c'], 'expected one argument'), (['-c', '--'], 'expected one argument'),
    (['--own', '1e39'], 'argument --own: must be a number of at most 3.40282e+38, was given 1e39'),
    (['--own', 'a\nb'], r'must be a number, was given a\nb'), (['--a\nb\x1b'], r'unrecognized arguments: --a\nb\x1b'),
])
def test_odd_words_are_one_line(words, sentence, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(words)
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count('\n') == 1


def test_the_last_of_two_values_counts():
    assert parser().parse_args(['--own', '1', '--own', '2']).own == 2


def test_a_sentence_is_one_line_whatever_it_quotes():
    assert str(UserError('there is no folder a\nb\t\x07\udcff')) == r'there is no folder a\nb\t\x07\udcff'
    assert shown('Müller 猫') == 'Müller 猫'
