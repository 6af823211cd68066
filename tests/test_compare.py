import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import cifar
import compare
from helpers import write_run
from utils.errors import UserError
from utils.lab import plots, statistics
from utils.lab.runs import Flags


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['compare.py', *map(str, words)])
    compare.main()


@pytest.fixture
def table(monkeypatch, capsys):
    """A function: arguments -> (setting -> its row of the CSV, a dict with numbers as floats; what went to stderr)."""
    def read(*words):
        call(monkeypatch, *words, '--csv')
        printed = capsys.readouterr()
        rows = list(csv.DictReader(io.StringIO(printed.out)))
        assert len({row['setting'] for row in rows}) == len(rows) > 0
        words = ('all', 'setting', 'verdict')
        return {row['setting']: {name: float(value) if value and name.split()[-1] not in words else value
                                 for name, value in row.items()} for row in rows}, printed.err
    return read


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


# The numbers

PLAIN, DMA, AMP = [90.1, 91.3, 90.4], [91.0, 92.5], [88.0]


@pytest.fixture
def runs(tmp_path):
    for method, values in (('', PLAIN), ('--method dma --dma-coef 0.3', DMA), ('--method amp', AMP)):
        for seed, value in enumerate(values):
            write_run(tmp_path / f'{method[9:12]}{seed}', f'--epochs 3 {method}', seed=seed,
                      curve=(50.0 + seed, 93.0 + seed ** 2, value), result={'seconds per epoch': 1.0 + seed})
    return tmp_path


def test_means_deviations_and_differences(runs, table):
    rows, notes = table(runs)
    assert list(rows) == ['(none)', '--method dma --dma-coef 0.3', '--method amp']
    for row, values in zip(rows.values(), (PLAIN, DMA, AMP)):
        seeds = range(len(values))
        assert row['n'] == len(values) and row['all'] == '--dataset cifar10 --arch resnet --epochs 3'
        assert row['last epoch mean'] == pytest.approx(mean(values), rel=1e-12)
        assert row['best, chosen by test set mean'] == pytest.approx(mean([93.0 + seed ** 2 for seed in seeds]))
        assert row['at epoch'] == 2 and row['parameters (M)'] == 0.27
        assert row['seconds per epoch'] == pytest.approx(mean([1.0 + seed for seed in seeds]))
        if len(values) > 1:
            assert row['last epoch std'] == pytest.approx(deviation(values), rel=1e-12)
            assert row['best, chosen by test set std'] == pytest.approx(deviation([93.0 + seed ** 2 for seed in seeds]))
    plain, dma, amp = rows.values()
    assert plain['difference mean'] == plain['difference low'] == plain['verdict'] == ''
    expected = statistics.welch(DMA, PLAIN)
    assert (dma['difference mean'], dma['difference low'], dma['difference high']) == pytest.approx(expected)
    assert dma['difference mean'] == pytest.approx(mean(DMA) - mean(PLAIN)) and dma['verdict'] == 'not shown'
    assert amp['difference mean'] == pytest.approx(88.0 - mean(PLAIN))
    assert amp['difference low'] == amp['last epoch std'] == '' and 'p' not in amp
    assert notes == 'Commit abc1234; PyTorch 2.15.0; device cpu.\n'


def test_the_text_is_aligned_rounded_and_explained(runs, monkeypatch, capsys):
    call(monkeypatch, runs)
    shared, _, header, *rows, _, note, compared, needed, environment = capsys.readouterr().out.splitlines()
    assert shared == 'all: --dataset cifar10 --arch resnet --epochs 3'
    assert environment == 'Commit abc1234; PyTorch 2.15.0; device cpu.'
    names = ('n  ', 'last', 'best, chosen by test set', 'at epoch', 'difference', 'p (Holm)', 'verdict', 'parameters')
    starts = [header.index(name) for name in names]
    cells = [[row[start:end].strip() for start, end in zip([0, *starts], [*starts, None])] for row in rows]
    assert all(row[start - 1] == ' ' for row in rows for start in starts if start <= len(row))
    assert [row[:3] for row in cells] == [['(none)', '3', '90.60 +- 0.62'],
                                          ['--method dma --dma-coef 0.3', '2', '91.75 +- 1.06'],
                                          ['--method amp', '1', '88.00']]
    low, high = statistics.welch(DMA, PLAIN)[1:]
    assert [row[5] for row in cells] == ['', f'+1.15 [{low:+.2f}, {high:+.2f}]', '-2.60'] and cells[0][4] == '2.0'
    assert [row[6:8] for row in cells] == [['', ''], ['too few seeds', 'not shown'], ['too few seeds', 'not shown']]
    assert '+- standard deviation over n seeds' in note and 'Welch' in compared and 'validation' not in header
    assert needed == ('With 2 seeds that both have, nothing can be shown for 2 rows, however large the difference; it '
                      'takes 7 seeds.')


# Metrics, and other baselines

SEEDS = range(8)


@pytest.fixture
def metrics(tmp_path):
    """Eight seeds of three settings; AMP is one point better, and its loss is one lower, in each seed."""
    for method, gain in (('', 0.0), ('--method amp', 1.0), ('--method smoothout', 0.0)):
        for seed in SEEDS:
            value = 80 + seed + gain + 0.01 * (seed * 7 % 5)
            write_run(tmp_path / f'{method[9:12]}{seed}', method, seed=seed, curve=(50.0, value), result={
                'test loss': 3 - gain + 0.1 * seed, 'test calibration error': 5 + 0.1 * seed,
                'test balanced accuracy': value - 1, 'test class accuracy': [value, None, value - gain * 3]})
    return tmp_path


@pytest.mark.parametrize('flags, part, expected', [('', 'Test', 71.5), ('--val-split 0.1', 'Val', 92.0)])
def test_training_accuracy_is_of_the_epoch_of_the_result(flags, part, expected, table, tmp_path):
    """Of the last epoch, or of the one that validation chose, here the second of three."""
    log = (f'Epoch\tLearning Rate\tTrain Loss\tTrain Top-1\t{part} Loss\t{part} Top-1\tSeconds\n'
           '1\t0.1\t1\t99\t1\t40\t2.5\n2\t0.1\t1\t92\t1\t60\t2.5\n3\t0.1\t1\t71.5\t1\t50\t2.5\n')
    write_run(tmp_path / 'a', flags, files={'log.txt': log})
    rows, _ = table(tmp_path, '--metric', 'train', 'top1')
    assert rows['(none)']['train top-1 mean'] == expected
    assert table(tmp_path, '--metric', 'train', '--error')[0]['(none)']['train top-1 mean'] == 100 - expected
    write_run(tmp_path / 'b', flags, seed=2, files={'log.txt': log.replace('Train Top-1', 'Other')})
    assert "broken: " + str(tmp_path / 'b') in table(tmp_path, '--metric', 'train')[1]


