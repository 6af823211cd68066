"""The options of the optimizer as a pure function of the position in training: nothing to save, nothing to restore wrongly."""
import math
from fractions import Fraction

from utils.arguments import number

# What flags and a model's regime may leave open. Adam and AdamW have no momentum that could be set.
DEFAULTS = {'SGD': {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 5e-4}, 'RMSprop': {'lr': 1e-3, 'momentum': 0.0, 'weight_decay': 5e-4},
            'Adam': {'lr': 1e-3, 'weight_decay': 5e-4}, 'AdamW': {'lr': 1e-3, 'weight_decay': 5e-4}}
RATE_FLAGS = ('optimizer', 'lr', 'lr_schedule', 'schedule', 'lr_step_size', 'gamma', 'warmup')


def add_arguments(group):
    """The flags that decide how long and along which rates to train. Those that a model's regime may set default to None."""
    group.add_argument('--epochs', type=number(int, 1), default=300, metavar='N', help='(%(default)s)')
    group.add_argument('--start-epoch', type=number(int, 0), default=0, metavar='N', help='begin the schedule there (0)')
    group.add_argument('--optimizer', choices=DEFAULTS, help='(SGD, or as the model\'s regime says)')
    group.add_argument('--lr', type=number(float, 0), help='highest learning rate (0.1, of other optimizers than SGD 0.001; or the regime\'s)')
    group.add_argument('--lr-schedule', choices=('step', 'cosine', 'onecycle'), help='(step, or the regime\'s)')
    group.add_argument('--schedule', type=number(int, 0), nargs='+', metavar='EPOCH',
                       help='step: when to multiply lr by --gamma (after 1/2 and 3/4 of the epochs)')
    group.add_argument('--lr-step-size', type=number(int, 1), metavar='N', help='step: multiply lr by --gamma every N epochs')
    group.add_argument('--gamma', type=number(float, 0), help='step: (0.1)')
    group.add_argument('--warmup', type=number(float, 0), metavar='EPOCHS',
                       help='climb to the schedule during these (0; onecycle: 0.3 of the epochs)')
    group.add_argument('--momentum', type=number(float, 0, 1), help='(0.9, of RMSprop 0; or the regime\'s)')
    group.add_argument('--nesterov', action='store_true')
    group.add_argument('--weight-decay', '--wd', type=number(float, 0), help='(0.0005, or the regime\'s)')
    group.add_argument('--base-batch', type=number(int, 1), default=128, metavar='N',
                       help='the batch that lr and epochs are meant for, for the next two (%(default)s)')
    group.add_argument('--lr-scaling', choices=('none', 'sqrt', 'linear'), default='none',
                       help='multiply lr by (batch / base batch), or by its square root (none)')
    group.add_argument('--epoch-scaling', action='store_true',
                       help='multiply the epochs, also those of schedule and warmup, by (batch / base batch): as many steps as with it')


def settle(args, regime, parser):
    """Refuse a schedule that cannot be, and fill in what was left open.

    `regime` is the model's, see `unrolled`. A flag wins over the setting of its name, and any flag about the learning rate
    over all of the regime's rates. args.regime becomes a list, for each epoch the options of the optimizer, and
    args.lr_schedule 'regime' if the rates are the regime's.
    """
    settings = unrolled(regime, args.epochs)
    own = {name: getattr(args, name) for name in ('momentum', 'weight_decay') if getattr(args, name) is not None}
    if any(getattr(args, name) is not None for name in RATE_FLAGS):
        settings = [{name: value for name, value in now.items() if name != 'lr'} for now in settings]
    elif any('lr' in now for now in settings):
        args.lr_schedule = 'regime'  # not a choice of the flag: leaving all flags about the rate out is
    names = [args.optimizer] if args.optimizer else list(dict.fromkeys(now.get('optimizer', 'SGD') for now in settings))
    if len(names) > 1 or names[0] not in DEFAULTS:
        parser.error(f'--arch {args.arch} wants the optimizer {" and then ".join(names)}, and a run has one of {", ".join(DEFAULTS)}; '
                     'choose it with --optimizer')
    args.optimizer = names[0]
    defaults = DEFAULTS[args.optimizer]
    if 'momentum' in args.given and 'momentum' not in defaults:
        parser.error(f'--momentum is not used by --optimizer {args.optimizer}')

    scale = Fraction(args.train_batch * args.batch_multiplier, args.base_batch)  # exact, as epochs are rounded up
    if 'base_batch' in args.given and args.lr_scaling == 'none' and not args.epoch_scaling:
        parser.error('--base-batch is not used without --lr-scaling sqrt, --lr-scaling linear or --epoch-scaling')
    stretch = scale if args.epoch_scaling else 1
    rates = {'none': 1.0, 'sqrt': math.sqrt(scale), 'linear': float(scale)}[args.lr_scaling]
    _settle_rate(args, stretch, parser)
    args.epochs = math.ceil(args.epochs * stretch)
    last = len(settings) - 1
    args.regime = [{**defaults, **settings[min(int(epoch / stretch), last)], **own} for epoch in range(args.epochs)]
    for now in args.regime:
        now['lr'] = (now['lr'] if args.lr is None else args.lr) * rates
        now.pop('optimizer', None)
        if 'momentum' not in defaults:  # the regime was written for another optimizer
            now.pop('momentum', None)
    args.lr, args.momentum, args.weight_decay = (args.regime[0].get(name) for name in ('lr', 'momentum', 'weight_decay'))
    if args.nesterov and args.optimizer != 'SGD':
        parser.error(f'--nesterov is for --optimizer SGD, not {args.optimizer}')
    if args.nesterov and args.momentum == 0:
        parser.error('--nesterov needs a --momentum above 0, was given 0')
    if args.start_epoch >= args.epochs:
        parser.error(f'--start-epoch {args.start_epoch} leaves nothing to train; --epochs is {args.epochs}')


