"""The strength of the methods as a pure function of the position in training: nothing to save, nothing to lose."""
from utils.errors import UserError
from utils.flags import bounded
from utils.schedule import made_with


def add_arguments(group):
    group.add_argument('--method-start', type=bounded(float, 0, 1), default=0.0, metavar='F',
                       help='the share of the training that is plain, before the methods begin (0)')
    group.add_argument('--method-ramp', type=bounded(float, 0, 1), default=0.0, metavar='F',
                       help='the share of the training in which their strength then grows from 0 to all of it (0)')


def check_arguments(args, parser):
    """Refuse a --method-start or --method-ramp that cannot be."""
    start = ' and '.join(f'{parser.spelling(name)} {value:g}' for name in ('method_start', 'method_ramp')
                         if (value := getattr(args, name)))
    if start and not args.method:
        parser.error('--method-start and --method-ramp need a --method whose strength they scale')
    if args.method_start == 1:
        parser.error('--method-start must be less than 1, as the method would never begin')
    if args.method_start + args.method_ramp > 1 + 1e-9:
        parser.error(f'{start} are more than the whole training, which is 1')


def at(step, steps, args):
    """The factor from 0 to 1 on what the methods do at `step`, counted from 0, of the `steps` of the whole training.

    It is 0 while less than args.method_start of the training is behind, and grows linearly to 1 in args.method_ramp.
    """
    since = step / steps - args.method_start
    return 0.0 if since < 0 else min(since / args.method_ramp, 1.0) if args.method_ramp else 1.0


def apply(run, criterion, step):
    """Set the strength of the chosen methods for `step`, counted from 0 at the beginning of training.

    run: a `Run`. criterion: of `build_criterion`, or a function of your own; UserError if a method has a loss that
    changes on the way, which that function would not be told.
    """
    if run.tells_criterion and not hasattr(criterion, 'before_step'):
        raise UserError('the loss of the chosen method changes on the way, which strength.apply tells '
                        'criterion.before_step, and the criterion of the loop has none; where it calls that of '
                        "build_criterion, give it that one's: criterion.before_step = built.before_step")
    steps = run.args.epochs * run.steps_per_epoch
    now = at(step, steps, run.args)
    for part in (*run.told_before_steps, criterion, run.optimizer):
        if hasattr(part, 'before_step'):
            part.before_step(step / steps, now)
    if not (run.args.method_start or run.args.method_ramp):  # what the loop does to the options stays
        return
    for group in run.optimizer.param_groups if run.scaled_options else ():
        made = made_with(group)
        group.update({option: now * made[option] for option in run.scaled_options & made.keys()})