def test_each_metric_has_its_columns_and_verdict(metrics, table):
    rows, _ = table(metrics, '--metric', 'worst', 'loss', 'top1', 'ece', 'balanced')
    plain, amp, smoothout = rows['(none)'], rows['--method amp'], rows['--method smoothout']
    values = [80 + seed + 0.01 * (seed * 7 % 5) for seed in SEEDS]
    assert plain['loss mean'] == pytest.approx(mean([3 + 0.1 * seed for seed in SEEDS]))
    assert plain['ECE std'] == pytest.approx(deviation([5 + 0.1 * seed for seed in SEEDS]))
    assert plain['top-1 mean'] == pytest.approx(mean(values)) and 'last epoch mean' not in plain
    assert plain['balanced mean'] == pytest.approx(mean(values) - 1)
    assert amp['worst class mean'] == pytest.approx(mean(values) - 2)
    for name, sign in (('top-1', 1), ('balanced', 1), ('loss', -1), ('worst class', -2)):
        assert amp[f'{name} paired difference mean'] == pytest.approx(sign)
        assert amp[f'{name} p'] == 2 / 2 ** 8 and amp[f'{name} p (Holm)'] == 4 / 2 ** 8  # of two methods
        assert amp[f'{name} verdict'] == ('worse' if name == 'worst class' else 'better')
        assert smoothout[f'{name} verdict'] == 'not shown' and smoothout[f'{name} p (Holm)'] == 1
    assert amp['ECE verdict'] == 'not shown'


@pytest.fixture
def conditions(tmp_path):
    """Two conditions of seven seeds. DMA is better in the first and worse in the second, which lacks AMP."""
    for condition, flags, gain in (('few', '--train-fraction 0.1', 1.0), ('wrong', '--label-noise 0.4', -2.0)):
        for seed in range(7):
            gains = {'none': 0.0, 'dma': gain + 0.01 * seed, 'amp': (-1) ** seed}
            for method, own in list(gains.items())[:3 if condition == 'few' else 2]:
                write_run(tmp_path / condition / 'table' / method / f'seed{seed}', seed=seed, curve=(70 + seed + own,),
                          flags=flags if method == 'none' else f'{flags} --method {method}',
                          result={'test loss': 30 - seed - own})
    return [tmp_path / condition / 'table' for condition in ('few', 'wrong')]


def test_a_grid_has_conditions_as_rows_and_methods_as_columns(conditions, monkeypatch, capsys):
    call(monkeypatch, *conditions, '--grid', '--markdown')
    header, _, few, wrong, _, _, _, cells, _, environment = capsys.readouterr().out.splitlines()
    assert header == '| condition | n | none | dma | amp |'
    name, n, plain, dma, amp = few.strip('| ').split(' | ')
    low, high = statistics.paired([70.0 + seed + (1.0 + 0.01 * seed) - (70.0 + seed) for seed in range(7)])[1:]
    assert (name, n, plain) == ('few', '7', '73.00 +- 2.16')
    assert dma == f'**better** +1.03 [{low:+.2f}, {high:+.2f}]; 74.03 +- {deviation([1.01 * s for s in range(7)]):.2f}'
    assert amp.startswith('not shown +0.14 [')
    assert wrong.startswith('| wrong | 7 | 73.00 +- 2.16 | **worse** -1.97 [') and wrong.endswith(' |  |')
    assert 'for the cells of the row' in cells and environment.startswith('Commit ')
    alone = {}
    for metric in ('top1', 'loss'):
        call(monkeypatch, *conditions, '--grid', '--markdown', '--metric', metric)
        alone[metric] = capsys.readouterr().out.splitlines()[:6]
    call(monkeypatch, *conditions, '--grid', '--markdown', '--metric', 'top1', 'loss')
    both = capsys.readouterr().out.splitlines()
    assert both[:6] + both[7:13] == alone['top1'] + alone['loss'] and 'Better or worse: the interval' in both[14]


@pytest.mark.parametrize('flags, sign', [('', 1), ('--error', -1), ('--metric loss', -1),
                                         ('--metric loss top1', -1)])
def test_a_grid_is_drawn_blue_where_it_is_better(conditions, monkeypatch, flags, sign):
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))
    call(monkeypatch, *conditions, '--grid', '--plot', conditions[0] / 'grid.png', *flags.split())
    axes, = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ['few', 'wrong']
    assert [label.get_text() for label in axes.get_xticklabels()] == ['none', 'dma', 'amp']
    numbers = {text.get_position(): float(text.get_text()) for text in axes.texts}
    assert numbers == pytest.approx({(0, 0): 73 if sign > 0 else 27, (0, 1): 73 if sign > 0 else 27,
                                     (1, 0): sign * 1.03, (1, 1): sign * -1.97, (2, 0): sign * 0.14}, abs=0.005)
    colours = {tuple(patch.get_xy()[:4].mean(axis=0)): patch.get_facecolor()[:3] for patch in axes.patches}
    assert len(colours) == 3
    (red, _, blue), (worse_red, _, worse_blue), grey = colours[1, 0], colours[1, 1], colours[2, 0]
    assert red < blue and worse_red > worse_blue and len(set(grey)) == 1


def test_an_imbalance_seed_is_a_seed_and_pairs_are_of_the_same_images(table, monkeypatch, tmp_path):
    """The eighth run of DMA has the first one's --manualSeed and images of its own, so it has no partner."""
    for method, gain in ('', 0.0), ('--method dma', 1.0):
        for seed in range(7 + (gain > 0)):
            write_run(tmp_path / f'{method[9:]}{seed}', f'--imbalance exp --imbalance-seed {seed} {method}',
                      seed=seed % 7, curve=(70.0 + seed + gain,))
    rows, notes = table(tmp_path)
    assert 'left out' not in notes and [row['n'] for row in rows.values()] == [7, 8]
    dma = rows['--method dma']
    assert dma['pairs'] == 7 and dma['paired difference mean'] == pytest.approx(1) and dma['verdict'] == 'better'
    assert '--imbalance exp' in dma['all'] and '--imbalance-seed' not in dma['all']
    for flag, spelling in (('--imbalance-seed', '--imbalance-seed'), ('--manual-seed', '--manualSeed'),
                           ('-j', '--workers')):
        with pytest.raises(UserError, match=f'--baseline names {spelling}, which tells no rows apart; it can be one '
                                            r'of: \(none\); --method dma'):
            call(monkeypatch, tmp_path, '--baseline', f'{flag} 1')


