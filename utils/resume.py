"""The command line of a run together with the checkpoint that it resumes from: what is inherited, what is refused."""
import os
import random

from utils import checkpoint, distributed, flags, methods, output, schedule
from utils.errors import UserError
from utils.logger import read_rows


def read_arguments(parser, script, folder_of, evaluated_without_resume=None):
    """(flags, checkpoint or None): the flags as given, and otherwise as in the checkpoint of --resume.

    script: whose checkpoints can be resumed. folder_of: flags -> the run's folder, if --checkpoint is not given.
    evaluated_without_resume: the flag that --evaluate can use instead of --resume.
    """
    args, state = parser.parse_args(), None
    auto = args.resume == 'auto'
    if auto and (args.evaluate or args.overwrite):
        parser.error(f'--resume auto and --{"evaluate" if args.evaluate else "overwrite"} exclude each other')
    resumed_folder = os.path.dirname(args.resume) or '.' if args.resume and not auto else None
    folder = args.checkpoint or resumed_folder or _named(folder_of, args, parser)
    found = output.snapshot(folder)  # before anything in it is read, see output.claim
    if auto:
        args.resume = os.path.join(folder, output.LAST)
        if not os.path.exists(args.resume):
            args.resume, args.overwrite = None, output.never_saved(folder)
    if args.resume:
        state, path = checkpoint.read(args.resume, script), args.resume
        if auto:  # the same command once more, so what it says again is not a wish to change anything
            methods.spell_out_coef(args, args.method if 'method' in args.given else state['args'].get('method', ()))
            missing = _missing(args, state, parser)
            args.given -= _unchanged(args, state['args'])
            _check_auto(args, state['args'], missing, parser)
        _check_flags(args, state, parser)
        given = {name: getattr(args, name) for name in args.given}
        args = parser.parse_args(defaults=inherited_flags(state))
        vars(args).update(given, given=set(given), resume=path)
    elif args.evaluate and not (evaluated_without_resume and getattr(args, evaluated_without_resume)):
        instead = f', or --{evaluated_without_resume}' if evaluated_without_resume else ''
        parser.error(f'--evaluate needs --resume FILE, the checkpoint to evaluate{instead}')
    for name in sorted(args.given) if args.evaluate else ():
        if not flags.meaning(name).evaluate:
            parser.error(f'{parser.spelling(name)} is not used by --evaluate')
    if args.gpu_id is not None and distributed.active():
        parser.error('--gpu-id is for a single process; under torchrun each takes the device of its own number')
    args.checkpoint, args.found = folder, found
    seen = distributed.all_gather((args.seed, state and (state['epoch'], state.get('step', 0))))
    if len(set(seen)) > 1:
        raise UserError(f'not all processes see the same {args.resume or output.LAST}; --checkpoint must be a folder '
                        'that all machines share')
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


def given(args, state):
    """The flags that decide what a run is, and that it was given when it began or was resumed; sorted names."""
    own = {name for name in args.given if flags.meaning(name).resume not in (flags.FREE, flags.START)}
    return sorted(own.union(state.get('given', ())))


def _missing(args, state, parser):
    """The flags that the run in the folder was given, other than what they are by default, and the command line not."""
    declared, held = vars(parser.parse_args([])), state['args']
    return {name for name in (methods.setting(held).keys() & declared.keys() & {*state.get('given', ())}) - args.given
            if held[name] != declared[name]}


def _check_auto(args, held, missing, parser):
    """Refuse, with --resume auto, flags that differ from the run in the folder."""
    asked = {name for name in args.given & held.keys()
             if flags.meaning(name).resume not in (flags.FREE, flags.START)}
    for name in sorted(asked | missing):
        flag, value = parser.spelling(name), held[name]
        has = f'no {flag}' if value is None or value is False else flag if value is True else f'{flag} {_word(value)}'
        parser.error(f'--resume auto would resume the run in {os.path.dirname(args.resume)}, which has {has}, '
                     + (f'not {_word(getattr(args, name))}' if name in asked else 'and this command has not')
                     + f'; give another --checkpoint, or --resume {args.resume} to '
                     + ('change it' if name in asked else 'resume that run'))


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
    before, now = state['args'].get('bias_lr_factor', 1), args.bias_lr_factor
    if 'bias_lr_factor' in args.given and (before == 1) != (now == 1):
        parser.error(f'--bias-lr-factor cannot be switched on or off when a run is resumed, as its biases are a group '
                     f'of the optimizer; the checkpoint has {before:g}, was given {now:g}')
    held = state.get('optimizer_class', 'SGD')  # the only one when it was not yet written down
    if 'optimizer' in args.given and args.optimizer != held:
        parser.error(f'--optimizer cannot change when a run is resumed, as the checkpoint has the state of {held}; '
                     f'was given {args.optimizer}')


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


