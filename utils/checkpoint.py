"""Checkpoints: plain tensors, numbers, strings, lists and dicts, written whole or not at all, read without running code."""
import os

import torch

from utils.errors import UserError
from utils.files import replacing

LAST, BEST = 'checkpoint.pth.tar', 'model_best.pth.tar'
KEYS = {'epoch', 'network', 'state_dict', 'optimizer', 'random_state', 'mean', 'std', 'classes', 'best', 'args'}


RESULTS = (LAST, BEST, 'log.txt', 'log.png', 'log.pdf', 'args.json', 'result.json')


def claim_folder(folder, resume, overwrite):
    """Make `folder` ready for a run; UserError if that would overwrite a run that is not being resumed."""
    try:
        os.makedirs(folder, exist_ok=True)
        occupied = os.listdir(folder)
    except OSError as error:
        raise UserError(f'--checkpoint {folder} cannot be used as a folder ({error.strerror})') from error
    here = bool(resume) and os.path.samefile(os.path.dirname(resume) or '.', folder)
    if overwrite and not here:
        for name in RESULTS:
            if name in occupied:
                os.remove(os.path.join(folder, name))
    elif occupied and not here:
        known = f'--resume {os.path.join(folder, LAST)}, ' if LAST in occupied else ''
        raise UserError(f'--checkpoint {folder} is not empty; use {known}--overwrite, or another --checkpoint')
    elif here and os.path.basename(resume) != LAST and not overwrite:
        raise UserError(f'--resume {resume} would go on in its own folder and replace {LAST} there; '
                        'use another --checkpoint, or --overwrite')


def save(path, state):
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read(path):
    """The checkpoint at `path`, on the CPU; UserError if it is missing, damaged or something else."""
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {path}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # zip, pickle and tensor reader each have their own kinds
        raise UserError(f'{path} is not a checkpoint, or is cut short or damaged ({str(error).split(chr(10))[0][:120]})') from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise UserError(f'{path} is not a checkpoint of cifar.py: it has to hold {", ".join(sorted(KEYS))}')
    return state


def load_model(model, state, asked, path):
    """Load the weights into `model`; UserError if they are those of another network than `asked` describes."""
    held = state['network']
    if held != asked:
        differing = sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name))
        raise UserError(f'{path} holds {_phrase(held, differing)}, but {_phrase(asked, differing)} was asked for')
    try:
        model.load_state_dict(state['state_dict'])
    except RuntimeError as error:
        raise UserError(f'the weights in {path} do not fit {asked["arch"]}: {" ".join(str(error).split())[:200]}') from error


def _phrase(model, names):
    return ', '.join(f'{name} {model[name]}' for name in names if name in model) or 'nothing of the kind'


def random_state():
    """The state of PyTorch's own generators, which dropout draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {'cpu': torch.get_rng_state(), 'cuda': cuda}


def set_random_state(state):
    torch.set_rng_state(state['cpu'])
    if state['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state['cuda'])