def test_a_grid_tells_of_too_few_seeds_and_has_one_setting_in_a_cell(conditions, monkeypatch, capsys):
    for seed in range(1, 7):
        shutil.rmtree(conditions[1] / f'dma/seed{seed}')
    call(monkeypatch, *conditions, '--grid')
    printed = capsys.readouterr().out
    assert 'wrong: 1 shared seed cannot show anything in 1 comparison, however' in printed and 'few: ' not in printed
    assert re.search(r'^wrong +1-7 +73.00 \+- 2.16 +too few seeds; 68.00$', printed, re.MULTILINE)
    write_run(conditions[0] / 'dma' / 'other', '--train-fraction 0.1 --method dma --dma-coef 3', curve=(50.0,))
    with pytest.raises(UserError, match='dma holds runs with different flags, and --grid has one cell for them'):
        call(monkeypatch, *conditions, '--grid')


def test_the_baseline_of_a_grid_is_the_first_column_and_no_other_takes_its_place(conditions, monkeypatch, capsys):
    call(monkeypatch, *conditions, '--grid', '--markdown', '--baseline', 'amp')
    few, wrong = capsys.readouterr().out.splitlines()[2:4]
    spread = deviation([seed + (-1) ** seed for seed in range(7)])
    assert few.startswith(f'| few | 7 | 73.14 +- {spread:.2f} | not shown -0.14 [')
    assert wrong == '| wrong | 7 |  | 73.00 +- 2.16 | 71.03 +- 2.18 |'
    call(monkeypatch, *conditions, '--grid', '--baseline', 'amp')
    assert 'wrong: has no `amp`, so nothing is compared.' in capsys.readouterr().out
    with pytest.raises(UserError, match='no folder has a folder sam to compare with; --baseline can be one of: none'):
        call(monkeypatch, *conditions, '--grid', '--baseline', 'sam')


def test_runs_of_one_setting_may_stand_in_two_rows_of_a_grid(conditions, monkeypatch, capsys):
    """As where a search over other rates chooses a rate that a row above has as a column."""
    shutil.copytree(conditions[0], conditions[0].parent.parent / 'again/table')
    call(monkeypatch, *conditions, conditions[0].parent.parent / 'again/table', '--grid', '--markdown')
    printed = capsys.readouterr().out
    few, _, again = printed.splitlines()[2:5]
    assert again == few.replace('| few |', '| again |') and 'left out' not in printed


def test_a_file_in_the_folder_names_a_row_of_a_grid(conditions, monkeypatch, capsys):
    def rows():
        call(monkeypatch, *conditions, '--grid')
        return [re.split(' {3,}', line)[0] for line in capsys.readouterr().out.splitlines()[1:3]]

    (conditions[0] / 'condition.txt').write_text('few | images, é\nmore about them\n', encoding='utf-8')
    assert rows() == ['few | images, é', 'wrong']
    (conditions[1] / 'condition.txt').write_text('\n')
    assert rows() == ['few | images, é', 'wrong']
    (conditions[1] / 'condition.txt').write_text('few | images, é', encoding='utf-8')
    with pytest.raises(UserError, match='few/table and .*wrong/table both have the name few . images, é, by their'):
        rows()


def test_names_in_a_picture_are_whole(tmp_path, monkeypatch):
    """Two settings that share their first seventy letters: neither the names at an axis nor a legend cut them off."""
    flags = '--method dma amp --dma-coef 0.123456 --epsilon 0.654321 --inner-iter'
    others = '--perturbation global --train-fraction 0.1 --label-noise 0.4'
    for inner, curve in ((2, (50.0,)), (3, (60.0,))):
        for seed in range(4):
            write_run(tmp_path / str(inner) / f'seed{seed}', f'{flags} {inner} {others}', seed=seed,
                      curve=(curve[0] + seed,))
            write_run(tmp_path / f'curve{inner}/seed{seed}', f'{flags} {inner} {others} --wd 1', seed=seed)
    for seed in range(4):
        write_run(tmp_path / f'plain/seed{seed}', '--lr 0.3', seed=seed, curve=(30.0 - seed,))
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))
    call(monkeypatch, tmp_path / '2', tmp_path / '3', tmp_path / 'plain', '--plot', 'x.png', '--baseline', '--lr 0.3')
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert {name.replace('\n', ' ') for name in names} == {f'{flags} {inner} {others}' for inner in (2, 3)}
    assert all(max(map(len, name.split('\n'))) <= 60 for name in names)
    call(monkeypatch, *tmp_path.iterdir(), '--plot', 'x.png')
    legend = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert len(legend) == 5 and max(map(len, legend)) > 110
    assert all(max(map(len, text.split('\n'))) <= 110 for text in legend)
    assert plots.wrapped(flags, 60).replace('\n', ' ') == flags and plots.wrapped('_a$', 60) == r' _a\$'


