"""The optimizer's options as a pure function of the position in training: nothing to save, nothing to lose."""
import bisect
import copy
import functools
import inspect
import math
from fractions import Fraction

import torch

from utils import after_steps
from utils.errors import UserError
from utils.flags import FLOAT32, bounded

# An optimizer of your own is one more line here: its class, and its options where neither flags nor a regime set them.
# Adam and AdamW have no momentum that could be set.
OPTIMIZERS = {
    'SGD': functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    'RMSprop': functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.0, weight_decay=5e-4),
    'Adam': functools.partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4),
    'AdamW': functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=5e-4),
}
RATE_FLAGS = ('optimizer', 'lr', 'lr_schedule', 'schedule', 'lr_step_size', 'gamma', 'warmup', 'lr_start', 'lr_floor')


def add_arguments(group):
    """The flags that say how long and at which rates to train. None is the default of what a model's regime may set."""
    group.add_argument('--epochs', type=bounded(int, 1), default=300, metavar='N', help='(%(default)s)')
    group.add_argument('--start-epoch', type=bounded(int, 0), default=0, metavar='N',
                       help='begin the schedule there (0)')
    group.add_argument('--optimizer', choices=OPTIMIZERS, help='(SGD, or as the model\'s regime says)')
    group.add_argument('--lr', '--learning-rate', type=bounded(float, 0),
                       help='highest learning rate (0.1, of other optimizers than SGD 0.001; or the regime\'s)')
    group.add_argument('--lr-schedule', choices=('step', 'cosine', 'onecycle', 'linear'),
                       help='(step, or the regime\'s)')
    group.add_argument('--schedule', type=bounded(int, 0), nargs='+', metavar='EPOCH',
                       help='step: when to multiply lr by --gamma (after 1/2 and 3/4 of the epochs)')
    group.add_argument('--lr-step-size', type=bounded(int, 1), metavar='N',
                       help='step: multiply lr by --gamma every N epochs')
    group.add_argument('--gamma', type=bounded(float, 0), help='step: (0.1)')
    group.add_argument('--warmup', type=bounded(float, 0), metavar='EPOCHS',
                       help='climb to the schedule during these (0; onecycle: 0.3 of the epochs)')
    group.add_argument('--lr-start', type=bounded(float, 0, 1), metavar='F',
                       help='linear: the fraction of the highest rate from which the warm-up climbs (0)')
    group.add_argument('--lr-floor', type=bounded(float, 0, 1), metavar='F',
                       help='linear: the fraction of the highest rate down to which it falls (0)')
    group.add_argument('--momentum', type=bounded(float, 0, 1), help='(0.9, of RMSprop 0; or the regime\'s)')
    group.add_argument('--nesterov', action='store_true')
    group.add_argument('--optimizer-eps', type=bounded(float, 0, above=True), metavar='E',
                       help="added to the denominator of RMSprop, Adam and AdamW (1e-8)")
    group.add_argument('--weight-decay', '--wd', type=bounded(float, 0),
                       help='(0.0005, in imagenet.py 0.0001; or the regime\'s)')
    group.add_argument('--base-batch', type=bounded(int, 1), default=128, metavar='N',
                       help='the batch that lr and epochs are meant for, for the next two flags (%(default)s)')
    group.add_argument('--lr-scaling', choices=('none', 'sqrt', 'linear'), default='none',
                       help='multiply lr by (batch / base batch), or by its square root (none)')
    group.add_argument('--epoch-scaling', action='store_true',
                       help='multiply the epochs, also of schedule and warmup, by (batch / base batch): as many steps '
                       'as with the base batch')


