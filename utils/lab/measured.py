"""What measure_margins.py and measure_sharpness.py have left beside the checkpoints of runs, as numbers to compare."""
import json
import math
import os
from typing import NamedTuple

from utils.errors import UserError
from utils.files import read_json
from utils.lab.runs import Metric
from utils.output import BEST, LAST, MEASURED

STATISTICS = ('mean', 'deviation', '5%', 'median')
# measure_sharpness.py: what its table shows -> where it is in the result of a measure. A place that is not there is of
# another way to measure, such as in random manifolds.
SHARPNESS = {'loss': {'loss': ('Loss',)}, 'box': {'box': ('sharpness',), 'box corners': ('corners', 'sharpness')},
             'ball': {'ball': ('rise',)}, 'noise': {'noise': ('rise',)}, 'trace': {'trace': ('trace',)},
             'eigenvalues': {'largest eigenvalue': ('largest', 0)}}


def files_of(chosen):
    """The names of the files about a run's result. chosen: the run's result is that of the epoch that validation chose.
    """
    return MEASURED[BEST if chosen else LAST]


# The end of a name -> what it is, for a line below a table.
MEANINGS = {'box': 'the highest loss in a box around the weights, found by L-BFGS, as a rise in percent of 1 + loss',
            'box corners': 'the same, found by steps from corner to corner',
            'ball': 'the highest rise of the loss found in balls around the weights',
            'noise': 'the mean rise of the loss under noise on the weights',
            'trace': 'of the Hessian of the loss', 'largest eigenvalue': 'of the Hessian of the loss',
            'loss': 'mean cross-entropy of the network in evaluation'}
# Part of a name -> the unit of what each image has.
UNITS = {'angle': 'degrees', 'angular': 'degrees', 'distance': 'normalised pixels, or units of the layer',
         'upper bound': 'normalised pixels'}


def of_measured(name, statistic):
    meaning = next((meaning for end, meaning in MEANINGS.items() if name.endswith(end)), None)
    if meaning is None:
        units = [unit for part, unit in UNITS.items() if part in name]
        meaning = ', in '.join([f'{statistic} over the images, where each image has one', *units[:1]])
    return Metric(name, f'{name}: {meaning}', 'higher', 'lower', form='.4g')


def add_measured(runs, names, statistic):
    """Put into the `values` of each run the numbers of these names, None where a run has none.

    Returns lines about images that do not count, as what was measured of them is not finite. UserError for a name that
    no run has, or where two runs were measured in different ways: with other images, layers, precision or settings.
    Only the images that a run's seed draws, those of training and validation, may be others in runs of other seeds.
    """
    lines = []
    found = [numbers_of(one, statistic) for one in runs]
    known = list(dict.fromkeys(name for held in found for name, _ in held))
    for name in names:
        if name not in known:
            what = f'measured are {"; ".join(known)}' if known else 'nothing was measured of their results'
            raise UserError(f'--measured {name} is in none of these runs; {what}')
        ways = [[way for held_name, way in held if held_name == name] for held in found]
        shared = set.intersection(*(set(own) for own in ways if own))
        if len(shared) != 1:
            first, second = list(dict.fromkeys(way for own in ways for way in own))[:2]
            raise UserError(f'{name} was measured in several ways, and one is to be compared: '
                            f'{_differing(first, second)}; measure all in one command, and move away the files of '
                            'other measurements')
        way, = shared
        images, lacking = {}, []
        for one, held in zip(runs, found):
            one.values[name], drawn, missing = held.get((name, way), Number(None, None, 0))
            lacking += [(one.folder, missing)] if missing else []
            if drawn is not None and images.setdefault(one.seed, (drawn, one.folder))[0] != drawn:
                raise UserError(f'{name} was measured on other images in {one.folder} than in '
                                f'{images[one.seed][1]}, a run of the same seed; measure both again, with the same '
                                '--mode, --images and --no-augment')
        if lacking:
            number = json.loads(way)['images']['number']
            where = ', '.join(f'{missing} of {number} in {folder}' for folder, missing in lacking)
            lines.append(f'not all images: {name} was not found of {where}; they do not count')
    return lines


class Number(NamedTuple):
    """What was measured of a run, over the images."""
    value: float | None
    drawn: int | None  # a check sum of the images, if the run's seed may have drawn them
    missing: int  # images that do not count


def numbers_of(one, statistic):
    """(name, how it was measured, as text) -> `Number`, of all measurements of a run's result; of a checkpoint that has
    been replaced since they do not count.
    UserError where a file has one of them twice, of other images, or none of the result.
    """
    found, epoch = {}, one.best_epoch if one.chosen else max(one.curve)
    for file in files_of(one.chosen):
        path = os.path.join(one.folder, file)
        if not os.path.exists(path):
            continue
        try:
            entries = read_json(path)
            measured = [entry['settings']['checkpoint'] for entry in entries]
            of_result = [checkpoint for checkpoint in measured if checkpoint['epoch'] == epoch]
            if measured and not of_result:
                raise UserError(f'{path} is of epoch {measured[-1]["epoch"]}, and the result of its run of epoch '
                                f'{epoch}; measure it again')
            for entry in entries:
                settings = dict(entry['settings'])
                if settings.pop('checkpoint') != of_result[-1]:
                    continue
                images = dict(settings['images'])
                drawn = None if images['mode'] == 'test' else images.pop('crc32')
                settings |= {'images': images}
                settings.pop('validation', None)  # images that a run's seed draws
                way = json.dumps(settings, sort_keys=True)
                for name, value, missing in _named(entry, statistic):
                    if found.setdefault((name, way), Number(value, drawn, missing)).drawn != drawn:
                        raise UserError(f'{path} has {name} of two sets of {images["mode"]} images; move it away and '
                                        'measure again')
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f'{path} is not what measure_margins.py or measure_sharpness.py writes '
                            f'({error})') from error
    return found


def _named(entry, statistic):
    """(name, number, how many images do not count in it) of an entry of either script, where the number is finite."""
    result, places = entry['result'], SHARPNESS.get(entry['measure'])
    if places is None:
        values = {name: held[statistic] if isinstance(held, dict) else held for name, held in result.items()}
    else:
        values = {name: _at(result, place) for name, place in places.items()}
        if 'loss' in values:
            values[f'{entry["settings"]["images"]["mode"]} loss'] = values.pop('loss')
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            held = result.get(name)
            yield name, float(value), held.get('not found', 0) if isinstance(held, dict) else 0


def _at(held, place):
    for step in place:
        if isinstance(held, dict) and step not in held:
            return None
        held = held[step]
    return held


def _differing(first, second):
    """How two settings differ, in words."""
    first, second = json.loads(first), json.loads(second)
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return ', '.join(f'{name} {first.get(name)} and {second.get(name)}' for name in names)