def test_none_is_the_plain_row_and_other_words_are_answered_by_compare(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        write_run(tmp_path / f'none{seed}', seed=seed)
        write_run(tmp_path / f'dma{seed}', '--method dma', seed=seed, curve=(50.0, 70.0, 60.0))
    call(monkeypatch, *tmp_path.iterdir(), '--baseline', 'none')
    assert '+10.00' in capsys.readouterr().out
    with pytest.raises(UserError, match='--baseline dma fits no row; it can be one of: '):
        call(monkeypatch, *tmp_path.iterdir(), '--baseline', 'dma')
    with pytest.raises(SystemExit):
        call(monkeypatch, *tmp_path.iterdir(), '--baseline', '--dna 1')
    assert 'compare.py: error: unrecognized arguments: --dna 1' in capsys.readouterr().err


def test_a_folder_of_images_is_one_however_its_path_is_spelled():
    def setting(data):
        return Flags().setting({'as given': {'dataset': 'folder', 'data': data, 'method': []}})

    assert setting('a b') == setting('a b/') == setting('./a b') == setting('x/../a b') != setting('c')


def test_a_grid_of_folders_at_the_wrong_depth_is_refused(conditions, monkeypatch, capsys):
    with pytest.raises(UserError, match='seed0 and seed1 in .*/few/table/(dma|none) hold runs with the same flags'):
        call(monkeypatch, *(conditions[0] / name for name in ('none', 'dma')), '--grid')
    with pytest.raises(UserError, match='no folder has a folder for each method'):
        call(monkeypatch, conditions[0] / 'none/seed1', '--grid')
    call(monkeypatch, conditions[1], f'{conditions[1]}/', conditions[0] / 'none/seed1', '--grid')
    printed = capsys.readouterr().out
    assert len(re.findall('73.00', printed)) == 1 and f'left out: {conditions[0]}/none/seed1 (it is a run' in printed


def test_runs_that_were_tested_once_are_drawn_as_intervals(tmp_path, monkeypatch):
    for seed in range(8):
        for flags, value in (('', 50.0 + seed), ('--method amp', 51.0 + seed + 0.01 * seed)):
            write_run(tmp_path / f'{flags[9:]}{seed}', flags, seed=seed, curve=(value,), result={'test loss': value})
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))
    call(monkeypatch, tmp_path, '--metric', 'top1', 'loss', '--plot', tmp_path / 'intervals.png')
    panels = figures[0].axes
    assert [axes.get_xlabel() for axes in panels] == ['difference in top-1', 'difference in loss']
    interval = statistics.paired([51.0 + seed + 0.01 * seed - (50.0 + seed) for seed in range(8)])
    point, _, (bar,) = panels[0].containers[0]
    assert point.get_xdata() == pytest.approx([interval.mean]) and point.get_markerfacecolor() == 'C0'
    assert bar.get_segments()[0][:, 0] == pytest.approx(interval[1:])
    assert panels[0].get_yticklabels()[0].get_text() == '--method amp'


def test_runs_that_were_tested_once_are_points_where_nothing_is_compared(tmp_path, monkeypatch):
    for seed in range(3):
        write_run(tmp_path / f'{seed}', seed=seed, curve=(50.0 + seed,))
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))
    call(monkeypatch, tmp_path, '--plot', tmp_path / 'x.png')
    line, = figures[0].axes[0].lines
    assert (line.get_xdata(), line.get_ydata(), line.get_marker()) == ([1], [51.0], '.')


def test_error_turns_accuracies_around_and_no_verdict(metrics, table, monkeypatch, capsys):
    accuracy, _ = table(metrics, '--metric', 'top1', 'loss')
    error, _ = table(metrics, '--metric', 'top1', 'loss', '--error')
    for name in accuracy:
        assert error[name]['top-1 mean'] == pytest.approx(100 - accuracy[name]['top-1 mean'])
        assert error[name]['loss mean'] == accuracy[name]['loss mean']
        assert error[name]['top-1 verdict'] == accuracy[name]['top-1 verdict']
    assert error['--method amp']['top-1 difference mean'] == pytest.approx(-1)
    call(monkeypatch, metrics, '--error')
    assert 'Top-1 test error in percent' in capsys.readouterr().out


def test_a_higher_error_in_training_is_called_higher(table, tmp_path):
    log = 'Epoch\tLearning Rate\tTrain Loss\tTrain Top-1\tTest Loss\tTest Top-1\tSeconds\n1\t0.1\t1\t{}\t1\t50\t2.5\n'
    for seed in range(6):
        for name, flags, top1 in (('none', '', 95), ('amp', '--method amp', 90 - seed / 10)):
            write_run(tmp_path / f'{name}/{seed}', flags, seed=seed, curve=(50.0,), files={'log.txt': log.format(top1)})
    for flags, difference, word in (((), -5.25, 'lower'), (('--error',), 5.25, 'higher')):
        row = table(tmp_path, '--metric', 'train', *flags)[0]['--method amp']
        assert (row['difference mean'], row['verdict']) == (pytest.approx(difference), word)


def test_coef_of_a_baseline_is_that_of_the_method_that_has_one(table, tmp_path):
    for coef in (1, 5):
        write_run(tmp_path / f'{coef}', f'--method amp dma --dma-coef {coef}')
    for order in ('amp dma', 'dma amp'):
        rows, _ = table(tmp_path, '--baseline', f'--method {order} --coef 5')
        assert [row['difference mean'] for row in rows.values()] == [0.0, '']
    with pytest.raises(UserError, match='asks for help, and names no row'):
        table(tmp_path, '--baseline=--help')


@pytest.mark.parametrize('flags', ['--method amp', '--method amp --epsilon 0.50', '--dataset cifar10 --method amp'])
def test_another_row_can_be_the_baseline(flags, metrics, table):
    rows, _ = table(metrics, '--baseline', flags)
    assert rows['--method amp']['verdict'] == ''
    assert [rows[name]['verdict'] for name in ('(none)', '--method smoothout')] == ['worse'] * 2
    assert rows['(none)']['paired difference mean'] == pytest.approx(-1)


def test_none_is_the_only_row_without_a_method_whatever_its_flags(tmp_path, table):
    for seed in (0, 1):
        for flags, value in (('--wd 1e-3', 50.0), ('--method amp --wd 1e-3', 52.0), ('--method hinge --wd 1e-2', 49.0)):
            write_run(tmp_path / f'{flags[-5:]}{len(flags)}-{seed}', flags, seed=seed, curve=(value + seed,))
    rows, _ = table(tmp_path, '--baseline', '(none)')
    assert [row['difference mean'] for row in rows.values()] == ['', 2, -1]
    write_run(tmp_path / 'another', '--wd 3e-3', curve=(50.0,))
    with pytest.raises(UserError, match=r"--baseline '\(none\)' fits no row"):
        table(tmp_path, '--baseline', '(none)')


