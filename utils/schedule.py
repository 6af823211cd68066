"""The learning rate as a pure function of the position in training: nothing to save, nothing to restore wrongly."""
import math


def learning_rate(step, steps_per_epoch, args):
    """The rate for optimizer step `step` (0-based) of `args.epochs * steps_per_epoch`.

    step      args.lr * args.gamma ^ (milestones in args.schedule, in epochs, that are behind)
    cosine    from args.lr to 0 along half a cosine
    onecycle  up from args.lr / 25 to args.lr, then down to args.lr / 250,000, both along half a cosine
              (Smith and Topin, arXiv 1708.07120, with the constants of torch.optim.lr_scheduler.OneCycleLR)

    The first args.warmup epochs climb linearly to the rate that follows; for onecycle they are the way up.
    """
    warmup = round(args.warmup * steps_per_epoch)
    total = args.epochs * steps_per_epoch
    if args.lr_schedule == 'onecycle':
        peak = max(warmup - 1, 0)
        if step < peak:
            return _half_cosine(args.lr / 25, args.lr, step / peak)
        return _half_cosine(args.lr, args.lr / 25e4, (step - peak) / max(total - 1 - peak, 1))
    if step < warmup:
        return (step + 1) / warmup * _after_warmup(warmup, total, warmup, steps_per_epoch, args)
    return _after_warmup(step, total, warmup, steps_per_epoch, args)


def _after_warmup(step, total, warmup, steps_per_epoch, args):
    if args.lr_schedule == 'cosine':
        return _half_cosine(args.lr, 0.0, (step - warmup) / max(total - warmup, 1))
    epoch = step // steps_per_epoch
    return args.lr * args.gamma ** sum(milestone <= epoch for milestone in args.schedule)


def _half_cosine(start, end, fraction):
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
