"""Checkpoints: plain tensors, numbers, strings, lists and dicts, written whole or not at all, read without running
code.
"""
import copy
import os
import random
import warnings
import zipfile

import numpy as np
import torch

from utils import contents, device as devices, distributed, flags, output, schedule
from utils.errors import UserError, one_line
from utils.files import replacing


def save(path, state):
    """Write `state`; NotWritten, and the file that was there stays, if the disk is full."""
    size = sum(tensor.nbytes for tensor in _tensors(state))
    with replacing(path, size) as temporary, open(temporary, 'wb') as file:
        torch.save(state, file)


def _tensors(value):
    """Every tensor in nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(part)]
    return [value] if torch.is_tensor(value) else []


def read(path, script=None):
    """The checkpoint at `path`, on the CPU; UserError if it is missing, damaged, or not of the `script` that is named.
    """
    state = _read_file(path)
    contents.check(state, path, script)
    state.setdefault('script', 'cifar.py')  # the only one when it was not yet written down
    state['args'] = flags.with_todays_names(state['args'])
    if script not in (None, state['script']):
        raise UserError(f'{path} is a checkpoint of {state["script"]}, not of {script}')
    return state


def check_written(path):
    """UserError if the checkpoint that a run has just written cannot be read, as of what an optimizer of one's own
    keeps.
    """
    try:
        read(path)
    except UserError as error:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        held = f'it holds {", ".join(foreign)[:200]}' if foreign else str(error)
        raise UserError(f'the run could not be resumed, as the checkpoint that it has just written cannot be read '
                        f"({held}); the optimizer's state, the options of its groups, and what the script puts into "
                        'state, must be tensors, numbers, strings, lists and dicts') from error


def _read_file(path):
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; name a checkpoint in it, such as {os.path.join(path, output.LAST)}')
    if not os.path.exists(path):
        raise UserError(f'there is no checkpoint {path}')
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of what kind the file might be instead; the sentence below says enough
            return torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # the zip, pickle and tensor readers each have kinds of their own
        raise UserError(f'{path} is not a checkpoint, or it is cut short or damaged') from error


def _check_sums(path):
    """ValueError if a part of the file is not what was written: torch.save writes check sums, torch.load ignores them.

    A file of torch.save's old format, which --init can read, has none.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f'{damaged} has another check sum')


def initialise(model, path):
    """Begin with the weights in `path`, a checkpoint or a state_dict, where names and shapes fit; prints what does not.

    Names may have the prefix `module.`, as DistributedDataParallel gives them, and may lack `backbone.`, as
    torchvision's do. What a module lists in `begins_anew`, its buffers that say how far training is, stays as it is.
    UserError if the file cannot be read, or nothing in it fits.
    """
    held = _read_file(path)
    if isinstance(held, dict) and isinstance(held.get('state_dict'), dict):
        held = weights_to_test(held) if isinstance(held.get('ema'), dict) else held['state_dict']
    held = held if isinstance(held, dict) else {}
    held = {name.removeprefix('module.'): value for name, value in held.items()
            if isinstance(name, str) and contents.TENSOR.fits(value)}
    if not held:
        raise UserError(f'--init {path} must hold a checkpoint or a state_dict, names with tensors; it holds neither')
    wanted, unprefixed = model.state_dict(), held
    if not held.keys() & wanted.keys():
        held = {f'backbone.{name}': value for name, value in held.items()}
    anew = {f'{module}.{name}'.lstrip('.') for module, own in model.named_modules()
            for name in getattr(own, 'begins_anew', ())}
    held = {name: value for name, value in held.items() if name not in anew}
    fitting = {name: value for name, value in held.items() if name in wanted and value.shape == wanted[name].shape}
    if not fitting:
        raise UserError(f'nothing in --init {path} fits this network: it holds {_listed(unprefixed)}, and '
                        f'the network has {_listed(wanted)}')
    _refuse_nan(fitting, path)
    model.load_state_dict(fitting, strict=False)
    print(f'--init {path}: {len(fitting)} of the {len(wanted)} tensors of the network are from there')
    wanted = {name: value for name, value in wanted.items() if name not in anew}
    for what, names in (('of another shape there, so left out', held.keys() & wanted.keys() - fitting.keys()),
                        ('unknown to the network, so left out', held.keys() - wanted.keys()),
                        ('not there, so new', wanted.keys() - held.keys())):
        if names:
            print(f'  {what}: {_listed({**held, **wanted}, names)}')


def _listed(tensors, names=None, most=6):
    names = [name for name in tensors if names is None or name in names]
    words = [f'{name} ({"x".join(map(str, tensors[name].shape)) or "1"})' for name in names[:most]]
    return ', '.join(words) + (f' and {len(names) - most} more' if len(names) > most else '')


def weights_to_test(state):
    """The state_dict that a checkpoint's accuracy belongs to: the weights, or with --ema their average."""
    if not state.get('ema'):
        return state['state_dict']
    return {name.removeprefix('module.'): tensor for name, tensor in state['ema'].items() if name != 'n_averaged'}


