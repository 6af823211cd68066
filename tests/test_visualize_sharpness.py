"""Curves and surfaces of the loss: recorded values, resumed scans, pictures, and what is refused."""
import csv
import functools
import json
import math
import shutil
import signal

import matplotlib.figure  # noqa: F401
import numpy as np
import pytest
import torch
from helpers import call, contents, refused, sharpness_golden, toy_runs
from PIL import Image

import visualize_sharpness as visual
from utils.lab import checkpoints
from utils.errors import Stopped, UserError
from utils.lab.landscape import Landscape
from utils.lab.scan import Scan

GOLDEN, landscape_of = sharpness_golden()
NET = '-a resnet --depth 8'
runs = toy_runs(first=NET, second=f'{NET} --manualSeed 3 --method dma', conditioned=f'{NET} --val-split 0.25',
                other='-a lenet',
                margin='-a lenet --method lsoftmax', margin2='-a lenet --method lsoftmax --manualSeed 3')
FEW = '--images 20 -b 10'


def file(runs, name):
    return f'{runs}/{name}/checkpoint.pth.tar'


def table(path):
    with open(path, newline='') as lines:
        header, *rows = csv.reader(lines)
    return header, [[float(value) for value in row] for row in rows]


@pytest.mark.parametrize('path', ['linear', 'sin'])
def test_golden_interpolation(path):
    first, second = landscape_of('master'), landscape_of('slave')
    assert visual.alphas('-1:0.1:2') == pytest.approx(GOLDEN['interp/alpha'].tolist(), abs=1e-12)
    expected = {key: GOLDEN[f'interp/{path}/{key}'] for key in ('loss', 'acc', 'effective_alpha')}
    span = second.weights - first.weights
    for index, alpha in enumerate(visual.alphas('-1:0.1:2')):
        weights, buffers = visual.on_line(first, second, path, alpha)
        share = ((weights - first.weights) @ span / (span @ span)).item()
        assert share == pytest.approx(expected['effective_alpha'][index], abs=1e-10)
        measured = first.measure(weights, buffers)
        assert measured['Loss'] == pytest.approx(expected['loss'][index], rel=1e-9)
        assert measured['Top-1'] == pytest.approx(expected['acc'][index], abs=1e-9)


@pytest.mark.parametrize('text, expected', [
    ('-1:0.1:2', [round(-1 + 0.1 * i, 1) for i in range(31)]),
    ('-0.3:0.02:0.31', [round(-0.3 + 0.02 * i, 2) for i in range(31)]),
    ('0:1:0', [0]), ('1:-0.5:0', [1, 0.5, 0]), ('0:0.3:1', [0, 0.3, 0.6, 0.9]), ('.5:.25:1.', [0.5, 0.75, 1]),
])
def test_alphas(text, expected):
    assert visual.alphas(text) == expected


def test_the_ends_of_a_line_are_the_networks_and_batch_norm_lies_in_between(runs):
    args, subjects = opened(runs, 'first', 'second')
    batches = checkpoints.images_of(subjects[0], 'test', args)
    first, second = (checkpoints.landscape(subject, batches) for subject in subjects)
    place = functools.partial(visual.on_line, first, second, 'linear')
    for alpha, landscape in ((0, first), (1, second)):
        weights, buffers = place(alpha)
        assert torch.equal(weights, landscape.weights)
        assert all(torch.equal(value, landscape.buffers[name]) for name, value in buffers.items()
                   if value.is_floating_point())
        assert first.measure(weights, buffers) == landscape.measure()
    _, middle = place(0.5)
    torch.testing.assert_close(middle['bn1.running_mean'],
                               (first.buffers['bn1.running_mean'] + second.buffers['bn1.running_mean']) / 2)
    assert torch.equal(middle['bn1.num_batches_tracked'], first.buffers['bn1.num_batches_tracked'])
    _, beyond = place(1000.0)
    assert all((value >= 0).all() for name, value in beyond.items() if name.endswith('running_var'))
    assert any((value == 0).any() for name, value in beyond.items() if name.endswith('running_var'))
    assert math.isfinite(first.measure(first.weights, beyond)['Loss'])