def fill_in(args, regime, parser, default_lr=None):
    """Refuse a schedule that is invalid, and fill in what is not given.

    regime: the model's, see `changes`. A flag wins over the setting of its name, and any flag about the learning rate
    over all of the regime's rates. args.regime becomes a dict: the optimizer's options by the epoch from which they
    hold, see `options_at`; and args.lr_schedule 'regime' if the rates are the regime's. default_lr: replaces the
    default rate of the optimizer.
    """
    settings = changes(regime, args.epochs)
    given = {name: getattr(args, name) for name in ('momentum', 'weight_decay') if getattr(args, name) is not None}
    if args.optimizer_eps:
        given['eps'] = args.optimizer_eps
    if any(getattr(args, name) is not None for name in RATE_FLAGS):
        settings = {epoch: {name: value for name, value in now.items() if name != 'lr'}
                    for epoch, now in settings.items()}
    elif any('lr' in now for now in settings.values()):
        args.lr_schedule = 'regime'  # not a choice of the flag: giving no flag about the rate is
    names = list(dict.fromkeys(now.get('optimizer', 'SGD') for now in settings.values()))
    names = [args.optimizer] if args.optimizer else names
    if len(names) > 1 or names[0] not in OPTIMIZERS:
        parser.error(f'--arch {args.arch} asks for the optimizer {" and then ".join(names)}, and a run has one of '
                     f'{", ".join(OPTIMIZERS)}; choose it with --optimizer')
    args.optimizer = names[0]
    defaults = dict(OPTIMIZERS[args.optimizer].keywords)
    if default_lr is not None:
        defaults['lr'] = default_lr
    if 'momentum' in args.given and 'momentum' not in defaults:
        parser.error(f'--momentum is not used by --optimizer {args.optimizer}')

    scale = _scale(args)
    if 'base_batch' in args.given and args.lr_scaling == 'none' and not args.epoch_scaling:
        parser.error('--base-batch is not used without --lr-scaling sqrt, --lr-scaling linear or --epoch-scaling')
    stretch = _stretch(args)
    factor = {'none': 1.0, 'sqrt': math.sqrt(scale), 'linear': float(scale)}[args.lr_scaling]
    _fill_in_rate(args, stretch, parser)
    args.epochs = math.ceil(args.epochs * stretch)
    starts = {math.ceil(epoch * stretch): now for epoch, now in settings.items()}
    args.regime = {epoch: {**defaults, **now, **given} for epoch, now in starts.items() if epoch < args.epochs}
    for now in args.regime.values():
        now['lr'] = (now['lr'] if args.lr is None else args.lr) * factor
        now.pop('optimizer', None)
        if 'momentum' not in defaults:  # the regime was written for another optimizer
            now.pop('momentum', None)
    for name in ('lr', 'momentum', 'weight_decay'):
        setattr(args, name, args.regime[0].get(name))
    if args.lr_schedule == 'regime' and args.lr == 0:
        parser.error(f'the regime of --arch {args.arch} must begin with a learning rate above 0, as the rates of '
                     'parameter '
                     f'groups follow it in proportion; it has {args.lr}')
    if args.optimizer_eps and 'eps' not in inspect.signature(OPTIMIZERS[args.optimizer].func).parameters:
        parser.error(f'--optimizer-eps is not used by --optimizer {args.optimizer}')
    if args.nesterov and args.optimizer != 'SGD':
        parser.error(f'--nesterov is for --optimizer SGD, not {args.optimizer}')
    if args.nesterov and args.momentum == 0:
        parser.error('--nesterov needs a --momentum above 0, was given 0')
    if args.start_epoch >= args.epochs:
        parser.error(f'--start-epoch {args.start_epoch} leaves nothing to train; --epochs is {args.epochs}')
    _check_rates(args, parser)


def _scale(args):
    """The batch over the base batch; exact, as epochs are rounded up."""
    return Fraction(args.train_batch * args.batch_multiplier, args.base_batch)


def _stretch(args):
    """By how much epochs are multiplied."""
    return _scale(args) if args.epoch_scaling else 1