def test_the_baseline_is_read_as_flags_are(tmp_path, table, monkeypatch):
    for seed, (flags, value) in enumerate([('', 1.0), ('--method dma --dma-coef 0.25', 3.0), ('--wd 1e-3', 4.0)] * 2):
        write_run(tmp_path / str(seed), flags, seed=seed // 3, curve=(value, value))
    rows, _ = table(tmp_path, '--baseline', '--method dma --coef 0.250')
    assert [row['difference mean'] for row in rows.values()] == ['' if '--method dma' in name else (
        1 if 'decay' in name or 'wd' in name else -2) for name in rows]
    rows, _ = table(tmp_path, '--baseline', '(none)')
    assert sorted(row['difference mean'] for row in rows.values() if row['difference mean'] != '') == [2, 3]
    with pytest.raises(UserError, match="--baseline '--method amp' fits no row; it can be one of: .none.; "):
        call(monkeypatch, tmp_path, '--baseline', '--method amp')
    with pytest.raises(UserError, match='cannot be read as flags .No closing quotation'):
        call(monkeypatch, tmp_path, '--baseline', '--method "amp')


def test_runs_without_a_metric_are_named_and_left_out(metrics, table):
    write_run(metrics / 'old', seed=99, curve=(50.0, 10.0))
    assert table(metrics)[0]['(none)']['n'] == 9
    rows, notes = table(metrics, '--metric', 'top1', 'ece', 'worst')
    assert rows['(none)']['n'] == 8
    assert f'left out: {metrics / "old"} (its result.json has no ECE and no worst class; resume it' in notes


def test_epochs_that_were_not_tested_are_no_part_of_the_curve(tmp_path, table):
    write_run(tmp_path / 'a', curve=(math.nan, 50.0, math.nan, 60.0), result={'best': {'top1': 60.0, 'epoch': 4}})
    write_run(tmp_path / 'b', curve=(math.nan,) * 3 + (math.inf,), seed=2, result={'best': {'top1': 1.0, 'epoch': 4}})
    write_run(tmp_path / 'c', curve=(40.0, math.nan), seed=3, args={'epochs': 4})
    rows, notes = table(tmp_path)
    assert rows['(none)']['last epoch mean'] == 60 and rows['(none)']['n'] == 1
    assert 'top-1 of epoch 4 in log.txt is inf' in notes and 'epoch 2 of 4' in notes


def test_markdown_is_a_table_with_the_same_cells(runs, monkeypatch, capsys):
    write_run(runs / 'odd', '--method dma --epochs 3 --dataset folder --data "a|b"', curve=(1.0,))
    write_run(runs / 'stopped', '--epochs 3', files={'result.json': None})
    call(monkeypatch, '--markdown', runs)
    before, block, *after = capsys.readouterr().out.strip().split('\n\n')
    lines = block.splitlines()
    assert before == 'all: `--arch resnet --epochs 3`' and len(lines) == 6 and set(lines[1]) == set('|- ')
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in lines}) == 1
    assert lines[3].startswith('| `--method dma --dma-coef 0.3 --dataset cifar10` | 2 | 91.75 +- 1.06 | ')
    assert '| +1.15 [' in lines[3]
    assert r'a\|b' in lines[5]
    assert len(after) == 5 and after[-1].startswith('unfinished: ')  # paragraphs of their own


def test_epochs_chosen_by_validation_have_a_column_of_their_own(tmp_path, table):
    for seed, value in enumerate((80.0, 82.0)):
        for method, top1 in (('', value), ('--method dma', value + 3 * seed)):
            write_run(tmp_path / f'val{method}{seed}', f'--val-split 0.1 {method}', seed=seed, curve=(50.0, 99.0, 60.0),
                      top1=top1, result={'epoch': 2})
    rows, _ = table(tmp_path)
    assert not {'last epoch mean', 'best, chosen by test set mean', 'at epoch'} & rows['(none)'].keys()
    write_run(tmp_path / 'plain', curve=(10.0, 20.0))
    rows, _ = table(tmp_path)
    plain, val, dma = rows['(none)'], rows['--val-split 0.1'], rows['--method dma --val-split 0.1']
    assert (val['chosen by validation mean'], val['chosen by validation std']) == (81, pytest.approx(math.sqrt(2)))
    assert val['last epoch mean'] == val['best, chosen by test set mean'] == val['at epoch'] == ''
    assert plain['chosen by validation mean'] == ''
    assert (plain['last epoch mean'], plain['best, chosen by test set mean'], plain['at epoch']) == (20, 20, 2)
    assert dma['difference mean'] == pytest.approx(1.5)  # to the baseline that was chosen the same way


def test_a_column_that_is_empty_in_every_row_is_left_out(tmp_path, table):
    write_run(tmp_path / 'one', '--method dma')
    rows, _ = table(tmp_path)
    assert list(rows['(none)']) == ['all', 'setting', 'n', 'last epoch mean', 'best, chosen by test set mean',
                                    'at epoch',
                                    'parameters (M)', 'seconds per epoch']


# Settings

@pytest.mark.parametrize('one, other', [
    ('--workers 2 --test-batch 7 --deterministic --gpu-id 3 -c x --overwrite', ''),
    ('--data here', '--data there'),
    ('--method amp dma', '--method dma amp'),
    ('--method dma --coef 0.2 --dma-coef 0.5', '--method dma'),
    ('--warmup 1', '--warmup 1.0'),
    ('--lr 0.1', '--lr 1e-1'),
])
def test_flags_that_compute_the_same_are_one_setting(one, other, tmp_path, table):
    write_run(tmp_path / 'one', one, seed=1)
    write_run(tmp_path / 'other', other, seed=2)
    rows, _ = table(tmp_path)
    assert [row['n'] for row in rows.values()] == [2]


@pytest.mark.parametrize('one, other, names', [
    ('', '--nesterov', ['(none)', '--nesterov']),
    ('--train-batch 2048', '', ['--train-batch 128', '--train-batch 2048']),
    ('--wd 1e-5', '--weight-decay 1', ['--weight-decay 1e-05', '--weight-decay 1']),
    ('--manualSeed 3 --depth 20', '', ['(none)', '--depth 20']),
    ('--schedule 1 2', '--schedule 1', ['--schedule 1', '--schedule 1 2']),
    ('--precision bf16', '--compile', ['--precision fp32 --compile', '--precision bf16']),
    ('--method amp', '--method amp --epsilon 0.1', ['--epsilon 0.1', '--epsilon 0.5']),
    ('--method amp --epsilon 0.1', '', ['(none)', '--method amp --epsilon 0.1']),
    ('-d folder --data "my data"', '-d folder --data b', ['--data b', "--data 'my data'"]),
    ('--start-epoch 2', '', ['(none)', '--start-epoch 2']),
    ('--drop 0.30000000000000004', '--drop 0.3', ['--drop 0.3', '--drop 0.30000000000000004']),
    ('--growthRate 4', '--compressionRate 2', ['--compressionRate 2', '--growthRate 4']),
])
def test_the_name_is_what_differs_as_a_person_would_type_it(one, other, names, tmp_path, table):
    write_run(tmp_path / 'one', one)
    write_run(tmp_path / 'other', other)
    for order in (('one', 'other'), ('other', 'one')):
        rows, _ = table(*(tmp_path / name for name in order))
        assert list(rows) == names and [row['n'] for row in rows.values()] == [1, 1]
        for name in names:  # it is understood by cifar.py
            cifar.make_parser().parse_args([] if name == '(none)' else shlex.split(name))