def check_images(args, state, part, found, drawn_by=''):
    """Keep in a run's `state` what tells its images from others, `found`; say where a resumed run has others.

    part: 'train' or 'test'. drawn_by: the flags that draw from these images. UserError if there are any, as they would
    draw others, and images that were trained on might become those that choose the best epoch.
    """
    held = state.setdefault('images', {}).get(part, found)
    state['images'][part] = found
    if held != found and drawn_by:
        raise UserError(f'the {part} images are not those of {args.resume} (then {held}, now {found}: check sum and '
                        f'number), and {drawn_by} would draw others from them; restore them, or begin another run')
    if held != found:
        print(f'the {part} images are not those of {args.resume} (then {held}, now {found}: check sum and number)')


def is_ahead(args, state):
    """Whether the best epoch's checkpoint beside the one that is resumed is of a later epoch than was best until then,
    as where a copy of an earlier checkpoint is resumed; says so. UserError if it cannot be read, or no epoch is left.
    """
    path = os.path.join(os.path.dirname(args.resume or ''), output.BEST)
    if not args.resume or not os.path.exists(path):
        return False
    try:
        held = checkpoint.read(path)['epoch']
    except UserError as error:
        raise UserError(f'{error}; move it away, and the best epoch is looked for from epoch {state["epoch"] + 1} '
                        'on') from error
    if held == state['best']['epoch']:
        return False
    told = f'{path} is of epoch {held}, which {args.resume} of epoch {state["epoch"]} does not know'
    if state['epoch'] >= args.epochs:
        raise UserError(f'{told}; no epoch is left in which a best one could be found, so move it away')
    print(f'{told}; the best epoch is looked for from there on')
    return True


def setting(args, state):
    """What decides the result of training, as it is now: flag -> value, and what tells the training images."""
    filled_in = methods.setting({name: getattr(args, name) for name in args.inherited})
    return {**filled_in, 'training images': state.get('images', {}).get('train')}


def rows_behind(args, state, columns):
    """The rows of the log, as text, of the epochs that are behind: those of the checkpoint, whatever log.txt holds.

    The checkpoint has all but the seconds, so that runs of the same seed have the same checkpoints. UserError if it has
    other columns.
    """
    old_log = os.path.join(os.path.dirname(args.resume), 'log.txt') if args.resume else None
    if 'log' not in state:  # checkpoints of earlier versions
        return read_rows(old_log, columns, state['epoch'])
    held, *rows = state['log']
    if held != columns[:-1]:
        raise UserError(f'{args.resume} has a log with the columns {", ".join(held)}, and this run would write '
                        f'{", ".join(columns[:-1])}')
    try:
        seconds = {tuple(row[:-1]): row[-1] for row in read_rows(old_log, columns, state['epoch'])}
    except UserError:  # it is damaged, and written again
        seconds = {}
    return [[*row, seconds.get(tuple(row), 'nan')] for row in rows]


def changes(args, state, now, rates):
    """What a run that is resumed will be trained with and was not until now: a list of at most one sentence.

    now: its `setting`. rates: [(the learning rate with which an epoch that is behind began, or that is half behind;
    the one with which it would begin now), ...]; flags about the rate count as changed where these differ, unless the
    script sets its own. Another length of the training counts where `by_position` is true. UserError where no epoch is
    left that could be trained otherwise.
    """
    then = state.get('trained_with')
    if then is None and args.resume and (state['epoch'] > args.start_epoch or state.get('step')):
        then, now = methods.setting(state['args']), methods.setting(args.inherited)  # of a version that kept no setting
    if then is None:
        return []
    names = {name for name in then.keys() & now.keys() if then[name] != now[name]} - {'data'}
    if not by_position(args):
        names -= {'epochs'}
    other_rate = False
    if not state.get('changes') and not state.get('own_rate'):
        names -= set(schedule.RATE_FLAGS)
        other_rate = any(f'{float(was):.6g}' != f'{float(would):.6g}' for was, would in rates)
    words = [f'{name.replace("_", "-")} {_word(then[name])} -> {_word(now[name])}' for name in sorted(names)]
    words += ['another learning rate'] * other_rate
    untrained = any(not flags.meaning(name).evaluate for name in names - {'epochs', 'training images'})
    untrained |= other_rate and then.get('epochs') == now.get('epochs')
    if args.resume and state['epoch'] >= args.epochs and untrained:
        raise UserError(f'{args.resume} has its {state["epoch"]} epochs behind it, so that nothing would be trained '
                        f'with {", ".join(words)}; give a larger --epochs, or another --checkpoint to a run of its own')
    batches = f' and {state["step"]} batches' if state.get('step') else ''
    return [f'after epoch {state["epoch"]}{batches}: {", ".join(words)}'] if words else []


def by_position(args):
    """Whether what a step does depends on the share of the training that is behind it, other than by its rate."""
    return args.swa is not None or methods.by_position(args)


def _word(value):
    return ' '.join(map(str, value)) or 'none' if isinstance(value, (list, tuple)) else str(value)
