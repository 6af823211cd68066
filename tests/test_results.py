"""From finished runs to a table in a document: coefficients by validation, what is kept, what is printed."""
import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest
from matplotlib import image

from helpers import contents, write_run
from utils.errors import UserError
from utils.lab import choose, keep, plots

ROOT = pathlib.Path(__file__).parent.parent
CLEAN = {'environment': {'commit': 'abc1234', 'torch': '2.15.0', 'device': 'cpu'}}


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    return importlib.import_module('results')


def call(monkeypatch, module, *words):
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, words)])
    module.main()


# Coefficients by validation

@pytest.fixture
def trials(tmp_path):
    """The first is better in its best epoch and on the test set, the second in its last epoch of validation."""
    for name, coef, curve, top1 in (('dma-coef-0.1', 0.1, (70.0, 50.0), 99.0), ('dma-coef-1', 1, (40.0, 52.0), 20.0)):
        for seed in (101, 102):
            write_run(tmp_path / 'dma' / name / f'seed{seed}', f'--val-split 0.1 --method dma --dma-coef {coef}',
                      seed=seed, curve=(curve[0], curve[1] + seed % 2), top1=top1)
    return tmp_path / 'dma'


def test_the_last_epoch_on_validation_images_chooses(trials, monkeypatch, capsys):
    call(monkeypatch, choose, trials)
    assert capsys.readouterr().out == 'dma-coef-1\n'
    call(monkeypatch, choose, trials, '--markdown')
    assert capsys.readouterr().out.splitlines()[2:] == ['| dma: dma-coef-0.1 | 2 | 50.50 +- 0.71 |  |',
                                                        '| dma: dma-coef-1 | 2 | 52.50 +- 0.71 | chosen |']


def test_a_trial_that_lacks_a_seed_is_not_chosen(trials, monkeypatch, capsys):
    (trials / 'dma-coef-1/seed102/result.json').unlink()
    call(monkeypatch, choose, trials)
    printed = capsys.readouterr()
    assert printed.out == 'dma-coef-0.1\n'
    assert f'left out: {trials}/dma-coef-1 (no finished run of seed 102)' in printed.err


def test_a_trial_is_one_setting(trials, monkeypatch):
    write_run(trials / 'dma-coef-1/seed103', '--val-split 0.1 --method dma --dma-coef 1 --lr 0.3', seed=103)
    with pytest.raises(UserError, match='dma-coef-1 has runs of several settings .lr., and a trial is one setting'):
        call(monkeypatch, choose, trials)
    with pytest.raises(UserError, match='is a run itself; name a folder with a folder for each trial'):
        call(monkeypatch, choose, trials / 'dma-coef-0.1/seed101')


def test_runs_without_validation_images_cannot_choose(trials, monkeypatch):
    write_run(trials / 'other' / 'seed101', seed=101)
    with pytest.raises(UserError, match='has no validation images, by which it could be chosen; it needs --val-split'):
        call(monkeypatch, choose, trials)


# What is kept