def test_order_and_shared_flags(tmp_path, table):
    flags = ['--train-batch 1024 --method dma', '--train-batch 64 --method amp --epsilon 0.1',
             '--train-batch 64 --method dma amp', '--train-batch 1024', '--train-batch 64 --method amp',
             '--train-batch 64',
             '--train-batch 512 --method dma']
    for index, words in enumerate(flags):
        write_run(tmp_path / str(index), f'-d digits --epochs 5 --nesterov {words}', curve=(50.0 + index,))
    rows, _ = table(*(tmp_path / str(index) for index in range(len(flags))))
    assert list(rows) == [
        '--train-batch 64', '--method dma amp --epsilon 0.5 --train-batch 64',
        '--method amp --epsilon 0.1 --train-batch 64',
        '--method amp --epsilon 0.5 --train-batch 64', '--method dma --train-batch 512', '--train-batch 1024',
        '--method dma --train-batch 1024']
    assert {row['all'] for row in rows.values()} == {'--dataset digits --arch resnet --epochs 5 --nesterov'}
    assert rows['--method amp --epsilon 0.1 --train-batch 64']['difference mean'] == 1 - 5
    assert rows['--method dma --train-batch 1024']['difference mean'] == 0 - 3
    assert rows['--method dma --train-batch 512']['difference mean'] == ''  # no baseline of that batch
    reversed_rows, _ = table(*(tmp_path / str(index) for index in reversed(range(len(flags)))))
    assert reversed_rows == rows and list(reversed_rows) == list(rows)


def test_other_flags_group_the_rows_wherever_help_lists_them(tmp_path, table):
    for index, words in enumerate(['--method dma --precision bf16', '--precision bf16', '--method dma', '']):
        write_run(tmp_path / str(index), words)
    rows, _ = table(tmp_path)
    assert list(rows) == ['--precision fp32', '--method dma --precision fp32',
                          '--precision bf16', '--method dma --precision bf16']


def test_older_runs_lack_flags_and_still_count(tmp_path, table):
    write_run(tmp_path / 'new', '--method dma', seed=1)
    write_run(tmp_path / 'older', '--method dma', seed=2, missing=('nesterov', 'epsilon', 'clip_norm'))
    oldest = vars(cifar.make_parser().parse_args(['--method', 'dma']))
    oldest = {name: value for name, value in oldest.items() if name not in ('given', 'margin', 'compile')}
    write_run(tmp_path / 'oldest', files={'args.json': oldest | {'seed': 3, 'epochs': 3}})
    rows, notes = table(tmp_path / 'new', tmp_path / 'older')
    assert [row['n'] for row in rows.values()] == [2]
    # Without 'as given' the values that were settled are all there is; here epochs, 3 rather than 300.
    rows, notes = table(tmp_path)
    assert list(rows) == ['--epochs 3', '--epochs 300']
    assert notes == 'Commit abc1234, unknown; PyTorch 2.15.0, unknown; device cpu, unknown.\n'


def test_a_flag_or_method_that_is_gone_keeps_settings_apart(tmp_path, table):
    for seed, (method, value) in enumerate([(['gone'], 1.0), (['gone'], 2.0), ([], None), (['dma', 'gone'], 1.0)]):
        write_run(tmp_path / str(seed), curve=(50.0 + seed,))
        args = json.loads((tmp_path / str(seed) / 'args.json').read_text())
        args['as given'] |= {'method': method, 'gone_rate': value}
        (tmp_path / str(seed) / 'args.json').write_text(json.dumps(args))
    rows, _ = table(tmp_path)
    assert set(rows) == {'(none)', '--method gone --gone-rate 1', '--method gone --gone-rate 2',
                         '--method dma gone --gone-rate 1'}


# Runs that are not in the table

def test_what_is_unfinished_or_broken_is_listed_and_changes_no_number(runs, table, monkeypatch, capsys):
    before, _ = table(runs)
    curve = tuple(range(10, 20))
    log = 'Epoch\tTest Top-1\n1\t50\n2\t60\n3\t55'
    files = {
        'running': {'result.json': None, 'log.txt': log + '\n'},
        'running-half': {'result.json': None, 'log.txt': log},
        'running-short': {'result.json': None, 'log.txt': log + '\n4\n'},
        'running-header': {'result.json': None, 'log.txt': 'Epoch\tTest Top-1\n'},
        'resumed': {'log.txt': log + '\n'},
        'no-result': {'result.json': None},
        'no-args': {'args.json': None},
        'no-log': {'log.txt': None},
        'half-args': {'args.json': '{"epochs": 3,'},
        'list-args': {'args.json': '[]'},
        'empty-log': {'log.txt': ''},
        'other-log': {'log.txt': 'a\tb\n1\t2\n'},
        'words-log': {'log.txt': log + '\n4\tx\n'},
        'twice-log': {'log.txt': log + '\n2\t50\n'},
        'back-log': {'log.txt': 'Epoch\tTest Top-1\n10\t50\n9\t60\n'},
        'nan-log': {'log.txt': log + '\n10\tnan\n'},
        'half-result': {'result.json': '{'},
        'empty-result': {'result.json': {}},
    }
    for name, content in files.items():
        write_run(runs / name, '--epochs 10', seed=9, curve=curve, files=content)
    for name, change in {'nan': {'test top-1': math.nan}, 'nan-best': {'best': {'top1': math.nan, 'epoch': 1}},
                         'null': {'test top-1': None}, 'list-best': {'best': []},
                         'word': {'seconds per epoch': 'long'}}.items():
        write_run(runs / name, '--epochs 10', seed=9, curve=curve, result=change)
    for name, change in {'odd-given': {'as given': 3}, 'odd-flag': {'as given': {'lr': {}}},
                         'odd-epochs': {'epochs': '10'},
                         'odd-environment': {'environment': 'here'}}.items():
        write_run(runs / name, '--epochs 10', seed=9, curve=curve, args=change)
    (runs / 'binary').mkdir()
    (runs / 'binary' / 'log.txt').write_bytes(b'\xff\xfe\x00\n')
    (runs / 'binary' / 'args.json').write_bytes(b'\xff\xfe')
    after, notes = table(runs)
    assert after == before
    _, *lines = notes.splitlines()
    said = {re.match(rf'(\w+): {re.escape(str(runs))}/(\S+) \(', line).groups()[::-1]: line for line in lines}
    assert len(said) == len(lines) == 28
    expected = {'running': 'epoch 3 of 10', 'running-half': 'epoch 2 of 10', 'running-short': 'epoch 3 of 10',
                'running-header': 'epoch 0 of 10', 'resumed': 'epoch 3 of 10',
                'no-result': 'epoch 10 of 10, but no result.json'}
    for name, words in expected.items():
        assert said.pop((name, 'unfinished')).endswith(f'{name} ({words})')
    expected = {'half-args': 'args.json is not JSON', 'half-result': 'result.json is not JSON', 'no-args': 'args.json',
                'no-log': 'log.txt', 'other-log': 'not a log', 'nan-log': 'top-1 of epoch 10, the last, is nan',
                'twice-log': 'count up', 'back-log': 'count up', 'nan': 'top-1 in result.json is nan',
                'empty-result': 'test top-1'}
    for name, words in expected.items():
        assert words in said[name, 'broken'].partition('(')[2]
    assert {kind for _, kind in said} == {'broken'}
    call(monkeypatch, runs)
    assert capsys.readouterr().out.splitlines()[-28:] == lines  # below the table


