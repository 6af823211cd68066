"""compare.py --measured: numbers that were measured of checkpoints, over the seeds of each setting."""
import json

import pytest

import compare
from helpers import call, write_run
from utils.errors import UserError

IMAGES = {'mode': 'test', 'number': 100, 'crc32': 7}


def margins(value, images=IMAGES, epoch=3, **settings):
    """An entry of measure_margins.py."""
    summary = {'mean': value, 'deviation': 2 * value, '5%': value - 1, 'median': value + 10}
    return {'measure': 'angles', 'settings': {'checkpoint': {'epoch': epoch, 'crc32': int(99 * value)},
                                              'images': images, **settings},
            'result': {'angular margin': summary, 'mean angle between class means': value + 50}, 'seconds': 1.0}


def sharpness(**results):
    return [{'measure': measure, 'settings': {'checkpoint': {'epoch': 3}, 'images': IMAGES, 'seed': 1},
             'result': result, 'seconds': 1.0} for measure, result in results.items()]


@pytest.fixture
def runs(tmp_path):
    """Six seeds each of a plain network and of dma, whose angular margin is larger by 5 to 5.5."""
    for seed in range(6):
        for name, flags, value in (('none', '', 10 + seed), ('dma', '--method dma', 15 + 1.1 * seed)):
            write_run(tmp_path / name / f'{seed}', flags, seed=seed, top1=80.0 + seed,
                      files={'checkpoint-margins.json': [margins(value)]})
    return tmp_path


def rows(monkeypatch, capsys, words):
    call(monkeypatch, compare, f'{words} --csv')
    header, *lines = capsys.readouterr().out.splitlines()
    found = [dict(zip(header.split(','), line.split(','))) for line in lines]
    return {row['setting'].strip('"').split(' ')[-1]: row for row in found}


def test_means_differences_and_verdicts_over_the_seeds(runs, monkeypatch, capsys):
    found = rows(monkeypatch, capsys, f'{runs} --measured "angular margin"')
    assert float(found['(none)']['angular margin mean']) == pytest.approx(12.5)
    assert float(found['dma']['angular margin mean']) == pytest.approx(17.75)
    assert float(found['dma']['paired difference mean']) == pytest.approx(5.25)
    assert found['dma']['verdict'] == 'higher' and 'top-1 mean' not in found['dma']


def test_the_statistic_is_over_the_images(runs, monkeypatch, capsys):
    for statistic, expected in (('deviation', 25.0), ('5%', 11.5), ('median', 22.5)):
        found = rows(monkeypatch, capsys, f'{runs} --measured "angular margin" --statistic {statistic}')
        assert float(found['(none)']['angular margin mean']) == pytest.approx(expected)
    found = rows(monkeypatch, capsys, f'{runs} --measured "mean angle between class means" --statistic median')
    assert float(found['(none)']['mean angle between class means mean']) == pytest.approx(62.5)  # one number, no images


def test_accuracy_beside_it(runs, monkeypatch, capsys):
    call(monkeypatch, compare, f'{runs} --metric top1 --measured "angular margin"')
    text = capsys.readouterr().out
    assert '82.50 +- 1.87' in text and '12.5 +- 1.871' in text
    assert 'ngular margin: mean over the images, where each image has one, in degrees; ' in text


def test_numbers_of_measure_sharpness(tmp_path, monkeypatch, capsys):
    results = {'loss': {'Loss': 0.1, 'Top-1': 9}, 'ball': {'rise': 2.5}, 'noise': {'rise': 0.25, 'deviation': 1},
               'box': {'sharpness': 3.0, 'corners': {'sharpness': 4.0}}, 'trace': {'trace': 7.0},
               'eigenvalues': {'largest': [6.0, 5.0]}}
    write_run(tmp_path / 'a', files={'checkpoint-sharpness.json': sharpness(**results)})
    names = {'test loss': 0.1, 'ball': 2.5, 'noise': 0.25, 'box': 3, 'box corners': 4, 'trace': 7,
             'largest eigenvalue': 6}
    found = rows(monkeypatch, capsys, f'{tmp_path} --measured ' + ' '.join(f'"{name}"' for name in names))['(none)']
    assert {name: float(found[f'{name} mean']) for name in names} == names
    write_run(tmp_path / 'b', seed=2, files={'checkpoint-sharpness.json': sharpness(box={'sharpness': 1.0})})
    call(monkeypatch, compare, f'{tmp_path} --measured "box corners"')
    assert f'left out: {tmp_path}/b (no finite box corners was measured of its result)' in capsys.readouterr().out


def test_the_loss_is_named_after_its_images(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / 'a', files={'checkpoint-sharpness.json': sharpness(loss={'Loss': 0.25})})
    assert float(rows(monkeypatch, capsys, f'{tmp_path} --measured "test loss"')['(none)']['test loss mean']) == 0.25
    with pytest.raises(UserError, match='--measured train loss is in none of these runs; measured are test loss'):
        call(monkeypatch, compare, f'{tmp_path} --measured "train loss"')


@pytest.mark.parametrize('value', ['NaN', '-Infinity'])
def test_a_number_that_is_not_finite_is_left_out(value, runs, monkeypatch, capsys):
    (runs / 'dma/3/checkpoint-margins.json').write_text(json.dumps([margins(15.0)]).replace('15.0', value))
    call(monkeypatch, compare, f'{runs} --measured "angular margin"')
    printed = capsys.readouterr().out
    assert 'nan' not in printed and f'left out: {runs}/dma/3 (no finite angular margin was measured' in printed


