"""Checkpoints: plain tensors, numbers, strings, lists and dicts, written whole or not at all, read without running code."""
import contextlib
import os
import shutil

import torch

from utils import conditions, distributed
from utils.errors import UserError
from utils.files import replacing

LAST, BEST, RESULT = 'checkpoint.pth.tar', 'model_best.pth.tar', 'result.json'  # RESULT is there when a run is finished
CONTENTS = {'epoch': int, 'network': dict, 'state_dict': dict, 'optimizer': dict, 'random_state': dict, 'mean': list,
            'std': list, 'classes': list, 'best': dict, 'args': dict}
RESULTS = (LAST, BEST, 'log.txt', 'log.png', 'log.pdf', 'confusion.csv', 'confusion.png', 'args.json', 'skipped.txt', RESULT)


def check_folder(folder, resume, overwrite):
    """Make `folder` if it is not there; UserError if a run in it would overwrite one that is not being resumed."""
    try:
        os.makedirs(folder, exist_ok=True)
        occupied = os.listdir(folder)
    except OSError as error:
        raise UserError(f'--checkpoint {folder} cannot be used as a folder ({error.strerror})') from error
    if not os.access(folder, os.W_OK):
        raise UserError(f'--checkpoint {folder} may not be written to')
    if overwrite or not occupied:
        return
    if not _is_in(folder, resume):
        known = f'--resume {os.path.join(folder, LAST)}, ' if LAST in occupied else ''
        raise UserError(f'--checkpoint {folder} is not empty; use {known}--overwrite, or another --checkpoint')
    if os.path.basename(resume) != LAST:
        raise UserError(f'--resume {resume} would go on in its own folder and replace {LAST} there; '
                        'use another --checkpoint, or --overwrite')


def never_saved(folder):
    """Whether a run began in `folder` and was killed before its first checkpoint."""
    held = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return 'args.json' in held and all(name in ('args.json', 'log.txt') or name.startswith('.unfinished-') for name in held)


def _is_in(folder, path):
    return bool(path) and os.path.samefile(os.path.dirname(path) or '.', folder)


def enter_folder(folder, resume, overwrite, finished=False):
    """The first writing to `folder`: drop what is to be overwritten, take along the best epoch of a run resumed from elsewhere.

    finished: nothing is left to train, so that the result of a run that goes on in its folder stays until there is another.
    UserError if another run has entered the folder since it was checked.
    """
    going_on = _is_in(folder, resume)
    for name in [RESULT] * (not finished) if going_on else RESULTS if overwrite else []:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    if going_on:
        return
    try:
        open(os.path.join(folder, 'args.json'), 'x').close()
    except FileExistsError as error:
        raise UserError(f'another run has just begun in --checkpoint {folder}; use another') from error
    best = os.path.join(os.path.dirname(resume), BEST) if resume else ''
    if os.path.exists(best):
        with replacing(os.path.join(folder, BEST)) as temporary:
            shutil.copyfile(best, temporary)


def save(path, state):
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f'{path} could not be written ({error})') from error


def read(path, script=None):
    """The checkpoint at `path`, on the CPU; UserError if it is missing, damaged, or not of the `script` that is named."""
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; name a checkpoint in it, such as {os.path.join(path, LAST)}')
    if not os.path.exists(path):
        raise UserError(f'there is no checkpoint {path}')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # the zip, pickle and tensor readers each have kinds of their own
        raise UserError(f'{path} is not a checkpoint, or it is cut short or damaged') from error
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in CONTENTS.items()):
        raise UserError(f'{path} is not a checkpoint of {script or "cifar.py or imagenet.py"}, which holds {", ".join(CONTENTS)}')
    state.setdefault('script', 'cifar.py')  # the only one when it was not yet written down
    if script not in (None, state['script']):
        raise UserError(f'{path} is a checkpoint of {state["script"]}, not of {script}')
    return state


def weights_to_test(state):
    """The state_dict that a checkpoint's accuracy is of: the weights, or with --ema their average."""
    if not state.get('ema'):
        return state['state_dict']
    return {name.removeprefix('module.'): tensor for name, tensor in state['ema'].items() if name != 'n_averaged'}


def check_flags(args, state, parser):
    """Refuse, on the command line of a resumed run, what would contradict the checkpoint."""
    if 'arch' in args.given and args.arch != state['network'].get('arch'):
        raise UserError(f'{args.resume} holds the architecture {state["network"].get("arch")}, but --arch {args.arch} was given')
    if 'start_epoch' in args.given:
        parser.error('--start-epoch and --resume exclude each other: a checkpoint knows its epoch')
    for name, flag in {'seed': '--manualSeed', **conditions.FLAGS}.items():
        if name in args.given and getattr(args, name) != state['args'].get(name):
            parser.error(f'{flag} cannot change when a run is resumed, as it decides which images are trained on; '
                         f'the checkpoint has {state["args"].get(name)}')


def check_schedule(args, state, parser):
    """Refuse to go on with fewer epochs than are behind, or with another optimizer than the state is of."""
    if args.epochs < state['epoch']:
        parser.error(f'--epochs {args.epochs} is less than the {state["epoch"]} that {args.resume} has behind it')
    held = state.get('optimizer_class', 'SGD')  # the only one when it was not yet written down
    if args.optimizer != held:
        parser.error(f'--optimizer cannot change when a run is resumed, as the checkpoint has the state of {held}; '
                     f'was given {args.optimizer}')


def load_model(model, state, asked, path, to_test=False):
    """Load the weights, or those `to_test`, into `model`; UserError if they are of another network than `asked` describes."""
    held = state['network']
    if held != asked:
        differing = sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name))
        raise UserError(f'{path} holds {_phrase(held, differing)}, but {_phrase(asked, differing)} was asked for')
    try:
        model.load_state_dict(weights_to_test(state) if to_test else state['state_dict'])
    except RuntimeError as error:
        raise UserError(f'the weights in {path} do not fit {asked["arch"]}: {" ".join(str(error).split())[:200]}') from error


def _phrase(model, names):
    return ', '.join(f'{name} {model[name]}' for name in names if name in model) or 'nothing of the kind'


def load_optimizer(optimizer, state, path):
    """Load the optimizer's state, but not its options: those are the flags of this run."""
    options = [{name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state['optimizer'])
    except (ValueError, KeyError) as error:
        raise UserError(f'the optimizer state in {path} is of another optimizer or network ({error})') from error
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def random_state():
    """The state of the generators that dropout draws from: the CPU's, and the CUDA device's if one is used."""
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def set_random_state(state):
    torch.set_rng_state(state['cpu'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def begin_random_state(state, seed):
    """That of this process in a checkpoint. Where there is none, all but the first process take another seed: dropout differs."""
    known = [state['random_state'], *state.get('other_random_states', [])] if 'random_state' in state else []
    if distributed.rank() < len(known):
        set_random_state(known[distributed.rank()])
    elif not distributed.is_first():
        torch.manual_seed(seed + distributed.rank() * 2 ** 32)


def check_position(state, steps, args):
    """UserError if the checkpoint is of the middle of an epoch of other batches than those of this run, which has `steps`."""
    if state.get('step'):
        before = len(state['meter']['losses']), state['args']['train_batch'] * state['args']['batch_multiplier']
        now = steps, args.train_batch * args.batch_multiplier
        if now != before:
            raise UserError(f'{args.resume} is of the middle of an epoch of {before[0]} batches of {before[1]} images, and this run has '
                            f'{now[0]} of {now[1]}; the data and --train-batch cannot change until the epoch is over')
