"""Averages of weights, which are tested instead of the weights: moving over steps, or the mean over epochs."""
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils import after_steps, checkpoint, distributed
from utils.parts import ghost_batch


def average_of_weights(args, state, model, optimizer):
    """With --ema the moving average of the weights and buffers of `model` over optimizer steps; with --swa the mean of
    its weights after epochs (Izmailov et al., arXiv 1803.05407), which `Run.steps` updates; otherwise None.
    """
    if args.swa is not None:
        average = AveragedModel(model)
    elif args.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        after_steps.register(optimizer, lambda: average.update_parameters(model), '--ema')
    else:
        return None
    average.eval()
    if state.get('ema'):
        checkpoint.load_weights(average, state['ema'], args.resume)
    return average


@torch.no_grad()
def estimate_statistics(average, batches, args, epoch):
    """BatchNorm's running statistics of `average`: the mean over ghost batches of the epoch that was just trained on.

    Several processes give what one gives. Layers that are frozen keep theirs.
    """
    kinds = torch.nn.modules.batchnorm._BatchNorm
    norms = [module for module in average.train().modules() if isinstance(module, kinds) and module.training
             and module.running_mean is not None]
    frozen = {name: buffer.clone() for name, buffer in average.named_buffers()}
    parts = (part for batch in batches.shuffled(args.seed, epoch)
             for part in zip(*(each.split(ghost_batch(args)) for each in batch))
             if len(part[0]) > 1 or ghost_batch(args) == 1)
    network, momenta = average.module, [norm.momentum for norm in norms]
    in_head = any(isinstance(module, kinds) for module in network.head.modules())
    for norm in norms:  # not torch's update_bn, which resets frozen layers, so that those behind them see other inputs
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    for images, targets in parts:
        network(images, targets) if in_head else network.features(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    running = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    for name, buffer in average.named_buffers():
        if id(buffer) not in running:
            buffer.copy_(frozen[name])
    for norm in norms if distributed.active() else ():
        count = norm.num_batches_tracked.double()
        sums = torch.cat([norm.running_mean.double() * count, norm.running_var.double() * count, count[None]])
        *sums, count = distributed.all_reduce(sums).split([len(norm.running_mean), len(norm.running_var), 1])
        for buffer, total in zip((norm.running_mean, norm.running_var), sums):
            buffer.copy_(total / count)
        norm.num_batches_tracked.copy_(count.squeeze())
    average.eval()