def _check_rates(args, parser):
    try:
        last = learning_rate(args.epochs - 1, 1, args)
    except OverflowError:  # of a large gamma to the power of milestones
        last = math.inf
    highest, most = max(last, *(now['lr'] for now in args.regime.values())), FLOAT32[0] / 1000  # Adam divides by 0.1
    highest *= max(args.bias_lr_factor, 1)
    if (args.weight_decay or 0) / args.bias_lr_factor > FLOAT32[0]:
        parser.error(f'--weight-decay {args.weight_decay:g} divided by --bias-lr-factor {args.bias_lr_factor:g} is too '
                     'large a number')
    if highest > most:
        parser.error(f'the learning rate must not become more than {most:.3g}, and --lr, --gamma and --lr-scaling make '
                     f'it {highest:.3g}')


def changes(regime, epochs):
    """What is set in training of `epochs`: a dict from epoch 0, and each epoch that changes something, to all settings.

    regime: None, a dict of epoch -> settings, or a function epoch -> settings (or None); a setting holds until it is
    set again. Settings: 'optimizer', which cannot change on the way, 'lr', 'momentum', 'weight_decay' and other
    options of the optimizer.
    """
    setting = regime if callable(regime) else (regime or {}).get
    reached = range(epochs)
    asked = reached if callable(regime) else sorted({0, *(epoch for epoch in regime or () if epoch in reached)})
    now, result = {}, {}
    for epoch in asked:
        before, now = now, {**now, **(setting(epoch) or {})}
        if epoch == 0 or now != before:
            result[epoch] = now
    return result


def options_at(regime, epoch):
    """The optimizer's options in `epoch`; regime: args.regime."""
    return regime[epoch if epoch in regime else max(start for start in regime if start <= epoch)]


def _fill_in_rate(args, stretch, parser):
    if args.lr_schedule == 'regime':
        return
    args.lr_schedule = args.lr_schedule or 'step'
    args.gamma = 0.1 if args.gamma is None else args.gamma
    if args.lr_schedule != 'linear':
        for flag in sorted({'lr_start', 'lr_floor'} & args.given):
            parser.error(f'{parser.spelling(flag)} belongs to --lr-schedule linear, not {args.lr_schedule}')
    args.lr_start, args.lr_floor = args.lr_start or 0.0, args.lr_floor or 0.0
    if args.lr_schedule != 'step':
        for flag in sorted({'schedule', 'lr_step_size', 'gamma'} & args.given):
            parser.error(f'{parser.spelling(flag)} belongs to --lr-schedule step, not {args.lr_schedule}')
        args.schedule = []
    elif args.schedule is not None and args.lr_step_size:
        parser.error('--schedule and --lr-step-size both say when the learning rate falls; use one of them')
    elif args.lr_step_size:
        args.schedule = []  # its milestones are not listed, as there may be millions
    elif args.schedule is None:
        args.schedule = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    elif max(args.schedule) >= args.epochs:
        given = args.schedule if len(args.schedule) <= 20 else [max(args.schedule)]
        parser.error(f'--schedule {" ".join(map(str, given))} goes past the last epoch; --epochs is {args.epochs}')
    if args.warmup is None:
        args.warmup = 0.3 * args.epochs if args.lr_schedule == 'onecycle' else 0
    if args.warmup > args.epochs:
        parser.error(f'--warmup {args.warmup:g} is longer than the whole training; --epochs is {args.epochs}')
    if 'lr_start' in args.given and not args.warmup:
        parser.error('--lr-start is where the warm-up begins, and there is none without --warmup')
    args.schedule = [math.ceil(milestone * stretch) for milestone in sorted(args.schedule)]
    args.warmup *= float(stretch)