def test_the_same_seed_again_is_left_out_and_the_same_folder_silently(runs, table):
    before, _ = table(runs)
    write_run(runs / 'copy', '--epochs 3 --workers 9', seed=1, curve=(1.0, 2.0, 3.0))
    (runs / 'link').symlink_to(runs / '0')
    rows, notes = table(runs / '0', runs / '1', runs / '2', runs / 'copy', f'{runs}/0/', runs / 'link', runs,
                        os.path.relpath(runs / '1'))
    assert rows == before
    assert notes.splitlines()[1:] == [f'left out: {runs}/copy (same setting and seed as {runs}/1)']


def test_runs_behind_links_count_once(tmp_path, table):
    """As where some were moved to another disk. A link may lead back."""
    for name, seed in (('here/b', 1), ('moved/a', 2)):
        write_run(tmp_path / name, seed=seed)
    (tmp_path / 'here/a').symlink_to(tmp_path / 'moved/a')
    (tmp_path / 'here/again').symlink_to(tmp_path / 'here')
    rows, notes = table(tmp_path / 'here', tmp_path / 'moved')
    assert [row['n'] for row in rows.values()] == [2] and 'left out' not in notes


def test_runs_that_were_tested_on_other_images_are_named(conditions, monkeypatch, capsys):
    """As where an image of a folder has become unreadable between two runs; a grid compares within a row."""
    def told(*more):
        call(monkeypatch, *conditions, *more)
        return [line for line in capsys.readouterr().out.splitlines() if 'not the same test' in line]

    few, wrong = conditions
    for folder, images in ((few, 100), (wrong, 90)):
        for path in folder.glob('*/*/result.json'):
            path.write_text(json.dumps(json.loads(path.read_text()) | {'test images': images}))
    assert told('--grid') == []
    assert told() == [f'not the same test: {wrong}/dma/seed0 and 13 others on 90 images, '
                      f'{few}/amp/seed0 and 20 others on 100 images']
    path = few / 'dma/seed3/result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'test images': 99}))
    assert told('--grid') == [f'not the same test: {few}/dma/seed3 on 99 images, '
                              f'{few}/amp/seed0 and 19 others on 100 images']


def test_runs_are_searched_below_a_folder_but_not_in_hidden_ones_or_below_a_run(tmp_path, table):
    for seed, path in enumerate(('a/b/c', 'a/run', 'a/run/older', '.hidden/run')):
        write_run(tmp_path / path, seed=seed)
    rows, _ = table(tmp_path)
    assert rows['(none)']['n'] == 2
    rows, _ = table(tmp_path / '.hidden', tmp_path / 'a/run/older')
    assert rows['(none)']['n'] == 2


# Damage

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run of cifar.py of two epochs."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('utils.run.plot_log', lambda *args: None)
        patch.setattr(sys, 'argv', ['cifar.py', *'-d digits -a lenet --epochs 2 --manualSeed 1 --train-batch 512 '
                                    f'--train-fraction 0.2 --train-batch 64 -c {folder}'.split()])
        cifar.main()
    return folder


def copied(finished, folder, **files):
    folder.mkdir()
    for name in ('args.json', 'result.json', 'log.txt'):
        (folder / name).write_bytes(files.get(name.partition('.')[0], (finished / name).read_bytes()))