@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(keep, 'ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'results'


def test_what_was_measured_of_a_run_is_kept_too(kept, tmp_path, monkeypatch, capsys):
    entry = {'measure': 'margins', 'settings': {'checkpoint': {'epoch': 3}, 'images': {'mode': 'test'}},
             'result': {'logit margin': {'mean': 1.5}}}
    files = {'checkpoint-margins.json': [entry], 'model_best-sharpness.json': []}
    write_run(tmp_path / 'checkpoints/seed1', args=CLEAN, files=files)
    call(monkeypatch, keep, 'checkpoints')
    found = contents(kept / 'seed1')
    assert found.keys() == {'args.json', 'log.txt', 'result.json', *files}
    assert json.loads(found['checkpoint-margins.json']) == [entry]
    write_run(tmp_path / 'checkpoints/seed2', args=CLEAN, files={'checkpoint-margins.json': '[{"settings":'})
    with pytest.raises(UserError, match='1 of 2 runs cannot be kept'):
        call(monkeypatch, keep, 'checkpoints')
    assert 'seed2/checkpoint-margins.json is not what measure_margins.py' in capsys.readouterr().err


def test_three_files_of_a_finished_run_are_kept_at_its_place(kept, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / 'checkpoints/few/none/seed1', args=CLEAN, files={'checkpoint.pth.tar': 'x', 'log.png': 'x'})
    write_run(tmp_path / 'elsewhere/run', args=CLEAN)
    call(monkeypatch, keep, 'checkpoints', tmp_path / 'elsewhere')
    assert capsys.readouterr().out == '2 runs are in results/\n'
    found = contents(kept / 'few/none/seed1')
    assert found.keys() == {'args.json', 'log.txt', 'result.json'}
    written = contents(tmp_path / 'checkpoints/few/none/seed1')
    args, given = (json.loads(files.pop('args.json')) for files in (found, written))
    assert found.items() <= written.items()
    assert given['checkpoint'] == str(tmp_path / 'checkpoints/few/none/seed1')
    assert args == given | {'checkpoint': 'results/few/none/seed1'}  # no path of the machine
    found['args.json'] = args
    assert sorted(path.name for path in (kept / 'elsewhere/run').iterdir()) == sorted(found)


@pytest.mark.parametrize('what, change, words', [
    ('unfinished', {'files': {'result.json': None}}, 'epoch 3 of 3, but no result.json'),
    ('with changes', {'args': {'environment': {'commit': 'abc1234 with changes'}}}, 'commit the changes'),
    ('tested later', {'args': {'environment': {'commit': 'abc1234 with changes, def5678'}}}, 'commit the changes'),
    ('trained somewhere', {'args': {'environment': {'commit': 'unknown, def5678'}}}, 'commit unknown, def5678'),
    ('no commit', {'args': {'environment': {'commit': None}}}, 'commit unknown'),
    ('mixed', {'args': {**CLEAN, 'changes': ['after epoch 1: lr 0.1 -> 0.2']}}, 'lr 0.1 -> 0.2'),
    ('damaged', {'args': {**CLEAN, 'check sum': '00000000'}}, 'args.json is not what the run wrote')])
def test_what_nobody_could_repeat_is_refused(what, change, words, kept, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / 'checkpoints/a', **change)
    write_run(tmp_path / 'checkpoints/b', args=CLEAN)
    with pytest.raises(UserError, match='1 of 2 runs cannot be kept'):
        call(monkeypatch, keep, 'checkpoints')
    assert re.search(f'^refused: .*{re.escape(words)}', capsys.readouterr().err, re.MULTILINE)
    assert [path.name for path in kept.iterdir()] == ['b']


def test_a_kept_run_is_not_replaced_by_another(kept, tmp_path, monkeypatch, capsys):
    for name, top1 in (('dma', 60.0), ('none', 50.0)):
        write_run(tmp_path / f'elsewhere/{name}/seed1', args=CLEAN, top1=top1)
    call(monkeypatch, keep, 'elsewhere')  # each below the folder that was named
    assert sorted(path.parent.relative_to(kept).as_posix() for path in kept.rglob('result.json')) == [
        'elsewhere/dma/seed1', 'elsewhere/none/seed1']
    with pytest.raises(UserError, match='1 of 2 runs cannot be kept'):
        call(monkeypatch, keep, 'elsewhere/dma/seed1', 'elsewhere/none/seed1')
    assert 'refused: elsewhere/none/seed1 (results/seed1 is another run; remove that' in capsys.readouterr().err
    assert json.loads((kept / 'seed1/result.json').read_text())['test top-1'] == 60
    call(monkeypatch, keep, 'elsewhere/dma/seed1')  # the same again
    (kept / 'seed1/result.json').write_text('<<<<<<< HEAD')
    with pytest.raises(UserError, match='1 of 1 runs cannot be kept'):
        call(monkeypatch, keep, 'elsewhere/dma/seed1')
    assert '(results/seed1 is damaged, as result.json is not JSON' in capsys.readouterr().err


def test_a_run_behind_a_link_is_kept_at_the_place_of_the_link(kept, tmp_path, monkeypatch):
    write_run(tmp_path / 'disk/x', args=CLEAN)
    (tmp_path / 'checkpoints/a').mkdir(parents=True)
    (tmp_path / 'checkpoints/a/seed1').symlink_to(tmp_path / 'disk/x')
    call(monkeypatch, keep, 'checkpoints')
    assert (kept / 'a/seed1/result.json').exists() and not (kept / 'x').exists()


def test_what_was_measured_before_goes_with_its_file(kept, tmp_path, monkeypatch):
    write_run(tmp_path / 'checkpoints/a', args=CLEAN, files={'checkpoint-sharpness.json': '[]'})
    call(monkeypatch, keep, 'checkpoints')
    assert (kept / 'a/checkpoint-sharpness.json').exists()
    (tmp_path / 'checkpoints/a/checkpoint-sharpness.json').unlink()
    call(monkeypatch, keep, 'checkpoints')
    assert not (kept / 'a/checkpoint-sharpness.json').exists()


def test_the_script_keeps_a_run_named_from_anywhere(tmp_path):
    write_run(tmp_path / 'runs/a', files={'result.json': None})
    done = subprocess.run([ROOT / 'scripts/keep.sh', 'runs'], cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stdout == '0 runs are in results/\n'
    assert 'but no result.json' in done.stderr and done.stderr.endswith('error: 1 of 1 runs cannot be kept\n')


# What is printed

@pytest.mark.parametrize('name', ['results', 'tables', 'mechanisms'])
def test_every_table_of_a_document_is_what_the_runs_say(name, results, monkeypatch):
    """A picture is drawn, but not kept."""
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: None)
    assert f'docs/{name}.md' in (ROOT / 'Makefile').read_text()
    tables = results.tables((ROOT / f'docs/{name}.md').read_text(encoding='utf-8'))
    assert len(tables) >= 4
    for words, shown in tables:
        assert results.printed(words).strip() == shown.strip(), words


SIGNED = r'[+-]\d+(?:\.\d+)?'
CELLS = [tuple(map(float, cell)) for document in (ROOT / 'docs').glob('*.md')
         for line in document.read_text(encoding='utf-8').splitlines() if line.startswith('| ')
         for cell in re.findall(rf'({SIGNED}) \[({SIGNED}), ({SIGNED})\]', line)]


def is_of_a_table(claim):
    """Whether a difference and its interval, as text, are those of a cell, rounded to as many digits."""
    units = [10 ** -len(number.partition('.')[2]) for number in claim]
    return any(all(abs(float(number) - value) < 0.51 * unit + 0.005 for number, value, unit in zip(claim, cell, units))
               for cell in CELLS)


@pytest.mark.parametrize('name, at_least', [('README.md', 15), ('docs/results.md', 20)])
def test_every_interval_that_the_prose_states_is_in_a_table(name, at_least):
    """With the difference, which is the last number with a sign before it."""
    lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
    prose = '\n'.join(line for line in lines if name == 'README.md' or not line.startswith('| '))
    word = rf'(?<![\w.-]){SIGNED}'
    claims = re.findall(rf'(?={word})({SIGNED})(?:(?!{word})[^\[\]])*\[({SIGNED}),\s+({SIGNED})\]', prose)
    assert len(claims) == len(re.findall(rf'\[{SIGNED},\s+{SIGNED}\]', prose)) >= at_least
    assert [claim for claim in claims if not is_of_a_table(claim)] == []
    assert not is_of_a_table(('+1.9', '+1.8', '+99')) and not is_of_a_table(('+77.1', '+1.5', '+2.4'))


def test_a_command_is_run_as_the_document_has_it(results, tmp_path):
    write_run(tmp_path / 'a', args=CLEAN)
    assert '| `(none)` | 1 |' in results.printed(['compare.py', str(tmp_path), '--markdown'])
    before = sys.argv, pathlib.Path.cwd()
    with pytest.raises(SystemExit, match='^error: python compare.py nowhere --markdown: there is no folder nowhere$'):
        results.printed(['compare.py', 'nowhere', '--markdown'])
    assert (sys.argv, pathlib.Path.cwd()) == before


def test_a_table_is_printed_again_and_the_text_around_it_stays(results, monkeypatch, tmp_path, capsys):
    document = tmp_path / 'doc.md'
    command = '    python compare.py results/a \\\n        --markdown\n\n'
    document.write_text(f'before\n\n{command}old\ntable\n<!-- end -->\nafter\n')
    monkeypatch.setattr(results, 'printed', lambda words: f'| {" ".join(words)} |\n\n')
    call(monkeypatch, results, document)
    new = '| compare.py results/a --markdown |\n\n'
    assert document.read_text() == f'before\n\n{command}{new}<!-- end -->\nafter\n'
    assert capsys.readouterr().out == new
    call(monkeypatch, results, document)
    assert document.read_text().count('after') == 1
    document.write_text(f'{command}old\n\ntext\n\n{command}old\n<!-- end -->\n')
    with pytest.raises(SystemExit, match='has 2 commands, and 1 tables that end with <!-- end -->; each needs one'):
        call(monkeypatch, results, document)
    assert 'text' in document.read_text()
    document.write_text('nothing')
    with pytest.raises(SystemExit, match='has no table that a command of compare.py prints'):
        call(monkeypatch, results, document)
    for words, sentence in (([tmp_path / 'no.md'], 'there is no document'), ([], 'name the documents')):
        with pytest.raises(SystemExit, match=sentence):
            call(monkeypatch, results, *words)


def test_every_kept_run_is_whole_and_of_a_commit():
    """Of each run three files and what was measured of it, none with uncommitted changes or a path of a machine; the
    number of runs of the first table.
    """
    folders = {path.parent for path in (ROOT / 'results').rglob('*')
               if path.is_file() and path.name != 'condition.txt'}
    folders -= {path for path in folders if path.is_relative_to(ROOT / 'results/figures')}
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert names - {*keep.MEASURED} == {'args.json', 'log.txt', 'result.json'}
        args = json.loads((folder / 'args.json').read_text())
        assert args['environment']['commit'] and 'changes' not in args['environment']['commit']
        assert not pathlib.PurePath(args['checkpoint']).is_absolute()
    assert len(folders) >= 132


def test_the_figures_of_the_methods_are_drawn_from_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'scripts'))
    figures = importlib.import_module('figures')
    monkeypatch.setattr(sys, 'argv', ['figures.py', str(tmp_path)])
    figures.main()
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for draw in figures.FIGURES:
        drawn = image.imread(tmp_path / f'{draw.__name__}.png')
        kept = image.imread(ROOT / f'docs/figures/{draw.__name__}.png')
        assert drawn.shape == kept.shape and drawn.shape[2] == 4 and drawn[0, 0, 3] == 0  # transparent
        assert (drawn[..., 3] > 0).mean() > 0.01
        assert re.search(rf'!\[[^]]{{40,}}\]\(docs/figures/{draw.__name__}\.png\)', readme), draw.__name__
    lines = {}
    monkeypatch.setattr(figures, 'curves', lambda figure, of, method, **labels: lines.update(
        {name: dict(of(name)) for name in ('none', method)}))
    figures.dma(None)
    assert len(lines['none']) == len(lines['dma']) == 15
    for epoch in (1, 15):
        entry = json.loads((ROOT / f'results/figures/dma/epoch{epoch:02d}-margins.json').read_text())[0]
        assert lines['dma'][epoch] == entry['result']['angle to the nearest class weight']['mean']