def apply(optimizer, step, steps_per_epoch, args):
    """Set the options of `optimizer` for `step`, counted from 0 at the beginning of training.

    The schedule multiplies the learning rate that each parameter group was made with. Other options that the regime
    changes on the way follow it in those groups that were made with its first values; all others stay as they are.
    UserError if the loop has changed args.lr, or a group's rate since its newest step: it would have no effect.
    """
    if args.lr != args.regime[0].get('lr'):
        raise UserError(f'the loop has set args.lr to {args.lr:g}, which is read once, where the optimizer is made; '
                        "set group['lr'] of the optimizer's groups, and leave schedule.apply out of the loop")
    for group, rate in zip(optimizer.param_groups, after_steps.newest_rates(optimizer)):
        if isinstance(rate, (int, float)) and group['lr'] != rate:
            raise UserError(f'the loop has set the learning rate to {float(group["lr"]):g}, and schedule.apply sets it '
                            'again before the next step; leave out one of them')
    first, now = args.regime[0], options_at(args.regime, step // steps_per_epoch)
    changing = {name for at in args.regime.values() for name in at.keys() | now.keys() if at.get(name) != now.get(name)}
    for group in optimizer.param_groups:
        made = made_with(group)
        for name in changing & now.keys() & made.keys() - {'lr'}:
            if made[name] == first.get(name, made[name]):
                group[name] = now[name]
        if 'lr' in made:
            group['lr'] = group_rate(group, step, steps_per_epoch, args)


def reset(optimizer, names):
    """Give these options the values that each parameter group was made with, whatever a checkpoint had."""
    for group in optimizer.param_groups:
        made = made_with(group)
        group.update({name: made[name] for name in names & made.keys()})


def made_with(group):
    """The options that a parameter group was made with, kept in the group itself when they are first asked for."""
    if 'made_with' not in group:  # copies, as an optimizer may change a list or a tensor of its options in place
        group['made_with'] = copy.deepcopy({name: value for name, value in group.items() if name != 'params'})
    return group['made_with']


def group_rate(group, step, steps_per_epoch, args):
    """The learning rate of a parameter group at `step`."""
    return learning_rate(step, steps_per_epoch, args, group.get('made_with', group)['lr'])


def learning_rate(step, steps_per_epoch, args, highest=None):
    """The rate at `step` (0-based) of `args.epochs * steps_per_epoch`, for `highest`, which is args.lr by default:

    step      highest * args.gamma ^ (milestones in args.schedule, in epochs, that are behind), or with
              args.lr_step_size ^ (how often as many epochs are behind)
    cosine    from `highest` to 0 along half a cosine
    linear    from `highest` to args.lr_floor times it, in a line
    onecycle  up from highest / 25 to `highest`, then down to highest / 250,000, both along half a cosine
              (Smith and Topin, arXiv 1708.07120, as torch.optim.lr_scheduler.OneCycleLR, with constant momentum)
    regime    as the regime of the model says for the epoch, in proportion to `highest`, which is its first rate by
              default

    The first args.warmup epochs climb linearly to the rate that follows, for linear from args.lr_start times it; for
    onecycle they are the way up.
    """
    highest = args.lr if highest is None else highest
    if args.lr_schedule == 'regime':
        rate = options_at(args.regime, step // steps_per_epoch)['lr']
        return rate if highest == args.lr else rate * highest / args.lr
    warmup = args.warmup * steps_per_epoch
    steps = args.epochs * steps_per_epoch
    if args.lr_schedule == 'onecycle':
        peak = max(warmup - 1, 0)
        if step < peak:
            return _half_cosine(highest / 25, highest, step / peak)
        return _half_cosine(highest, highest / 25e4, (step - peak) / max(steps - 1 - peak, 1))
    climb = min((step + 1) / warmup, 1) if warmup else 1
    step = max(step, warmup)
    if args.lr_schedule == 'cosine':
        return climb * _half_cosine(highest, 0, (step - warmup) / (steps - warmup or 1))
    if args.lr_schedule == 'linear':
        fallen = (step - warmup) / (steps - warmup or 1)
        return highest * (args.lr_start + (1 - args.lr_start) * climb) * (1 - (1 - args.lr_floor) * fallen)
    epoch = int(step // steps_per_epoch)
    behind = (int(epoch / (args.lr_step_size * _stretch(args))) if args.lr_step_size
              else bisect.bisect_right(args.schedule, epoch))
    return climb * highest * args.gamma ** behind


def _half_cosine(start, end, fraction):
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
