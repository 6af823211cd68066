"""How much memory there is, to refuse at once what cannot fit."""
import math
import pathlib

import torch

from utils import distributed
from utils.errors import UserError


def free(device='cpu'):
    """Bytes that this process can still use on a device; on the CPU by the machine and by its control group.

    inf if unknown.
    """
    if torch.device(device).type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    machine = _numbers('/proc/meminfo')
    known = [1024 * machine['MemAvailable']] if 'MemAvailable' in machine else []
    for folder, limit, used in (('/sys/fs/cgroup', 'memory.max', 'memory.current'),
                                ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')):
        limit, used = _read(f'{folder}/{limit}').strip(), _read(f'{folder}/{used}').strip()
        if limit.isdecimal() and used.isdecimal():
            held = _numbers(f'{folder}/memory.stat')  # files that are only cached give way
            known.append(int(limit) - int(used) + held.get('inactive_file', 0) + held.get('active_file', 0))
    return min(known, default=math.inf)


def check(needed, what, flag, device='cpu'):
    """UserError if `what`, in words, which takes `needed` bytes, does not fit into memory; flag: what to lower."""
    if needed > (there := free(device)):
        raise UserError(f'{what} take {needed / 2 ** 30:.4g} GB of memory, and {there / 2 ** 30:.4g} GB are free; give '
                        f'a smaller {flag}')


def check_network(args, build, architecture, size, device):
    """UserError if the weights and images of one pass do not fit into the memory of `device`, before they are made.

    build(args, architecture) -> model, see `without_weights`. size: of the images, in pixels a side. When training
    gradients and the optimizer's state count too.
    """
    parameters = sum(p.nbytes for p in without_weights(lambda: build(args, architecture)).parameters())
    copies = 1 if args.evaluate else 2 + (args.optimizer != 'SGD' or bool(args.momentum))
    beside = '' if args.evaluate else ' with gradients and optimizer state'
    check(copies * parameters, f'the weights of --arch {args.arch}{beside}', 'network', device)
    check(2 * 3 * size ** 2 * 4, f'two images of {size}x{size} pixels', '--image-size', device)


def without_weights(build):
    """`build()` on the meta device, where weights take no memory; on the CPU if it reads a tensor on the way."""
    try:
        with torch.device('meta'):
            return build()
    except RuntimeError:  # Tensor.item() and the like; any other is raised again
        with torch.random.fork_rng(devices=[]):
            return build()


class Kept:
    """With `hooks` around a pass of `images` images forward, `bytes` is what it keeps of them for `backward`.

    Only tensors whose first axis is the batch count, as all else does not grow with it: parameters, normalised class
    weights, the statistics of BatchNorm.
    """

    def __init__(self, model, images):
        self.images = images
        self.storages = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor):
        if tensor.dim() > 1 and len(tensor) == self.images:
            storage = tensor.untyped_storage()
            self.storages.setdefault(storage._cdata, storage.nbytes())
        return tensor  # which keeps the storage, so that no other gets its address

    @property
    def bytes(self):
        return sum(self.storages.values())


def check_pass(args, kept, images, device):
    """UserError if training cannot keep the activations of a batch, or ghost batch, in memory.

    kept: bytes that a pass of `images` images has kept, in float32.
    """
    part = -(-min(args.mini_batch or args.train_batch, args.train_batch) // distributed.world_size())
    needed = kept / images * part / (2 if args.precision == 'bf16' else 1)
    check(needed, f'the activations of {part} images in --arch {args.arch}', '--mini-batch', device)


def _numbers(path):
    words = (line.replace(':', ' ').split() for line in _read(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _read(path):
    try:
        return pathlib.Path(path).read_text(errors='replace')
    except OSError:
        return ''
