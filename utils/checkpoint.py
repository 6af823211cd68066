"""Checkpoints: plain tensors, numbers, strings, lists and dicts, written whole or not at all, read without running
code.
"""
import contextlib
import os
import random
import shutil
import warnings

import torch

from utils import distributed, flags, schedule
from utils.errors import UserError, one_line
from utils.files import replacing

LAST, BEST, RESULT = 'checkpoint.pth.tar', 'model_best.pth.tar', 'result.json'  # RESULT is there when a run is finished
CONTENTS = {'epoch': int, 'network': dict, 'state_dict': dict, 'optimizer': dict, 'random_state': dict, 'mean': list,
            'std': list, 'classes': list, 'best': dict, 'args': dict}
# All that a run writes into its folder. Other files there are not touched, and do not matter.
RESULTS = (LAST, BEST, 'log.txt', 'log.png', 'log.pdf', 'confusion.csv', 'confusion.png', 'args.json', 'skipped.txt',
           RESULT)


def results_in(folder):
    """The names of the files in `folder` that a run has written."""
    return [name for name in RESULTS if os.path.exists(os.path.join(folder, name))]


def check_folder(folder, resume, overwrite):
    """Make `folder` if it is not there; UserError if a run in it would overwrite one that is not being resumed."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'--checkpoint {folder} cannot be used as a folder ({error.strerror})') from error
    if not os.access(folder, os.W_OK):
        raise UserError(f'--checkpoint {folder} may not be written to')
    occupied = results_in(folder)
    if overwrite or not occupied:
        return
    if not _is_in(folder, resume):
        known = f'--resume {os.path.join(folder, LAST)}, ' if LAST in occupied else ''
        raise UserError(f'--checkpoint {folder} is not empty; use {known}--overwrite, or another --checkpoint')
    if os.path.basename(resume) != LAST:
        raise UserError(f'--resume {resume} would resume in its own folder and replace {LAST} there; '
                        'use another --checkpoint, or --overwrite')


def never_saved(folder):
    """Whether a run began in `folder` and was killed before its first checkpoint."""
    found = results_in(folder)
    return 'args.json' in found and set(found) <= {'args.json', 'log.txt'}


def _is_in(folder, path):
    return bool(path) and os.path.samefile(os.path.dirname(path) or '.', folder)


def enter_folder(folder, resume, overwrite, finished=False):
    """The first writing to `folder`: drop what is to be overwritten, copy the best epoch of a run resumed from
    elsewhere.

    finished: nothing is left to train, so that the result of a run that resumes in its folder stays until there is
    another. UserError if another run has entered the folder since it was checked.
    """
    resumes_here = _is_in(folder, resume)
    for name in [RESULT] * (not finished) if resumes_here else RESULTS if overwrite else []:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    if resumes_here:
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
    """The checkpoint at `path`, on the CPU; UserError if it is missing, damaged, or not of the `script` that is named.
    """
    state = _read_file(path)
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in CONTENTS.items()):
        raise UserError(f'{path} is not a checkpoint of {script or "cifar.py or imagenet.py"}, which holds '
                        f'{", ".join(CONTENTS)}')
    state.setdefault('script', 'cifar.py')  # the only one when it was not yet written down
    state['args'] = flags.with_todays_names(state['args'])
    if script not in (None, state['script']):
        raise UserError(f'{path} is a checkpoint of {state["script"]}, not of {script}')
    return state


def _read_file(path):
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; name a checkpoint in it, such as {os.path.join(path, LAST)}')
    if not os.path.exists(path):
        raise UserError(f'there is no checkpoint {path}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's words about what is refused, or fits
            return torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # the zip, pickle and tensor readers each have kinds of their own
        raise UserError(f'{path} is not a checkpoint, or it is cut short or damaged') from error


def initialise(model, path):
    """Begin with the weights in `path`, a checkpoint or a state_dict, where names and shapes fit; prints what does not.

    Names may have the prefix `module.`, as DistributedDataParallel gives them, and may lack `backbone.`, as
    torchvision's do. UserError if the file cannot be read, or nothing in it fits.
    """
    held = _read_file(path)
    if isinstance(held, dict) and isinstance(held.get('state_dict'), dict):
        held = weights_to_test(held)
    if not isinstance(held, dict) or not any(torch.is_tensor(value) for value in held.values()):
        raise UserError(f'--init {path} must hold a checkpoint or a state_dict, names with tensors; it holds neither')
    held = {name.removeprefix('module.'): value for name, value in held.items() if torch.is_tensor(value)}
    wanted, unprefixed = model.state_dict(), held
    if not held.keys() & wanted.keys():
        held = {f'backbone.{name}': value for name, value in held.items()}
    fitting = {name: value for name, value in held.items() if name in wanted and value.shape == wanted[name].shape}
    if not fitting:
        raise UserError(f'nothing in --init {path} fits this network: it holds {_listed(unprefixed)}, and '
                        f'the network has {_listed(wanted)}')
    _refuse_nan(fitting, path)
    model.load_state_dict(fitting, strict=False)
    print(f'--init {path}: {len(fitting)} of the {len(wanted)} tensors of the network are from there')
    for what, names in (('of another shape there, so left out', held.keys() & wanted.keys() - fitting.keys()),
                        ('unknown to the network, so left out', held.keys() - wanted.keys()),
                        ('not there, so new', wanted.keys() - held.keys())):
        if names:
            print(f'  {what}: {_listed({**held, **wanted}, names)}')


def _listed(tensors, names=None, most=6):
    names = [name for name in tensors if names is None or name in names]
    words = [f'{name} ({"x".join(map(str, tensors[name].shape)) or "1"})' for name in names[:most]]
    return ', '.join(words) + (f' and {len(names) - most} more' if len(names) > most else '')


def read_arguments(parser, script, folder_of, evaluated_without_resume=None):
    """(flags, checkpoint or None): the flags as given, and otherwise as in the checkpoint of --resume.

    script: whose checkpoints can be resumed. folder_of: flags -> the run's folder, if --checkpoint is not given.
    evaluated_without_resume: the flag that --evaluate can use instead of --resume.
    """
    args, state = parser.parse_args(), None
    auto = args.resume == 'auto'
    if auto:
        if args.evaluate or args.overwrite:
            parser.error(f'--resume auto and --{"evaluate" if args.evaluate else "overwrite"} exclude each other')
        folder = args.checkpoint or _named(folder_of, args, parser)
        args.resume = os.path.join(folder, LAST)
        if not os.path.exists(args.resume):
            args.resume, args.overwrite = None, never_saved(folder)
    if args.resume:
        state, path = read(args.resume, script), args.resume
        if auto:  # the same command once more, so what it says again is not a wish to change anything
            args.given -= _unchanged(args, state['args'])
            _check_auto(args, state['args'], parser)
        _check_flags(args, state, parser)
        given, args = args.given, parser.parse_args(defaults=inherited_flags(state))
        args.given, args.resume = given, path
    elif args.evaluate and not (evaluated_without_resume and getattr(args, evaluated_without_resume)):
        instead = f', or --{evaluated_without_resume}' if evaluated_without_resume else ''
        parser.error(f'--evaluate needs --resume FILE, the checkpoint to evaluate{instead}')
    for name in sorted(args.given) if args.evaluate else ():
        if not flags.meaning(name).evaluate:
            parser.error(f'{parser.spelling(name)} is not used by --evaluate')
    if args.gpu_id is not None and distributed.active():
        parser.error('--gpu-id is for a single process; under torchrun each takes the device of its own number')
    resumed_folder = os.path.dirname(args.resume) or '.' if args.resume else None
    args.checkpoint = args.checkpoint or resumed_folder or _named(folder_of, args, parser)
    seen = distributed.all_gather((args.seed, state and (state['epoch'], state.get('step', 0))))
    if len(set(seen)) > 1:
        raise UserError(f'not all processes see the same {args.resume or LAST}; --checkpoint must be a folder that all '
                        'machines share')
    if args.seed is None:
        args.seed = distributed.broadcast(random.SystemRandom().randrange(2 ** 32))
    return args, state


def inherited_flags(state):
    """The flags, name -> value, that a checkpoint hands on: never where to write or what to overwrite, whatever it
    holds.
    """
    return {name: value for name, value in state['args'].items() if flags.meaning(name).resume != flags.START}


def _named(folder_of, args, parser):
    try:
        return folder_of(args)
    except ValueError as error:  # an option that the architecture does not have
        parser.error(str(error))


def _unchanged(args, held):
    """The flags that the command line gives as the checkpoint has them."""
    return {name for name in args.given if name in held and held[name] == getattr(args, name)
            or name not in held and flags.meaning(name).resume == flags.BEGIN}


def _check_auto(args, held, parser):
    """Refuse, with --resume auto, flags that differ from the run in the folder."""
    for name in sorted(args.given & held.keys()):
        if flags.meaning(name).resume not in (flags.FREE, flags.START):
            flag = parser.spelling(name)
            parser.error(f'--resume auto would resume the run in {os.path.dirname(args.resume)}, which has {flag} '
                         f'{held[name]}, not {getattr(args, name)}; give another --checkpoint, or --resume '
                         f'{args.resume} to change it')


def _check_flags(args, state, parser):
    """Refuse, on the command line of a resumed run, what would contradict the checkpoint."""
    if 'arch' in args.given and args.arch != state['network'].get('arch'):
        raise UserError(f'{args.resume} holds the architecture {state["network"].get("arch")}, but --arch '
                        f'{args.arch} was given')
    for name in sorted(args.given):
        resume, flag = flags.meaning(name).resume, parser.spelling(name)
        if resume == flags.BEGIN:
            parser.error(f'{flag} is where a new run begins; a resumed run has that from its checkpoint')
        if resume == flags.NEVER and getattr(args, name) != state['args'].get(name):
            parser.error(f'{flag} cannot change when a run is resumed, as it decides which images are trained on; '
                         f'the checkpoint has {state["args"].get(name)}')
    held = state.get('optimizer_class', 'SGD')  # the only one when it was not yet written down
    if 'optimizer' in args.given and args.optimizer != held:
        parser.error(f'--optimizer cannot change when a run is resumed, as the checkpoint has the state of {held}; '
                     f'was given {args.optimizer}')


def weights_to_test(state):
    """The state_dict that a checkpoint's accuracy belongs to: the weights, or with --ema their average."""
    if not state.get('ema'):
        return state['state_dict']
    return {name.removeprefix('module.'): tensor for name, tensor in state['ema'].items() if name != 'n_averaged'}