def test_what_is_not_asked_for_is_not_read(runs, monkeypatch, capsys):
    (runs / 'dma/3/checkpoint-margins.json').write_text('not JSON')
    call(monkeypatch, compare, str(runs))
    assert '82.50 +- 1.87' in capsys.readouterr().out


def test_images_that_do_not_count_are_told(runs, monkeypatch, capsys):
    for seed, missing in ((2, 1), (4, 3)):
        entry = margins(15.0 + seed)
        entry['result']['angular margin']['not found'] = missing
        (runs / f'dma/{seed}/checkpoint-margins.json').write_text(json.dumps([entry]))
    call(monkeypatch, compare, f'{runs} --measured "angular margin"')
    number = IMAGES['number']
    assert (f'not all images: angular margin was not found of 1 of {number} in {runs}/dma/2, 3 of {number} in '
            f'{runs}/dma/4; they do not count') in capsys.readouterr().out
    call(monkeypatch, compare, f'{runs} --measured "mean angle between class means"')
    assert 'not all images' not in capsys.readouterr().out


def test_what_was_measured_of_an_earlier_checkpoint_does_not_count(runs, monkeypatch, capsys):
    def of(crc32, value, epoch=3):
        entry = margins(value, epoch=epoch)
        entry['settings']['checkpoint']['crc32'] = crc32
        return entry

    for earlier in (of(1, 99.0), of(1, 99.0, epoch=2)):  # the run was trained again, or further
        (runs / 'none/0/checkpoint-margins.json').write_text(json.dumps([earlier, of(2, 10.0)]))
        found = rows(monkeypatch, capsys, f'{runs} --measured "angular margin"')
        assert float(found['(none)']['angular margin mean']) == pytest.approx(12.5)


def test_of_a_run_with_validation_images_the_best_epoch_counts(tmp_path, monkeypatch, capsys):
    files = {'checkpoint-margins.json': [margins(1.0)], 'model_best-margins.json': [margins(2.0, epoch=2)]}
    write_run(tmp_path / 'a', '--val-split 0.1', curve=(40.0, 60.0, 50.0), files=files)
    found = rows(monkeypatch, capsys, f'{tmp_path} --measured "angular margin"')
    assert float(found['(none)']['angular margin mean']) == 2


@pytest.mark.parametrize('entries, sentence', [
    ([margins(1.0, images={**IMAGES, 'number': 50})], 'was measured in several ways'),
    ([margins(1.0, precision='bf16')], 'was measured in several ways, and one is to be compared: precision None and '
                                       'bf16; measure all in one command'),
    ([margins(1.0, epoch=2)], 'is of epoch 2, and the result of its run of epoch 3; measure it again'),
    ([{'measure': 'angles'}], 'is not what measure_margins.py or measure_sharpness.py writes'),
    ({'measure': 'angles'}, 'is not what measure_margins.py or measure_sharpness.py writes'),
])
def test_what_does_not_fit_is_refused(runs, entries, sentence, monkeypatch):
    (runs / 'none/0/checkpoint-margins.json').write_text(json.dumps(entries))
    with pytest.raises(UserError, match=sentence):
        call(monkeypatch, compare, f'{runs} --measured "angular margin"')


def test_training_images_may_be_those_that_the_seed_draws(runs, monkeypatch, capsys):
    def measure(of_seed):
        for name in ('none', 'dma'):
            for seed in range(6):
                entry = margins(10.0 + seed, images={**IMAGES, 'mode': 'train', 'crc32': of_seed(name, seed)})
                (runs / f'{name}/{seed}/checkpoint-margins.json').write_text(json.dumps([entry]))

    measure(lambda name, seed: seed)
    assert rows(monkeypatch, capsys, f'{runs} --measured "angular margin"')['dma']['n'] == '6'
    measure(lambda name, seed: f'{name}{seed}' if seed == 4 else seed)
    with pytest.raises(UserError, match='angular margin was measured on other images in .*/(dma|none)/4 than in '
                                        '.*/(none|dma)/4, a run of the same seed; measure both again'):
        call(monkeypatch, compare, f'{runs} --measured "angular margin"')


def test_one_file_of_two_sets_of_training_images_is_refused(runs, monkeypatch):
    both = [margins(10.0, images={**IMAGES, 'mode': 'train', 'crc32': crc32}) for crc32 in (1, 2)]
    (runs / 'none/0/checkpoint-margins.json').write_text(json.dumps(both))
    with pytest.raises(UserError, match='has angular margin of two sets of train images; move it away and measure'):
        call(monkeypatch, compare, f'{runs} --measured "angular margin"')


def test_two_measurements_are_no_matter_where_one_is_common(runs, monkeypatch, capsys):
    both = [margins(10.0, images={**IMAGES, 'number': 50}), margins(10.0)]
    (runs / 'none/0/checkpoint-margins.json').write_text(json.dumps(both))
    assert rows(monkeypatch, capsys, f'{runs} --measured "angular margin"')['(none)']['n'] == '6'


def test_names_that_are_unknown_and_flags_that_do_nothing(runs, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match='--measured angle is in none of these runs; measured are angular margin; mean'):
        call(monkeypatch, compare, f'{runs} --measured angle')
    write_run(tmp_path / 'other/a')
    with pytest.raises(UserError, match='nothing was measured of their results'):
        call(monkeypatch, compare, f'{tmp_path}/other --measured "angular margin"')
    with pytest.raises(SystemExit):
        call(monkeypatch, compare, f'{runs} --statistic median')
    assert '--statistic is of --measured, which is not given' in capsys.readouterr().err