def opened(runs, *names):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', ['visualize_sharpness.py', *(file(runs, name) for name in names), *FEW.split()])
        return visual.parse_arguments()


def test_a_line_of_two_checkpoints_in_table_and_pictures(runs, monkeypatch, capsys, tmp_path):
    before = {name: contents(runs / name) for name in ('first', 'second')}
    call(monkeypatch, visual, f'{file(runs, "first")} {file(runs, "second")} --alpha -0.5:0.5:1 {FEW} -o {tmp_path}')
    stem = 'first-checkpoint-to-second-checkpoint-linear'
    assert set(contents(tmp_path)) == {f'{stem}.{ending}' for ending in ('csv', 'json', 'png', 'pdf')}
    assert f'{stem}.pdf' in capsys.readouterr().out
    header, rows = table(tmp_path / f'{stem}.csv')
    assert header == ['alpha', *(f'{part} {name}' for part in ('train', 'test') for name in ('loss', 'top-1', 'top-5'))]
    assert [row[0] for row in rows] == [-0.5, 0, 0.5, 1] and all(math.isfinite(value) for row in rows for value in row)
    assert is_picture(tmp_path / f'{stem}.png') and (tmp_path / f'{stem}.pdf').read_bytes().startswith(b'%PDF')
    args, subjects = opened(runs, 'first', 'second')
    for part, at in (('train', 1), ('test', 4)):
        for subject, row in zip(subjects, (rows[1], rows[3])):
            measured = checkpoints.landscape(subject, checkpoints.images_of(subjects[0], part, args)).measure()
            assert row[at:at + 3] == list(measured.values())
    assert {name: contents(runs / name) for name in before} == before


def is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return min(picture.size) > 300 and len(picture.convert('L').getcolors()) > 5


def test_older_spellings(runs, monkeypatch, tmp_path):
    flags = f'--alpha=0:1:1 {FEW} --mode test'
    call(monkeypatch, visual, f'--slave-evaluate {file(runs, "second")} --evaluate {file(runs, "first")} --model '
                              f'resnet {flags} -o {tmp_path}/a')
    call(monkeypatch, visual, f'{file(runs, "first")} {file(runs, "second")} {flags} -o {tmp_path}/b')
    old, new = contents(tmp_path / 'a'), contents(tmp_path / 'b')
    name = 'first-checkpoint-to-second-checkpoint-linear.csv'
    assert old[name] == new[name] and len(old[name].splitlines()) == 3


def test_a_scan_that_is_broken_off_goes_on_to_the_same_numbers(runs, monkeypatch, tmp_path):
    command = f'{file(runs, "first")} --directions 2 --alpha=-0.2:0.2:0.2 {FEW} --mode test'
    call(monkeypatch, visual, f'{command} -o {tmp_path}/whole')
    measured, measure = [], Landscape.measure

    def interrupted(landscape, *args, **options):
        if len(measured) == 4:
            raise Stopped(signal.SIGINT)
        measured.append(args)
        return measure(landscape, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(Landscape, 'measure', interrupted)
        call(patch, visual, f'{command} -o {tmp_path}/parts')
    path = tmp_path / 'parts/first-checkpoint-directions.csv'
    assert stop.value.sentence == f'Stopped; 4 of 6 points are in {path}. The same command goes on.'
    assert len(table(path)[1]) == 4
    with open(path, 'a') as broken:  # as a power cut may leave it
        broken.write('1,0.2,3.1')
    measured.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Landscape, 'measure', lambda *args, **options: measured.append(args) or measure(*args, **options))
        call(patch, visual, f'{command} -o {tmp_path}/parts')
    whole = contents(tmp_path / 'whole')
    assert len(measured) == 2 and path.read_bytes() == whole['first-checkpoint-directions.csv']
    name = 'first-checkpoint-directions.json'
    assert (tmp_path / 'parts' / name).read_bytes() == whole[name]
    with monkeypatch.context() as patch:  # more directions and alphas are added to the same table
        patch.setattr(Landscape, 'measure', lambda *args, **options: measured.append(args) or measure(*args, **options))
        call(patch, visual, f'{command} --directions 3 --alpha=0:0.2:0.4 -o {tmp_path}/parts')
    assert len(measured) == 2 + 3 + 2 and len(table(path)[1]) == 11


