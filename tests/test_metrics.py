import csv
import json
import math
import os
import re
import shutil
import warnings
from fractions import Fraction

# Before warnings become errors: old versions use what new ones of other libraries deprecate.
import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
import torch
from helpers import call, contents, toy_runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import cifar
import compare
import evaluate
from utils import checkpoint, conditions, datasets, metrics
from utils.errors import UserError
from utils.eval import Meter, cross_entropy
from utils.lab.landscape import Landscape
from utils.logger import read_log

PNG = b'\x89PNG\r\n\x1a\n'


def probabilities_of(seed, number, classes, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(number, classes, generator=generator)
    return torch.softmax(logits, dim=1).numpy(), torch.randint(classes, (number,), generator=generator).numpy()


# Plain loops

def confusion_by_loop(probabilities, targets):
    classes = len(probabilities[0])
    matrix = [[0] * classes for _ in range(classes)]
    for row, target in zip(probabilities.tolist(), targets.tolist()):
        matrix[target][row.index(max(row))] += 1
    return matrix


def calibration_by_loop(probabilities, targets, bins):
    """Guo et al., equation 3: sum over bins of |B| / n |accuracy - confidence|, where bin m is ((m - 1) / M, m / M]."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [(max(row), row.index(max(row)) == target) for row, target
                  in zip(probabilities.tolist(), targets.tolist())
                  if Fraction(m - 1, bins) < Fraction(max(row)) <= Fraction(m, bins)]
        if inside:
            accuracy = sum(correct for _, correct in inside) / len(inside)
            confidence = sum(share for share, _ in inside) / len(inside)
            error += len(inside) / len(targets) * abs(accuracy - confidence)
    return error


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), number=st.integers(1, 60), classes=st.integers(2, 7),
       sharpness=st.sampled_from([0.5, 3.0, 50.0]))
@example(seed=0, number=3, classes=7, sharpness=3.0)  # classes without an image
def test_accuracy_by_class_and_confusion_by_loop(seed, number, classes, sharpness):
    probabilities, targets = probabilities_of(seed, number, classes, sharpness)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        values, matrix = metrics.of_classes(probabilities, targets)
    expected = confusion_by_loop(probabilities, targets)
    assert matrix.tolist() == expected
    by_class = [100 * row[c] / sum(row) if sum(row) else None for c, row in enumerate(expected)]
    assert [value is None for value in values['class accuracy']] == [value is None for value in by_class]
    present = [value for value in by_class if value is not None]
    assert [value for value in values['class accuracy'] if value is not None] == pytest.approx(present)
    assert values['balanced accuracy'] == pytest.approx(sum(present) / len(present))
    assert values['calibration error'] == pytest.approx(100 * calibration_by_loop(probabilities, targets, 15), abs=1e-9)
    json.dumps(values, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), number=st.integers(1, 60), classes=st.integers(2, 6), bins=st.integers(1, 20))
def test_calibration_error_by_loop(seed, number, classes, bins):
    probabilities, targets = probabilities_of(seed, number, classes)
    expected = calibration_by_loop(probabilities, targets, bins)
    assert metrics.calibration_error(probabilities, targets, bins) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_images_has_no_accuracy_and_one_never_predicted_has_0():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], dtype=np.float32)
    values, matrix = metrics.of_classes(probabilities, np.array([0, 0, 1]))
    assert values['class accuracy'] == [100, 0, None] and values['balanced accuracy'] == 50
    assert matrix.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_a_single_class_is_always_right():
    values, matrix = metrics.of_classes(np.ones((5, 1), dtype=np.float32), np.zeros(5, dtype=int))
    assert values == {'balanced accuracy': 100, 'calibration error': 0,
                      'class accuracy': [100]} and matrix.tolist() == [[5]]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('values, expected', [([1.5], (1.5, None)), ([1, 3], (2, 2 ** 0.5)),
                                              ([math.inf, 1.0], (math.inf, math.nan)),
                                              ([math.nan, 1], (math.nan, math.nan)),
                                              ([math.inf, math.inf], (math.inf, math.nan))])
def test_spread(values, expected):
    np.testing.assert_equal(metrics.spread(values), expected)


def test_balanced_accuracy_counts_every_class_the_same():
    targets = np.array([0] * 98 + [1] * 2)
    probabilities = np.tile(np.array([[0.9, 0.1]], dtype=np.float32), (100, 1))  # always the frequent class
    values, _ = metrics.of_classes(probabilities, targets)
    assert values['balanced accuracy'] == 50 and values['class accuracy'] == [100, 0]
    assert values['calibration error'] == pytest.approx(8, abs=1e-5)  # 98% right at a confidence of 90%


def test_calibration_error_of_certainty():
    certain = np.array([[1.0, 0.0]] * 4, dtype=np.float32)
    assert metrics.calibration_error(certain, np.array([0, 0, 0, 0])) == 0
    assert metrics.calibration_error(certain, np.array([1, 1, 1, 1])) == 1
    assert metrics.calibration_error(certain, np.array([0, 0, 0, 1])) == 0.25


def test_a_confidence_at_an_edge_belongs_to_the_bin_below():
    probabilities, targets = np.array([[0.5, 0.25, 0.25], [0.375, 0.3125, 0.3125]]), np.array([0, 1])
    # Together in (0, 1/2]: |1/2 - 7/16|. Apart it would be the mean of 1/2 and 3/8.
    assert metrics.calibration_error(probabilities, targets, bins=2) == pytest.approx(1 / 16, abs=1e-15)
    above = np.array([[0.5001, 0.25, 0.2499], [0.375, 0.3125, 0.3125]])
    assert metrics.calibration_error(above, targets, bins=2) == pytest.approx((0.4999 + 0.375) / 2)
    quarters = np.full((4, 4), 0.25)
    assert metrics.calibration_error(quarters, np.array([0, 1, 2, 3]), bins=4) == 0


@pytest.mark.parametrize('in_a_tuple', [False, True])
@pytest.mark.parametrize('classes', [3, 10])
def test_predictions_count_what_a_meter_counts_and_keep_all(in_a_tuple, classes):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(size, classes, generator=generator), torch.randint(classes, (size,), generator=generator))
               for size in (8, 8, 3)]
    meter, predictions = Meter(3, classes, 'cpu'), metrics.Predictions(3, classes, 'cpu')
    for logits, targets in batches:
        for counter in (meter, predictions):
            counter.update((logits, None) if in_a_tuple else logits, targets, cross_entropy(logits, targets))
    assert predictions.read() == meter.read() and set(meter.read()) == {'Loss',
                                                                        'Top-1'} | ({'Top-5'} if classes > 5 else set())
    probabilities, targets = predictions.of_all_images()
    assert probabilities.dtype == np.float32 and probabilities.shape == (19, classes) and targets.shape == (19,)
    assert targets.tolist() == [target for _, labels in batches for target in labels.tolist()]
    assert probabilities == pytest.approx(torch.cat([logits for logits, _ in batches]).softmax(dim=1).numpy())
    assert np.trace(metrics.of_classes(probabilities, targets)[1]) / 19 == pytest.approx(meter.read()['Top-1'] / 100)


def test_outputs_in_bfloat16_are_kept_in_float32():
    predictions, logits = metrics.Predictions(1, 3, 'cpu'), torch.tensor([[1.0, 2.0, 3.0]]).bfloat16()
    predictions.update(logits, torch.tensor([2]), torch.tensor(1.0))
    probabilities, _ = predictions.of_all_images()
    assert probabilities.dtype == np.float32 and probabilities == pytest.approx(logits.float().softmax(dim=1).numpy())


def test_in_words_all_of_a_few_classes_and_the_worst_of_many():
    values = {'balanced accuracy': 50.0, 'calibration error': 12.345, 'class accuracy': [75.0, None, 25.0]}
    first, *lines = metrics.class_report(['cat', 'dog', 'emu'], values).splitlines()
    assert first == 'balanced accuracy 50.00% | calibration error 12.35% | accuracy by class:'
    assert [line.split() for line in lines] == [['emu', '25.00%', 'cat', '75.00%']]
    values['class accuracy'] = [float(99 - c) for c in range(100)]
    first, *lines = metrics.class_report([f'class{c}' for c in range(100)], values, at_most=100).splitlines()
    assert 'worst' not in first and len(lines) == 20
    first, *lines = metrics.class_report([f'class{c}' for c in range(100)], values).splitlines()
    assert 'the 20 worst of 100' in first and len(lines) == 4
    assert re.findall(r'class(\d+) (\S+)%', '\n'.join(lines)) == [(str(99 - i), f'{i}.00') for i in range(20)]


@pytest.mark.parametrize('classes', [['cat', 'dog'], ['only'], ['a, b', 'say "c"', '50 %', 'a_b', 'two words', '$5'],
                                     [f'class {c}' for c in range(21)], [f'class {c}' for c in range(100)]], ids=len)
def test_the_confusion_matrix_in_files(classes, tmp_path):
    matrix = np.random.default_rng(0).integers(0, 1000, (len(classes), len(classes)))
    matrix[-1] = 0  # a class without images
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        metrics.write_confusion(matrix, classes, tmp_path / 'table.csv', tmp_path / 'picture.png')
    with open(tmp_path / 'table.csv', newline='') as file:
        header, *rows = csv.reader(file)
    assert header == ['true \\ predicted', *classes]
    assert [row[0] for row in rows] == classes and [list(map(int, row[1:])) for row in rows] == matrix.tolist()
    assert (tmp_path / 'picture.png').read_bytes().startswith(PNG)
    with Image.open(tmp_path / 'picture.png') as picture:
        picture.load()
        assert min(picture.size) >= 300 and len(picture.convert('L').getcolors()) > 1
    assert sorted(os.listdir(tmp_path)) == ['picture.png', 'table.csv']


# evaluate.py

CONDITIONED = '--epochs 3 --val-split 0.25 --imbalance step --imbalance-factor 0.5 --label-noise 0.2 --cutout 4'
# The folders of two finished runs: one with conditions and a validation split, one without.
runs = toy_runs(conditioned=f'-a lenet {CONDITIONED}', plain='-a lenet --method dma --epochs 2')


@pytest.fixture
def evaluated(runs, capsys):
    """A function: flags -> what evaluate.py measured, by class and over all, the batches, and what it printed."""
    def read(flags):
        seen = {}
        measure, of_classes = Landscape.measure, metrics.of_classes

        def recording(landscape, *args, **options):
            seen.update(batches=landscape.batches, measured=measure(landscape, *args, **options))
            return seen['measured']

        def recording_classes(*args):
            seen['by class'], seen['confusion'] = of_classes(*args)
            return seen['by class'], seen['confusion']

        with pytest.MonkeyPatch.context() as within:
            within.setattr(Landscape, 'measure', recording)
            within.setattr(metrics, 'of_classes', recording_classes)
            call(within, evaluate, flags)
        return seen | {'printed': capsys.readouterr().out}
    return read


def result_of(folder):
    return json.loads((folder / 'result.json').read_text())


@pytest.mark.parametrize('name, file', [('conditioned', 'model_best'), ('plain', 'checkpoint')])
def test_it_measures_what_the_run_reported_and_leaves_the_run_as_it_is(name, file, runs, evaluated, tmp_path):
    folder = tmp_path / name
    shutil.copytree(runs / name, folder)
    before, result = contents(folder), result_of(folder)
    seen = evaluated(f'{folder}/{file}.pth.tar')
    after = contents(folder)
    assert {name: after.pop(f'{file}-test-confusion.{name}')[:4] for name
            in ('csv', 'png')} == {'csv': b'true', 'png': PNG[:4]}
    assert after == before
    for name, value in (seen['measured'] | seen['by class']).items():
        assert value == result[f'test {name.lower()}'], name
    assert len(seen['measured']) == 3 and len(seen['by class']['class accuracy']) == 10
    table = (folder / f'{file}-test-confusion.csv').read_bytes()
    assert table == before['confusion.csv'] and table.count(b'\n') == 11
    assert f'of epoch {result["epoch"]} | test loss {result["test loss"]:.4f} top-1' in seen['printed']
    assert f'balanced accuracy {result["test balanced accuracy"]:.2f}%' in seen['printed']
    assert f'calibration error {result["test calibration error"]:.2f}%' in seen['printed']
    assert f'{folder}/{file}-test-confusion.csv' in seen['printed']


def test_on_the_validation_images_it_measures_what_the_log_says(runs, evaluated, tmp_path):
    log, best = read_log(runs / 'conditioned/log.txt'), result_of(runs / 'conditioned')['best']
    seen = evaluated(f'{runs}/conditioned/model_best.pth.tar --mode val -o {tmp_path}')
    assert seen['measured']['Top-1'] == best['top1']
    assert seen['measured']['Loss'] == pytest.approx(log['Val Loss'][best['epoch'] - 1], rel=1e-5)
    last = evaluated(f'{runs}/conditioned/checkpoint.pth.tar --mode val -o {tmp_path}')
    assert last['measured']['Loss'] == pytest.approx(log['Val Loss'][2],
                                                     rel=1e-5) and 'of epoch 3 | val loss' in last['printed']


def test_on_the_training_images_it_reads_those_of_the_run_as_they_are(runs, evaluated, tmp_path):
    args = cifar.make_parser().parse_args('--val-split 0.25 --imbalance step --imbalance-factor 0.5 --imbalance-seed 0 '
                                          '--label-noise 0.2 --manualSeed 2'.split())
    train, val = conditions.apply(args, datasets.load('digits', None, 'train'))
    for mode, split in (('train', train), ('val', val), ('test', datasets.load('digits', None, 'test'))):
        as_they_are = '--no-augment' if mode == 'train' else ''
        seen = evaluated(f'{runs}/conditioned/checkpoint.pth.tar --mode {mode} {as_they_are} -o {tmp_path}')
        assert torch.equal(seen['batches'].labels, split.labels) and torch.equal(seen['batches'].images, split.images)
        assert seen['batches'].cutout == seen['batches'].padding == 0 and seen['batches'].transform is None
        assert seen['confusion'].sum(axis=1).tolist() == split.class_counts()
        assert np.trace(seen['confusion']) / len(split.labels) == pytest.approx(seen['measured']['Top-1'] / 100)


@pytest.mark.parametrize('flags', ['--logit-adjust 0.5', '--tta mirror'])
def test_the_same_network_tested_in_another_way_is_a_run_of_its_own(flags, runs, evaluated, mirrored_digits, tmp_path,
                                                                    monkeypatch, capsys):
    before, other = contents(runs / 'plain'), tmp_path / 'other'
    (tmp_path / 'log.txt').touch()  # of something else
    seen = evaluated(f'{runs}/plain/checkpoint.pth.tar {flags} --as-run {other} -o {tmp_path}')
    assert contents(runs / 'plain') == before and f'as a run     {other}' in seen['printed']
    trained, result = result_of(runs / 'plain'), result_of(other)
    for quantity, value in (seen['measured'] | seen['by class']).items():
        assert result[f'test {quantity.lower()}'] == value
    assert result['test loss'] != trained['test loss'] and result['test ece'] == result['test calibration error']
    for name in ('epoch', 'parameters', 'steps', 'seconds', 'test images', 'chosen by'):
        assert result[name] == trained[name]
    own, log = read_log(runs / 'plain/log.txt'), read_log(other / 'log.txt')
    assert all(log[column] == own[column] for column in own if not column.startswith('Test'))
    assert log['Test Top-1'][-1] == pytest.approx(result['test top-1'], rel=1e-5) == result['best']['top1']
    assert [math.isnan(value) for value in log['Test Top-1']] == [True, False]

    for baseline in ('(none)', flags):
        call(monkeypatch, compare, f'{runs / "plain"} {other} --baseline "{baseline}"')
        printed = capsys.readouterr().out
        assert f'\n{flags} ' in printed and f'Difference: to `{baseline}`' in printed
        assert 'broken' not in printed and 'left out' not in printed
        assert f'{result["test top-1"]:.2f}' in printed and f'{trained["test top-1"]:.2f}' in printed


@pytest.mark.parametrize('file, flags, sentence', [
    ('plain/checkpoint', '--as-run {}/new', 'would be the same run again; give --logit-adjust or another --tta'),
    ('plain/checkpoint', '--tta none --as-run {}/new', 'would be the same run again'),
    ('plain/checkpoint', '--tta mirror --as-run {}/plain', 'there is a run in .*/plain; name another folder'),
    ('plain/checkpoint', '--tta mirror --as-run {}', 'there is a run in .*/'),
    ('plain/checkpoint', '--tta mirror --as-run {}/plain/new', 'there is a run in .*/plain;'),
    ('plain/checkpoint', '--tta mirror --as-run {}/file', 'is not a folder that may be written to; give another'),
    ('early/model_best', '--tta mirror --as-run {}/new', 'has its result of, of epoch 2; .* is of epoch 1'),
    ('conditioned/model_best', '--tta mirror --as-run {}/new', 'needs a run without --val-split'),
    ('unfinished/checkpoint', '--tta mirror --as-run {}/new', 'needs a finished run around .*; unfinished'),
    ('alone/checkpoint', '--tta mirror --as-run {}/new', 'needs a finished run around .*; broken'),
    ('other/checkpoint', '--tta mirror --as-run {}/new', 'is of other flags or another seed than .*/other/args.json')])
def test_it_is_of_the_last_epoch_of_a_finished_run(file, flags, sentence, runs, evaluated, mirrored_digits, tmp_path):
    name = file.split('/')[0]
    folder = shutil.copytree(runs / ('conditioned' if name == 'conditioned' else 'plain'), tmp_path / name)
    (tmp_path / 'file').touch()
    if name == 'unfinished':
        os.remove(folder / 'result.json')
    if name == 'alone':
        os.remove(folder / 'args.json')
    if name == 'other':
        state = torch.load(folder / 'checkpoint.pth.tar', weights_only=True)
        checkpoint.save(folder / 'checkpoint.pth.tar', state | {'args': state['args'] | {'seed': 77}})
    if name == 'early':
        state = torch.load(folder / 'checkpoint.pth.tar', weights_only=True)
        checkpoint.save(folder / 'model_best.pth.tar', state | {'epoch': 1, 'log': state['log'][:2]})
    before = contents(folder)
    with pytest.raises(UserError, match=sentence):
        evaluated(f'{tmp_path}/{file}.pth.tar {flags.format(tmp_path)}')
    assert not (tmp_path / 'new').exists() and contents(folder) == before


@pytest.mark.parametrize('flag', ['--mode train', '--images 5', '--no-augment', '-d digits', '--data x',
                                  '--precision fp64', '--ss 0.1', '--attack fgsm'])
def test_it_is_of_the_test_images_of_the_run(flag, runs, evaluated, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluated(f'{runs}/plain/checkpoint.pth.tar --tta mirror {flag} --as-run {tmp_path}/new')
    assert 'exclude each other: it is of the test images of the run' in capsys.readouterr().err


def test_digits_are_not_mirrored(runs, evaluated, tmp_path):
    with pytest.raises(UserError, match='--tta mirror is not for --dataset digits, whose mirrored images mean'):
        evaluated(f'{runs}/plain/checkpoint.pth.tar --tta mirror -o {tmp_path}')


def test_the_training_images_are_augmented_as_in_training_and_always_the_same(runs, evaluated, tmp_path):
    run = f'{runs}/conditioned/checkpoint.pth.tar --mode train -o {tmp_path}'
    first, again, other, plain = (evaluated(f'{run} {flags}') for flags in ('', '', '--manualSeed 1', '--no-augment'))
    inputs = [torch.cat([inputs for inputs, _ in seen['batches']]) for seen in (first, again, other, plain)]
    assert torch.equal(inputs[0], inputs[1]) and first['measured'] == again['measured']
    assert not torch.equal(inputs[0], inputs[2]) and not torch.equal(inputs[0], inputs[3])
    assert sorted(first['batches'].labels.tolist()) == sorted(plain['batches'].labels.tolist())
    holes = (inputs[0] == 0).all(dim=1).sum(dim=(1, 2))  # the mean colour, where 4 x 4 pixels were cut out
    assert (holes > 0).all() and not (inputs[3] == 0).all(dim=1).any()
    few = evaluated(f'{run} --no-augment --images 20')
    assert len(few['batches'].labels) == 20
    assert len(evaluated(f'{run} --images 9999')['batches'].labels) == len(plain['batches'].labels)


def test_older_spellings_of_evaluate(runs, evaluated, tmp_path):
    new = evaluated(f'{runs}/plain/checkpoint.pth.tar -b 7 -o {tmp_path}')
    old = evaluated(f'--evaluate {runs}/plain/checkpoint.pth.tar --model lenet --mini-batch-size 7 -o {tmp_path}')
    assert old['printed'] == new['printed'] and len(old['batches']) == 9


@pytest.mark.parametrize('flags', ['', '--noise-type normal', '--adapt-type filter', '--adapt-type weight'])
def test_under_noise_mean_and_deviation_over_draws(flags, runs, monkeypatch, capsys, tmp_path):
    losses, tops, clean, measure = [], [], [], Landscape.measure

    def recording(landscape, weights=None, *args, **options):
        measured = measure(landscape, weights, *args, **options)
        if weights is None:
            clean.append((measured, landscape.weights))
        else:
            assert 0 < (weights - clean[0][1]).abs().max()
            losses.append(measured['Loss'])
            tops.append(measured['Top-1'])
        return measured

    monkeypatch.setattr(Landscape, 'measure', recording)
    run = f'{runs}/plain/checkpoint.pth.tar -o {tmp_path}'
    call(monkeypatch, evaluate, f'{run} --ss 0.05 --draws 4 {flags}')
    line = re.search('under noise  ss 0.05 .*', capsys.readouterr().out)[0]
    assert len(set(losses)) == 4
    assert f'loss {np.mean(losses):.4f} +- {np.std(losses, ddof=1):.4f} top-1 {np.mean(tops):.2f} +- ' in line
    call(monkeypatch, evaluate, f'{run} --ss 0.05 --draws 4 {flags}')
    assert line in capsys.readouterr().out  # the same draws again


def test_one_draw_has_no_deviation_and_no_noise_changes_nothing(runs, evaluated, tmp_path):
    printed = evaluated(f'{runs}/plain/checkpoint.pth.tar --ss 0 --draws 1 -o {tmp_path}')['printed']
    loss = re.search(r'test loss (\S+)', printed)[1]
    assert f'1 draw | loss {loss} top-1' in printed and '+-' not in printed


def test_under_attack(runs, evaluated, tmp_path):
    def accuracy(flags):
        printed = evaluated(f'{runs}/conditioned/checkpoint.pth.tar -o {tmp_path} {flags}')['printed']
        attacked = re.search(r'under attack (.*) \| test loss (\S+) top-1 (\S+)%', printed)
        clean = re.search(r'test loss (\S+) top-1 (\S+)%', printed)
        return attacked[1], float(attacked[2]) - float(clean[1]), float(attacked[3]) - float(clean[2])

    assert accuracy('--attack fgsm --attack-eps 0') == ('fgsm, eps 0/255', 0, 0)
    name, weak, lost = accuracy('--attack fgsm')
    assert name == 'fgsm, eps 8/255' and weak > 0 and lost <= 0
    name, strong, lost = accuracy('--attack pgd --attack-eps 32/255 --attack-steps 5')
    assert name == 'pgd, eps 32/255, 5 steps' and strong > weak and lost < 0
    assert accuracy('--attack pgd --attack-eps 32/255 --attack-steps 5')[1] == strong


def test_an_attack_on_images_that_the_model_transforms_is_refused(runs, monkeypatch, tmp_path):
    transforms = {'eval': lambda image: torch.zeros(3, 32, 32)}
    for place in ('utils.batches.input_transform', 'evaluate.input_transform'):
        monkeypatch.setattr(place, lambda args, model: {} if args.no_augment else transforms)
    command = f'{runs}/plain/checkpoint.pth.tar --attack fgsm -o {tmp_path}'
    with pytest.raises(UserError, match='--attack needs to know the pixels.*give --no-augment'):
        call(monkeypatch, evaluate, command)
    call(monkeypatch, evaluate, f'{command} --no-augment')


def test_the_confusion_matrix_goes_where_it_is_told(runs, evaluated, monkeypatch, tmp_path):
    before = contents(runs / 'plain')
    seen = evaluated(f'{runs}/plain/checkpoint.pth.tar -o {tmp_path}/new/folder')
    assert sorted(os.listdir(tmp_path / 'new/folder')) == ['plain-checkpoint-test-confusion.csv',
                                                           'plain-checkpoint-test-confusion.png']
    assert contents(runs / 'plain') == before
    assert f'{tmp_path}/new/folder/plain-checkpoint-test-confusion.png' in seen['printed']
    shutil.copy(runs / 'plain/checkpoint.pth.tar', tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluated('checkpoint.pth.tar --mode train')
    assert {'checkpoint-train-confusion.csv', 'checkpoint-train-confusion.png'} < set(os.listdir(tmp_path))


def test_flags_stand_in_for_those_of_the_run(runs, evaluated, monkeypatch, tmp_path):
    asked, load = [], datasets.load
    monkeypatch.setattr(datasets, 'load', lambda *args: asked.append(args[:3]) or load(*args))
    run = f'{runs}/plain/checkpoint.pth.tar -o {tmp_path}'
    plain, small = evaluated(run), evaluated(f'{run} --test-batch 7 -d mnist --data elsewhere')
    assert asked == [('digits', 'data', 'test'), ('mnist', 'elsewhere', 'test')]
    assert len(plain['batches']) == 1 and len(small['batches']) == 9
    assert small['measured'] == pytest.approx(plain['measured'], rel=1e-5)
    low, full = evaluated(f'{run} --precision bf16')['measured']['Loss'], plain['measured']['Loss']
    assert low != full and low == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize('flags, sentence', [
    ('nowhere.pth.tar', 'there is no checkpoint nowhere.pth.tar'), ('.', '. is a folder'),
    ('cut.pth.tar', 'cut short or damaged'), ('other.pth.tar', 'is not a checkpoint of cifar.py'),
    ('{}/plain/log.txt', 'is not a checkpoint'), ('', 'required: FILE'),
    ('{}/plain/checkpoint.pth.tar --mode val', '--mode val needs a run with --val-split'),
    ('{}/plain/checkpoint.pth.tar --mode training', "invalid choice: 'training'"),
    ('{}/plain/checkpoint.pth.tar --lr 0.1', 'unrecognized arguments: --lr 0.1'),
    ('{}/plain/checkpoint.pth.tar --test-batch 0', 'of at least 1'),
    ('{}/plain/checkpoint.pth.tar {}/plain/checkpoint.pth.tar', 'at most 1 checkpoint can be looked at here, and 2 '
                                                                'were given'),
    ('{}/plain/checkpoint.pth.tar -o /dev/null/new', 'results cannot be written to /dev/null/new, as /dev/null is not '
                                                     'a folder'),
    ('{}/plain/checkpoint.pth.tar --model resnet', 'holds the architecture lenet, but --arch resnet was given'),
    ('{}/plain/checkpoint.pth.tar --no-augment', '--no-augment changes nothing about --mode test'),
    ('{}/plain/checkpoint.pth.tar --draws 3', '--draws is not used without --ss'),
    ('{}/plain/checkpoint.pth.tar --adapt-type filter', '--adapt-type is not used without --ss'),
    ('{}/plain/checkpoint.pth.tar --ss 0.1 --perturb-batch-norm', '--perturb-batch-norm is not used by'),
    ('{}/plain/checkpoint.pth.tar --ss -0.1', 'must be a number of at least 0, was given -0.1'),
    ('{}/plain/checkpoint.pth.tar --attack-eps 8/255', '--attack-eps is not used without --attack'),
    ('{}/plain/checkpoint.pth.tar --attack fgsm --attack-steps 3', '--attack-steps belongs to --attack pgd'),
    ('{}/plain/checkpoint.pth.tar --attack pgd --attack-eps 8', 'from 0 to 1, such as 8/255, was given 8'),
])
def test_a_mistake_is_one_sentence_before_any_data_is_read(flags, sentence, runs, monkeypatch, tmp_path, capsys):
    whole = (runs / 'plain/checkpoint.pth.tar').read_bytes()
    (tmp_path / 'cut.pth.tar').write_bytes(whole[:-1000])
    torch.save({'epoch': 1}, tmp_path / 'other.pth.tar')
    before, of_run = contents(tmp_path), contents(runs / 'plain')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    with pytest.raises((SystemExit, UserError)) as error:
        call(monkeypatch, evaluate, flags.replace('{}', str(runs)))
    printed = capsys.readouterr().err + (str(error.value) if error.type is UserError else '')
    assert sentence in printed and printed.strip().count('\n') == 0
    assert error.type is UserError or error.value.code == 2
    assert contents(tmp_path) == before and contents(runs / 'plain') == of_run


def test_other_classes_are_refused(runs, monkeypatch, tmp_path):
    load = datasets.load
    monkeypatch.setattr(datasets, 'load', lambda *args: load(*args)._replace(classes=list('abcdefghij')))
    for mode in ('test', 'train'):
        with pytest.raises(UserError, match='knows the classes 0 1 2 .* but fashion-mnist has a b c'):
            call(monkeypatch, evaluate, f'{runs}/plain/checkpoint.pth.tar --mode {mode} -d fashion-mnist -o '
                                        f'{tmp_path}/new')
    assert not (tmp_path / 'new').exists()