def load_model(model, state, asked, path, to_test=False, defaults=None):
    """Load the weights, or the weights to test, into `model`; UserError if they are of another network than `asked`.

    defaults: those of the architecture's options, for an option that a checkpoint of before it was there does not have.
    """
    held = {**(defaults or {}), **state['network']}
    if held != asked:
        differing = sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name))
        raise UserError(f'{path} holds {_phrase(held, differing)}, but {_phrase(asked, differing)} was asked for')
    weights = weights_to_test(state) if to_test else state['state_dict']
    _refuse_nan(weights, path)
    load_weights(model, weights, path)


def load_weights(model, weights, path):
    """Load a state_dict of the checkpoint at `path`; UserError unless names, shapes and kinds of number fit."""
    try:
        for name, wanted in model.state_dict().items():
            if name in weights and weights[name].is_floating_point() != wanted.is_floating_point():
                raise RuntimeError(f'{name} is {weights[name].dtype}, not {wanted.dtype}')
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f'the weights in {path} do not fit this network: {one_line(error)[:200]}') from error


def _refuse_nan(weights, path):
    for name, tensor in weights.items():
        if torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.isnan().any():
            raise UserError(f'the weights in {path} are NaN ({name}), so there is nothing to train or to measure')


def _phrase(architecture, names):
    return ', '.join(f'{name} {architecture[name]}' for name in names if name in architecture) or 'nothing of the kind'


def class_name(optimizer):
    """The class whose state a checkpoint has: that of the optimizer, or of the optimizer that it wraps."""
    return type(getattr(optimizer, 'base_optimizer', optimizer)).__name__


def load_optimizer(optimizer, state, path):
    """Load the optimizer's state, and those of its options that are made as they were made then; others are as made
    now.

    So flags and edits of a script win over the checkpoint, and an option that an optimizer changes itself is resumed.
    UserError if the checkpoint is of another class or network.
    """
    held, found = state.get('optimizer_class', 'SGD'), class_name(optimizer)
    if held != found:
        raise UserError(f'the optimizer state in {path} is that of {held}, but the optimizer is {found}; '
                        'use --init instead of --resume to begin with its weights')
    made_now = [schedule.made_with(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state['optimizer'])
        for group, made in zip(optimizer.param_groups, made_now):
            made_then = group.get('made_with', {})
            group.update({name: copy.deepcopy(value) for name, value in made.items()
                          if name not in made_then or not _alike(made_then[name], value)})
            group['made_with'] = made
            _check_group(group, optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f'the optimizer state in {path} is of another optimizer or network '
                        f'({one_line(error)[:200]})') from error


def _alike(first, second):
    """Whether two options of an optimizer are equal: numbers, words, tensors, lists and dicts of them."""
    if type(first) is not type(second):
        return not torch.is_tensor(first) and not torch.is_tensor(second) and first == second
    if torch.is_tensor(first):
        return first.shape == second.shape and bool((first == second.to(first.device)).all())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_alike(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_alike, first, second))
    return first == second


# What these optimizers always keep for a parameter; SGD makes its momentum where there is none, RMSprop does not.
KEPT = {torch.optim.SGD: (), torch.optim.RMSprop: ('step', 'square_avg'),
        torch.optim.Adam: ('step', 'exp_avg', 'exp_avg_sq'), torch.optim.AdamW: ('step', 'exp_avg', 'exp_avg_sq')}


def _check_group(group, optimizer):
    """ValueError unless the loaded options, and what the optimizer keeps for each parameter, are what it makes itself.
    """
    for name, made in group['made_with'].items():
        numbers = all(isinstance(value, (int, float)) for value in (made, group[name]))
        set_later = made is None and isinstance(group[name], (int, float, torch.Tensor))
        if type(group[name]) is not type(made) and not numbers and not set_later:
            raise ValueError(f'{name} is {group[name]}')
    base = getattr(optimizer, 'base_optimizer', optimizer)
    if type(base) not in KEPT:
        return
    needed = {*KEPT[type(base)]}
    if type(base) is torch.optim.RMSprop and group['momentum']:
        needed.add('momentum_buffer')
    for parameter in group['params']:
        held = optimizer.state.get(parameter)
        for name in held.keys() | needed if held else ():
            value, shape = held.get(name), () if name == 'step' else parameter.shape
            if (value is not None or name in needed) and not (torch.is_tensor(value) and value.shape == shape):
                raise ValueError(f'{name} of a parameter of shape {tuple(parameter.shape)} does not fit')


def random_state():
    """The states of the generators of PyTorch, from which dropout draws (the CPU's, and the CUDA device's if one is
    used), and of Python and NumPy, from which a loop may draw.
    """
    kind, words, *rest = np.random.get_state()
    version, *others = random.getstate()
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            'python': [version, *others], 'numpy': [kind, words.tolist(), *rest]}


def set_random_state(state):
    torch.set_rng_state(state['cpu'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
    if 'python' in state:
        random.setstate(contents.python_state(state['python']))
        np.random.set_state(state['numpy'])


def begin_random_state(state, seed):
    """Continue the random state that a checkpoint has of this process.

    If it has none, processes other than the first take another seed, so that they draw other dropout.
    """
    known = [state['random_state'], *state.get('other_random_states', [])] if 'random_state' in state else []
    if distributed.rank() < len(known):
        set_random_state(known[distributed.rank()])
    elif not distributed.is_first():
        devices.seed(seed + distributed.rank() * 2 ** 32)