def test_other_settings_are_refused_and_overwrite_begins_anew(runs, monkeypatch, tmp_path):
    command = f'{file(runs, "first")} --alpha=0:1:1 --mode test -o {tmp_path}'
    call(monkeypatch, visual, f'{command} {FEW}')
    before = contents(tmp_path)
    for flags, name in ((f'{FEW} --manualSeed 1', 'seed: 0, and 1'), ('--images 10', 'images test: ."number": 20'),
                        (f'{FEW} --perturb-batch-norm', 'perturb_batch_norm')):
        with pytest.raises(UserError, match=f'made with other settings .{name}.*use --overwrite, or another --out'):
            call(monkeypatch, visual, f'{command} {flags}')
        assert contents(tmp_path) == before
    call(monkeypatch, visual, f'{command} {FEW} --manualSeed 1 --overwrite')
    after = contents(tmp_path)
    assert set(after) == set(before)
    call(monkeypatch, visual, f'{command} {FEW} --update-bn')
    with pytest.raises(UserError, match='made with other settings .training images'):
        call(monkeypatch, visual, f'{command} {FEW} --update-bn --no-augment')
    assert after['first-checkpoint-directions.csv'] != before['first-checkpoint-directions.csv']
    assert json.loads(after['first-checkpoint-directions.json'])['seed'] == 1


