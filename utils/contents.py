"""What a checkpoint holds. It is checked once, when it is read, so that what uses it later need not."""
import math
import random
from typing import Callable, NamedTuple

import numpy as np
import torch

from utils.errors import UserError


class Kind(NamedTuple):
    words: str
    fits: Callable


def _is_tensor(value):
    dense = torch.is_tensor(value) and value.layout == torch.strided and value.device.type == 'cpu'
    return dense and not value.is_quantized


def _is_plain(value):
    """What args.json can hold: a flag's value."""
    return value is None or isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def list_of(kind):
    return Kind(f'a list, each {kind.words}', lambda value: type(value) is list and all(map(kind.fits, value)))


def dict_of(kind):
    return Kind(f'a dict of names, each with {kind.words}', lambda value: isinstance(value, dict) and all(
        isinstance(name, str) and kind.fits(each) for name, each in value.items()))


def record(**kinds):
    return Kind(f'a dict with {", ".join(kinds)}', lambda value: isinstance(value, dict) and all(
        name in value and kind.fits(value[name]) for name, kind in kinds.items()))


def optional(kind):
    return Kind(f'{kind.words}, or None', lambda value: value is None or kind.fits(value))


COUNT = Kind('a whole number of at least 0', lambda value: type(value) is int and value >= 0)
NUMBER = Kind('a finite number', lambda value: type(value) in (int, float) and math.isfinite(value))
DEVIATION = Kind('a number above 0', lambda value: NUMBER.fits(value) and value > 0)
WORD = Kind('a string', lambda value: isinstance(value, str))
PLAIN = Kind('a number, string or list', _is_plain)
TENSOR = Kind('a tensor', _is_tensor)
VECTOR = Kind('a list of tensors', lambda value: _is_tensor(value) and value.dim() == 1)
TENSORS = dict_of(TENSOR)
BYTES = Kind('bytes', lambda value: _is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1)


def _is_cpu_state(value):
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        return False
    return True


def _is_log(lines):
    try:
        epochs = [int(row[0]) for row in lines[1:]]
        [float(word) for row in lines[1:] for word in row]
    except (ValueError, IndexError):
        return False
    return len({len(line) for line in lines}) == 1 and epochs == sorted(set(epochs)) and min(epochs, default=1) > 0


def _are_others(state):
    """Of Python and NumPy; earlier versions had none."""
    held = state.get('python'), state.get('numpy')
    if not state.keys() & {'python', 'numpy'}:
        return True
    try:
        (_, _, gauss), (_, _, position, has_gauss, cached) = held
        if not all(map(_is_plain, held)) or not (type(gauss) in (type(None), float) and type(cached) is float
                                                 and position in range(625) and has_gauss in (0, 1)):
            return False
        random.Random().setstate(python_state(held[0]))
        np.random.RandomState().set_state(held[1])
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def python_state(held):
    """A state for random.setstate, of the lists that a file has."""
    version, words, gauss = held
    return version, tuple(words), gauss


CPU_AND_CUDA = record(cpu=Kind('the state of a generator', _is_cpu_state), cuda=optional(BYTES))
RANDOM_STATE = Kind('the states of generators', lambda value: CPU_AND_CUDA.fits(value) and _are_others(value))
OPTIMIZER = record(
    state=Kind('a dict, for each parameter a dict', lambda value: isinstance(value, dict) and all(
        type(key) is str or type(key) is int and isinstance(held, dict) for key, held in value.items())),
    param_groups=list_of(Kind('a parameter group', lambda group: isinstance(group, dict)
                              and list_of(COUNT).fits(group.get('params')))))
SIZE = Kind('a number of images', lambda value: NUMBER.fits(value) and value >= 0)
METER = record(losses=VECTOR, correct=VECTOR, sizes=list_of(SIZE))

REQUIRED = {
    'epoch': COUNT, 'network': Kind('a dict of arch, num_classes and options', lambda value: dict_of(PLAIN).fits(value)
                                    and WORD.fits(value.get('arch')) and COUNT.fits(value.get('num_classes'))),
    'state_dict': TENSORS, 'optimizer': OPTIMIZER, 'random_state': RANDOM_STATE, 'mean': list_of(NUMBER),
    'std': list_of(DEVIATION), 'classes': list_of(WORD), 'best': record(top1=NUMBER, epoch=COUNT),
    'args': dict_of(PLAIN),
}
# Later versions added these.
OPTIONAL = {
    'script': WORD, 'optimizer_class': WORD, 'ema': optional(TENSORS), 'other_random_states': list_of(RANDOM_STATE),
    'step': COUNT, 'own_rate': Kind('true or false', lambda value: type(value) is bool), 'meter': optional(METER),
    'seconds': NUMBER, 'rate': optional(Kind('a number', lambda value: type(value) is float)), 'steps': COUNT,
    'given': list_of(WORD),
    'log': Kind('a header and rows of numbers', lambda value: list_of(list_of(WORD)).fits(value) and _is_log(value)),
    'images': dict_of(WORD), 'trained_with': dict_of(PLAIN), 'changes': list_of(WORD),
}


def check(state, path, script=None):
    """UserError unless `state`, read from `path`, holds what a checkpoint holds. script: which one's, if it matters."""
    whose = script or 'cifar.py or imagenet.py'
    if not isinstance(state, dict) or not REQUIRED.keys() <= state.keys():
        raise UserError(f'{path} is not a checkpoint of {whose}, which holds {", ".join(REQUIRED)}')
    wrong = next((f'{name} is not {kind.words}' for name, kind in (REQUIRED | OPTIONAL).items()
                  if name in state and not kind.fits(state[name])), None)
    if not wrong:
        wrong = _contradiction(state)
    if wrong:
        raise UserError(f'{path} is not a checkpoint of {whose}: {wrong}')


def _contradiction(state):
    """What in `state`, whose values are each of the right kind, does not fit together; None if all does."""
    classes, step, meter = len(state['classes']), state.get('step', 0), state.get('meter')
    if classes != state['network']['num_classes']:
        return f'it has the names of {classes} classes, and its network has {state["network"]["num_classes"]}'
    if not len(state['mean']) == len(state['std']) == 3:
        return 'mean and std do not have 3 channels'
    if any(int(row[0]) > state['epoch'] for row in state.get('log', [])[1:]):
        return f'its log goes beyond epoch {state["epoch"]}'
    if step and not (meter and len(meter['sizes']) == step < len(meter['losses']) and len(meter['correct']) == 2):
        return f'meter does not count the {step} batches of the epoch that are done'
    return None