def unrolled(regime, epochs):
    """The settings of each epoch, a list of dicts.

    regime: None, a dict of epoch -> settings, or a function epoch -> settings (or None); what is set holds until it is set
    anew. Settings: 'optimizer', which cannot change on the way, 'lr', 'momentum', 'weight_decay' and other options of the
    optimizer.
    """
    setting = regime if callable(regime) else (regime or {}).get
    now, result = {}, []
    for epoch in range(epochs):
        now = {**now, **(setting(epoch) or {})}
        result.append(now)
    return result


def _settle_rate(args, stretch, parser):
    if args.lr_schedule == 'regime':
        return
    args.lr_schedule = args.lr_schedule or 'step'
    args.gamma = 0.1 if args.gamma is None else args.gamma
    if args.lr_schedule != 'step':
        for flag in sorted({'schedule', 'lr_step_size', 'gamma'} & args.given):
            parser.error(f'--{flag.replace("_", "-")} belongs to --lr-schedule step, not {args.lr_schedule}')
        args.schedule = []
    elif args.schedule is not None and args.lr_step_size:
        parser.error('--schedule and --lr-step-size both say when the learning rate falls; use one of them')
    elif args.lr_step_size:
        args.schedule = list(range(args.lr_step_size, args.epochs, args.lr_step_size))
    elif args.schedule is None:
        args.schedule = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    elif max(args.schedule) >= args.epochs:
        parser.error(f'--schedule {" ".join(map(str, args.schedule))} goes past the last epoch; --epochs is {args.epochs}')
    if args.warmup is None:
        args.warmup = 0.3 * args.epochs if args.lr_schedule == 'onecycle' else 0
    if args.warmup > args.epochs:
        parser.error(f'--warmup {args.warmup:g} is longer than the whole training; --epochs is {args.epochs}')
    args.schedule = [math.ceil(milestone * stretch) for milestone in args.schedule]
    args.warmup *= float(stretch)


def options(step, steps_per_epoch, args):
    """The options of the optimizer for step `step` (0-based), a dict: of its epoch, with the learning rate of the step."""
    return {**args.regime[step // steps_per_epoch], 'lr': learning_rate(step, steps_per_epoch, args)}


def learning_rate(step, steps_per_epoch, args):
    """The rate for optimizer step `step` (0-based) of `args.epochs * steps_per_epoch`.

    step      args.lr * args.gamma ^ (milestones in args.schedule, in epochs, that are behind)
    cosine    from args.lr to 0 along half a cosine
    onecycle  up from args.lr / 25 to args.lr, then down to args.lr / 250,000, both along half a cosine
              (Smith and Topin, arXiv 1708.07120, as torch.optim.lr_scheduler.OneCycleLR, with constant momentum)
    regime    as the regime of the model says for the epoch

    The first args.warmup epochs climb linearly to the rate that follows; for onecycle they are the way up.
    """
    if args.lr_schedule == 'regime':
        return args.regime[step // steps_per_epoch]['lr']
    warmup = args.warmup * steps_per_epoch
    total = args.epochs * steps_per_epoch
    if args.lr_schedule == 'onecycle':
        peak = max(warmup - 1, 0)
        if step < peak:
            return _half_cosine(args.lr / 25, args.lr, step / peak)
        return _half_cosine(args.lr, args.lr / 25e4, (step - peak) / max(total - 1 - peak, 1))
    climb = min((step + 1) / warmup, 1) if warmup else 1
    step = max(step, warmup)
    if args.lr_schedule == 'cosine':
        return climb * _half_cosine(args.lr, 0, (step - warmup) / (total - warmup or 1))
    return climb * args.lr * args.gamma ** sum(milestone <= step // steps_per_epoch for milestone in args.schedule)


def _half_cosine(start, end, fraction):
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