def test_directions_move_along_filter_normalised_noise(runs):
    args, (subject,) = opened(runs, 'first')
    landscape = checkpoints.landscape(subject, checkpoints.images_of(subject, 'test', args))
    place = visual.around(landscape, args)
    steps = [place(index, alpha)[0] - landscape.weights for index, alpha in ((0, 0.5), (0, -0.5), (1, 0.5), (0, 0.0))]
    torch.testing.assert_close(steps[0], -steps[1], rtol=0, atol=1e-6)
    assert not torch.allclose(steps[0], steps[2], atol=1e-3) and not steps[3].any()
    weights, moved = landscape.tensors(landscape.weights), landscape.tensors(steps[0])
    torch.testing.assert_close(moved['conv1.weight'].flatten(1).norm(dim=1),
                               0.5 * weights['conv1.weight'].flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    assert not moved['bn1.weight'].any() and moved['head.bias'].any()


def test_a_surface_in_table_and_pictures(runs, monkeypatch, tmp_path):
    call(monkeypatch, visual, f'{file(runs, "conditioned")} --surface --alpha=-0.5:0.5:0.5 {FEW} --mode val test -o '
                              f'{tmp_path}')
    header, rows = table(tmp_path / 'conditioned-checkpoint-surface.csv')
    assert header[:3] == ['alpha', 'beta', 'val loss'] and [row[:2] for row in rows] == [[a, b] for a in (-0.5, 0, 0.5)
                                                                                         for b in (-0.5, 0, 0.5)]
    assert is_picture(tmp_path / 'conditioned-checkpoint-surface.png') and len({row[2] for row in rows}) == 9


def test_several_checkpoints_in_one_figure(runs, monkeypatch, tmp_path):
    files = ' '.join(file(runs, name) for name in ('first', 'second', 'other'))
    call(monkeypatch, visual, f'{files} --compare --directions 2 --alpha=-0.2:0.2:0.2 {FEW} --update-bn -o {tmp_path}')
    assert set(contents(tmp_path)) == {f'compare-directions-update-bn.{ending}' for ending in ('png', 'pdf')} | {
        f'{name}-checkpoint-directions-update-bn.{ending}' for name in ('first', 'second', 'other') for ending
        in ('csv', 'json')}
    assert is_picture(tmp_path / 'compare-directions-update-bn.png')
    losses = {name: [row[2] for row in table(tmp_path / f'{name}-checkpoint-directions-update-bn.csv')[1]] for name
              in ('first', 'second', 'other')}
    assert all(len(values) == 6 and values[1] == values[4] for values
               in losses.values()) and len({values[1] for values in losses.values()}) == 3


def test_statistics_are_estimated_on_the_training_images(runs, monkeypatch, tmp_path):
    losses = []
    for number, flags in enumerate(('', '--update-bn', '--update-bn --no-augment')):
        call(monkeypatch, visual, f'{file(runs, "first")} --alpha=0:1:0 --mode test --images 21 -b 20 {flags} -o '
                                  f'{tmp_path}/{number}')
        name = f'first-checkpoint-directions{"-update-bn" if flags else ""}.csv'
        losses.append(table(tmp_path / str(number) / name)[1][0][2])
    assert len(set(losses)) == 3
    with pytest.raises(UserError, match='--update-bn needs at least two training images'):
        call(monkeypatch, visual, f'{file(runs, "first")} --update-bn --images 1 -o {tmp_path}/one')


@pytest.mark.filterwarnings('error:.*contour')
@pytest.mark.parametrize('losses', [[math.inf, 1.0, math.nan, 0.0], [math.inf], [1.0]])
@pytest.mark.parametrize('kind', ['--directions 2', '--surface'])
def test_losses_without_end_are_drawn_as_gaps(losses, kind, runs, monkeypatch, tmp_path):
    measure, values = Landscape.measure, iter(losses * 9)
    monkeypatch.setattr(Landscape, 'measure', lambda *args: {**measure(*args), 'Loss': next(values)})
    command = f'{file(runs, "first")} --alpha=-1:1:1 {kind} --mode test --images 2 -o {tmp_path}'
    call(monkeypatch, visual, command)
    assert is_picture(tmp_path / f'first-checkpoint-{"surface" if "surface" in kind else "directions"}.png')
    call(monkeypatch, visual, command)  # all of it read back from the table


def test_checkpoints_in_folders_of_one_name_are_told_apart(runs, monkeypatch, capsys, tmp_path):
    for name in ('a', 'b'):
        shutil.copytree(runs / ('first' if name == 'a' else 'second'), tmp_path / name / 'run')
    paths = [f'{tmp_path}/{name}/run/checkpoint.pth.tar' for name in 'ab']
    assert checkpoints.names_of(paths) == ['a/run/checkpoint',
                                           'b/run/checkpoint'] and checkpoints.names_of(paths[:1]) == ['run/checkpoint']
    assert checkpoints.names_of(['x/lr0.1.pth.tar', 'x/lr0.2.pt']) == ['x/lr0.1', 'x/lr0.2']
    shown = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'legend', lambda figure, lines, names, **options: shown.extend(names))
    call(monkeypatch, visual, f'{" ".join(paths)} --compare --alpha=0:1:0 --images 2 --mode test')
    assert shown == ['a/run/checkpoint test', 'b/run/checkpoint test']
    assert all((tmp_path / name / 'run/checkpoint-directions.csv').exists() for name in 'ab')


def test_flags_may_stand_between_the_checkpoints(runs, monkeypatch):
    monkeypatch.setattr(checkpoints, 'open_checkpoint', lambda path, args, parser: path)
    monkeypatch.setattr('sys.argv', ['visualize_sharpness.py', 'first', '--alpha', '-1:1:1', 'second', '--images', '3'])
    assert visual.parse_arguments()[1] == ['first', 'second']


def test_a_line_between_two_runs_of_large_margin_softmax(runs, monkeypatch, tmp_path):
    args, subjects = opened(runs, 'margin', 'margin2')
    assert subjects[0].model.head.beta != 100 and subjects[0].model.head.beta == subjects[1].model.head.beta
    call(monkeypatch, visual, f'{file(runs, "margin")} {file(runs, "margin2")} --alpha=0:0.5:1 {FEW} --precision fp64 '
                              f'-o {tmp_path}')
    rows = table(tmp_path / 'margin-checkpoint-to-margin2-checkpoint-linear.csv')[1]
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row)