@pytest.mark.parametrize('name', ['args', 'result', 'log'])
def test_a_damaged_file_is_noticed_or_changes_no_number(name, finished, table, tmp_path):
    """Every byte in turn, by one of its bits, in steps that reach all kinds of places."""
    whole = next(finished.glob(f'{name}.*')).read_bytes()
    expected, _ = table(finished)
    for index in range(0, len(whole), 31):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 7
        copied(finished, tmp_path / str(index), **{name: bytes(damaged)})
    copied(finished, tmp_path / 'cut', **{name: whole[:len(whole) // 2]})
    rows, notes = table(finished, tmp_path)
    assert rows == expected and notes.count('\n') == 2 + len(range(0, len(whole), 31))


WORDS = [None, True, -1, 1e400, 10 ** 400, float('nan'), 'x', [], [[1]], {}, {'x': []}]


def test_odd_json_is_a_line(finished, tmp_path, monkeypatch, capsys):
    """Each value of args.json and result.json in turn as something else, without the check sums of old runs."""
    contents = {name: json.loads((finished / f'{name}.json').read_text()) for name in ('args', 'result')}
    del contents['args']['check sum'], contents['result']['check sums']
    number = 0
    for name, content in contents.items():
        for key in content:
            read = key in ('epochs', 'seed', 'as given', 'best', 'test top-1', 'method')
            for value in WORDS if read else WORDS[-3:]:
                number += 1
                copied(finished, tmp_path / str(number), **{name: json.dumps({**content, key: value}).encode()})
    for word in ('[' * 100000, '', '3', '"x"', '\udcff'):
        for name in contents:
            number += 1
            copied(finished, tmp_path / str(number), **{name: word.encode('utf-8', 'surrogateescape')})
    call(monkeypatch, finished, tmp_path, '--csv')
    notes = capsys.readouterr().err
    kinds = {'broken', 'unfinished', 'left out', 'mixed', 'Commit abc'}
    assert all(line.partition(':')[0] in kinds for line in notes.splitlines()[1:]) and number > 150


def test_comments_and_blank_lines_in_a_log_are_left_out(finished, table, tmp_path):
    expected, _ = table(finished)
    log = (finished / 'log.txt').read_text().replace('\n', '\n# a note\n\n')
    copied(finished, tmp_path / 'noted', log=log.encode())
    assert table(tmp_path / 'noted')[0] == expected


def test_what_holds_no_run_among_the_arguments_is_named(finished, table, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'curves.png').write_bytes(b'x')
    expected, _ = table(finished)
    rows, notes = table(tmp_path / 'empty', finished, tmp_path / 'curves.png')
    assert rows == expected and notes.splitlines()[1:] == [
        f'left out: {tmp_path}/{name} (holds no run)' for name in ('empty', 'curves.png')]


def test_a_mixed_run_is_left_out(finished, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr(sys, 'argv', ['cifar.py', '--resume', f'{finished}/checkpoint.pth.tar', '-c',
                                      f'{tmp_path}/dma', '--method', 'dma', '--epochs', '3'])
    cifar.main()
    capsys.readouterr()
    rows, notes = table(finished, tmp_path)
    assert [row['n'] for row in rows.values()] == [1]
    assert notes.splitlines()[1:] == [f'mixed: {tmp_path}/dma (after epoch 2: method none -> dma)']


# Mistakes

@pytest.mark.parametrize('words, sentence', [
    ([], 'name the folders'), (['.', '--markdown', '--csv'], 'not allowed with'), (['.', '--unknown'], '--unknown'),
    (['.', '--plot', 'x.jpg'], '--plot must end in .png or .pdf, was given x.jpg'),
    (['.', '--grid', '--csv'], '--grid has a result and a difference in each cell, which --csv does not write'),
])
def test_errors_of_the_command_line_are_one_sentence(words, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and sentence in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_folders_without_a_run_are_refused(tmp_path, runs, monkeypatch):
    (tmp_path / 'empty' / 'deep').mkdir(parents=True)
    (tmp_path / 'file').write_text('')
    for name, sentence in (('empty', 'holds no run'), ('none', 'there is no folder'), ('file', 'holds no run')):
        with pytest.raises(UserError, match=sentence):
            call(monkeypatch, tmp_path / name)
    with pytest.raises(UserError, match='there is no folder'):  # a word that is mistyped is no run that is left out
        call(monkeypatch, runs, tmp_path / 'none')


def test_without_a_finished_run_the_others_are_listed_and_the_status_is_1(tmp_path):
    write_run(tmp_path / 'a', files={'result.json': None})
    command = [sys.executable, 'compare.py', str(tmp_path)]
    result = subprocess.run(command, cwd=os.path.dirname(compare.__file__), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stdout == f'unfinished: {tmp_path}/a (epoch 3 of 3, but no result.json)\n'
    assert result.stderr.startswith('error: ')
    assert 'none of the 1 runs can be compared' in result.stderr and result.stderr.count('\n') == 1


# The plot

def test_curves_are_means_over_the_epochs_that_all_seeds_have(tmp_path, monkeypatch, capsys):
    from matplotlib.axes import Axes

    drawn, bands = {}, []
    monkeypatch.setattr(Axes, 'plot', lambda self, x, y, plot=Axes.plot, **options:
                        drawn.update({options['label']: (list(x), list(y))}) or plot(self, x, y, **options))
    monkeypatch.setattr(Axes, 'fill_between', lambda self, x, low, high,
                        **options: bands.append((list(low), list(high))))
    write_run(tmp_path / 'a', '--epochs 3', seed=1, curve=(10.0, 20.0, 30.0))
    write_run(tmp_path / 'b', '--epochs 3', seed=2, curve=(14.0, 26.0, 30.0, 70.0))
    write_run(tmp_path / 'c', '--epochs 3 --method dma', curve=(1.0, 2.0, 3.0))
    for name, signature in (('curves.png', b'\x89PNG'), ('curves.PDF', b'%PDF')):
        call(monkeypatch, tmp_path, '--plot', tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(signature)
    assert drawn == {'(none), n = 2': ([1, 2, 3], [12, 23, 30]), '--method dma, n = 1': ([1, 2, 3], [1, 2, 3])}
    band = [deviation([10, 14]), deviation([20, 26]), 0]
    assert len(bands) == 2 and bands[0] == ([pytest.approx(m - d) for m, d in zip((12, 23, 30), band)],
                                            [pytest.approx(m + d) for m, d in zip((12, 23, 30), band)])
    assert capsys.readouterr().out.startswith('all: ')
    assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c', 'curves.PDF', 'curves.png']
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, '--plot', tmp_path / 'no-such-folder' / 'x.png')
    printed = capsys.readouterr()
    assert printed.out == '' and 'no-such-folder/x.png is in a folder that is not there' in printed.err


# With cifar.py

def test_two_real_runs(tmp_path, table, monkeypatch, capsys):
    for seed in (1, 2):
        flags = '--dataset digits --arch resnet --depth 8 --epochs 1 --train-batch 512 --method dma --coef 0.3'
        monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split(), '--manualSeed', str(seed), '-c',
                                          f'{tmp_path}/{seed}'])
        cifar.main()
    capsys.readouterr()
    results = [json.loads((tmp_path / str(seed) / 'result.json').read_text()) for seed in (1, 2)]
    values = [result['test top-1'] for result in results]
    rows, notes = table(tmp_path)
    row = rows['(none)']
    assert set(row['all'].split('--')) == set(flags.replace('--coef', '--dma-coef').split('--'))
    assert row['n'] == 2 and 'at epoch' not in row
    assert row['last epoch mean'] == pytest.approx(mean(values))
    assert row['last epoch std'] == pytest.approx(deviation(values))
    assert row['parameters (M)'] == results[0]['parameters'] / 1e6
    assert row['seconds per epoch'] == pytest.approx(mean([result['seconds per epoch'] for result in results]))
    used = json.loads((tmp_path / '1' / 'args.json').read_text())['environment']
    assert notes == f'Commit {used["commit"] or "unknown"}; PyTorch {used["torch"]}; device {used["device"]}.\n'
