"""The learning rate as a pure function of the position in training: nothing to save, nothing to restore wrongly."""
import math


def settle(args, parser):
    """Refuse a schedule that cannot be, and fill in the milestones and the warm-up where they were left open."""
    if args.lr_schedule != 'step':
        for flag in sorted({'schedule', 'gamma'} & args.given):
            parser.error(f'--{flag} belongs to --lr-schedule step, not {args.lr_schedule}')
    elif args.schedule is None:
        args.schedule = sorted({args.epochs // 2, args.epochs * 3 // 4} - {0})
    elif max(args.schedule) >= args.epochs:
        parser.error(f'--schedule {" ".join(map(str, args.schedule))} goes past the last epoch; --epochs is {args.epochs}')
    if args.warmup is None:
        args.warmup = 0.3 * args.epochs if args.lr_schedule == 'onecycle' else 0
    if args.warmup > args.epochs:
        parser.error(f'--warmup {args.warmup:g} is longer than the whole training; --epochs is {args.epochs}')
    if args.nesterov and args.momentum == 0:
        parser.error('--nesterov needs a --momentum above 0, was given 0')
    if args.start_epoch >= args.epochs:
        parser.error(f'--start-epoch {args.start_epoch} leaves nothing to train; --epochs is {args.epochs}')


def learning_rate(step, steps_per_epoch, args):
    """The rate for optimizer step `step` (0-based) of `args.epochs * steps_per_epoch`.

    step      args.lr * args.gamma ^ (milestones in args.schedule, in epochs, that are behind)
    cosine    from args.lr to 0 along half a cosine
    onecycle  up from args.lr / 25 to args.lr, then down to args.lr / 250,000, both along half a cosine
              (Smith and Topin, arXiv 1708.07120, as torch.optim.lr_scheduler.OneCycleLR, with constant momentum)

    The first args.warmup epochs climb linearly to the rate that follows; for onecycle they are the way up.
    """
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