@pytest.mark.parametrize('flags, sentence', [
    ('', 'a checkpoint is required: FILE'), ('nowhere.pth.tar', 'there is no checkpoint nowhere.pth.tar'),
    ('{first} {other}', 'there is no line between different networks'),
    ('{first} {other} {second}', '3 checkpoints were given'),
    ('{first} --alpha=1:0.1:0', 'is an empty range'), ('{first} --alpha=0:0:1', 'must be START:STEP:STOP'),
    ('{first} --alpha=0:1', 'must be START:STEP:STOP, such as -1:0.1:2, was given 0:1'),
    ('{first} --alpha=0:inf:1', 'START:STEP:STOP'),
    ('{first} --alpha=nan:1:2', 'START:STEP:STOP'),
    ('{first} --alpha=0:1e-9:1', 'is an empty range, or one without end'),
    ('{first} --path sin', '--path is for two checkpoints'),
    ('{first} {second} --directions 2', '--directions is for random directions'),
    ('{first} {second} --perturb-batch-norm', '--perturb-batch-norm is for random directions'),
    ('{first} {second} --surface', '--surface is around one checkpoint, and 2 were given'),
    ('{first} --compare', 'at least two checkpoints'),
    ('{first} --surface --alpha=0:1:0', '--surface needs at least two values of --alpha'),
    ('{first} {first}', 'a checkpoint is named twice'),
    ('{other} --update-bn', '--update-bn is not used by networks without BatchNorm'),
    ('{other} --perturb-batch-norm', '--perturb-batch-norm is not used by'),
    ('{first} --surface --directions 3', '--directions is for random directions around a checkpoint'),
    ('{first} --mode val', '--mode val needs a run with --val-split'),
    ('{first} --mode test --no-augment', '--no-augment changes nothing'),
    ('{first} -o /dev/null/new', 'results cannot be written to /dev/null/new, as /dev/null is not a folder'),
    ('{first} --model vgg16', 'holds the architecture resnet, but --arch vgg16 was given'),
    ('{first} --data elsewhere', '--data is not used by'),
])
def test_a_mistake_is_one_sentence_before_any_data_is_read(flags, sentence, runs, monkeypatch, tmp_path, capsys):
    flags = flags.format(**{name: file(runs, name) for name in ('first', 'second', 'other')})
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags, visual) and contents(tmp_path) == {}


# utils/scan.py

def test_a_scan_keeps_every_digit(tmp_path):
    values = [1 / 3, 1e-300, math.inf, 123456789.123456789]
    first = Scan(f'{tmp_path}/new/a', {'x': 1}, ['alpha', *'pqrs'], 1)
    first.append((0.1,), values)
    again = Scan(f'{tmp_path}/new/a', {'x': 1}, ['alpha', *'pqrs'], 1)
    assert again.rows == {(0.1,): values} and again.column('r', [(0.1,)]) == [math.inf]


@pytest.mark.parametrize('text', ['', 'alpha,q\n', 'alpha,p\n1,2,3\n', 'alpha,p\n1\n', 'alpha,p\n1,two\n',
                                  'binary \0\n'])
def test_a_table_of_something_else_is_refused(tmp_path, text):
    Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1)
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(UserError, match='a.csv is not the table of this scan'):
        Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1)
    assert (tmp_path / 'a.csv').read_text() == text
    (tmp_path / 'a.json').write_text('[')
    with pytest.raises(UserError, match='a.json is not what this script writes'):
        Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1)
    (tmp_path / 'a.json').unlink()
    with pytest.raises(UserError, match='a.csv is there without .*a.json'):
        Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1)
    assert (tmp_path / 'a.csv').read_text() == text
    assert Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1, overwrite=True).rows == {}


def test_a_half_written_row_is_dropped(tmp_path):
    Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1).append((1,), [2])
    with open(tmp_path / 'a.csv', 'a') as file:
        file.write('2,3')
    again = Scan(f'{tmp_path}/a', {}, ['alpha', 'p'], 1)
    again.append((2,), [3.5])
    assert table(tmp_path / 'a.csv')[1] == [[1, 2], [2, 3.5]] and np.isclose(again.column('p', [(1,), (2,)]),
                                                                             [2, 3.5]).all()