def load_model(model, state, asked, path, to_test=False):
    """Load the weights, or the weights to test, into `model`; UserError if they are of another network than `asked`."""
    held = state['network']
    if held != asked:
        differing = sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name))
        raise UserError(f'{path} holds {_phrase(held, differing)}, but {_phrase(asked, differing)} was asked for')
    weights = weights_to_test(state) if to_test else state['state_dict']
    _refuse_nan(weights, path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f'the weights in {path} do not fit {asked["arch"]}: {one_line(error)[:200]}') from error


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
    except (ValueError, KeyError) as error:
        raise UserError(f'the optimizer state in {path} is of another optimizer or network ({error})') from error
    for group, made in zip(optimizer.param_groups, made_now):
        made_then = group.get('made_with', {})
        group.update({name: value for name, value in made.items() if name not in made_then or made_then[name] != value})
        group['made_with'] = made


def random_state():
    """The state of the generators that dropout draws from: the CPU's, and the CUDA device's if one is used."""
    return {'cpu': torch.get_rng_state(), 'cuda': torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}


def set_random_state(state):
    torch.set_rng_state(state['cpu'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def begin_random_state(state, seed):
    """Continue the random state that a checkpoint has of this process.

    If it has none, processes other than the first take another seed, so that they draw other dropout.
    """
    known = [state['random_state'], *state.get('other_random_states', [])] if 'random_state' in state else []
    if distributed.rank() < len(known):
        set_random_state(known[distributed.rank()])
    elif not distributed.is_first():
        torch.manual_seed(seed + distributed.rank() * 2 ** 32)


def check_position(state, steps, args):
    """UserError if the checkpoint is of the middle of an epoch of other batches than this run has, which are `steps`.
    """
    if state.get('step'):
        held = len(state['meter']['losses']), state['args']['train_batch'] * state['args']['batch_multiplier']
        found = steps, args.train_batch * args.batch_multiplier
        if found != held:
            raise UserError(f'{args.resume} is of the middle of an epoch of {held[0]} batches of {held[1]} images, and '
                            f'this run has {found[0]} of {found[1]}; the data and --train-batch cannot change until '
                            'the epoch is over')


def check_epochs(state, args, parser):
    """Refuse to resume with fewer epochs than are behind."""
    if args.epochs < state['epoch']:
        parser.error(f'--epochs {args.epochs} is less than the {state["epoch"]} that {args.resume} has behind it')
