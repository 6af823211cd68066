"""Several processes, started by torchrun, that train one network together. Started without it a process is the only one.

Each takes the same share of every batch; gradients are averaged over all images of the batch by DistributedDataParallel. The
first process alone prints, and writes files.
"""
import contextlib
import inspect
import os
import sys
import time
import uuid

import torch
import torch.distributed as dist

from utils.errors import UserError

SET_BY_TORCHRUN = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def start():
    """Meet the other processes, if torchrun started this one. With CUDA each takes the device of its number on this machine."""
    if not started_by_torchrun() or active():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(f'torchrun started process {local_rank() + 1} on this machine, which has {torch.cuda.device_count()} '
                            'CUDA devices; give --nproc-per-node as many as there are devices')
        torch.cuda.set_device(local_rank())
    store, number, processes = next(dist.rendezvous('env://'))
    dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', store=_of_this_start(store, number, processes), rank=number,
                            world_size=processes)
    if not is_first():
        sys.stdout = open(os.devnull, 'w')


def _of_this_start(store, number, processes):
    """A part of `store` that is new and the same for all processes.

    torchrun keeps one store over all of its restarts (PyTorch 2.14), and what a killed process had left there would be taken for
    that of its successor. So each process asks with a word of its own, and the first one answers those that are alive.
    """
    if number > 0:
        word = uuid.uuid4().hex
        store.set(f'hello {number}', word)
        name = store.get(f'welcome {word}').decode()  # waits for it
        store.add(f'{name} joined', 1)
    else:
        name, answered = uuid.uuid4().hex, set()
        while store.add(f'{name} joined', 0) < processes - 1:
            for other in range(1, processes):
                word = store.get(f'hello {other}').decode() if store.check([f'hello {other}']) else None
                if word and word not in answered:
                    store.set(f'welcome {word}', name)
                    answered.add(word)
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def started_by_torchrun():
    return dist.is_available() and all(os.environ.get(name) for name in SET_BY_TORCHRUN)


def active():
    return dist.is_available() and dist.is_initialized()


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if active() else 0


def world_size():
    return dist.get_world_size() if active() else 1


def local_rank():
    """This process's number on its machine, from 0."""
    return int(os.environ.get('LOCAL_RANK', 0))


def is_first():
    return rank() == 0


def wait():
    """Until all processes are here. One that has failed never comes; torchrun then ends the others."""
    if active():
        dist.barrier()


def agreed(value):
    """The first process's `value`, on all of them."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value):
    """A list of every process's `value`, in order, on all of them."""
    values = [value] * world_size()
    if active():
        dist.all_gather_object(values, value)
    return values


def total(tensor):
    """The sum of every process's `tensor`, in place; returns it."""
    if active():
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_on_each_machine():
    """The first process of each machine goes ahead, so that it alone downloads; the others follow when it is done."""
    if local_rank() > 0:
        wait()
    yield
    if local_rank() == 0:
        wait()


def shares(images, batch_size, first=0):
    """This process's part of each batch from number `first` on: slices of the positions 0 .. images - 1, perhaps empty ones.

    Every batch is cut at the same places, so what is behind the end of a short last batch is missing at the last processes.
    """
    size = batch_size // world_size()
    begins = range(first * batch_size + rank() * size, -(-images // batch_size) * batch_size, batch_size)
    ends = (min(begin // batch_size * batch_size + rank() * size + size, images) for begin in begins)
    return [slice(min(begin, end), end) for begin, end in zip(begins, ends)]


def parallel(model):
    """`model`, or what averages its gradients over the processes at the end of `backward`."""
    if not active():
        return model
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.momentum is None for module in model.modules()):
        raise UserError('BatchNorm with momentum None, an average over all batches, cannot be trained by several processes')
    kind = torch.nn.parallel.DistributedDataParallel
    # `Statistics` below takes care of buffers; the option that says so has another name from PyTorch 2.14 on.
    parameters = inspect.signature(kind.__init__).parameters
    return kind(model, **{'forward_sync_buffers' if 'forward_sync_buffers' in parameters else 'broadcast_buffers': False})


def averaging(model, now):
    """A context for the passes of what `parallel` gave: gradients are averaged at the end of `backward` if `now`."""
    return contextlib.nullcontext() if now or not active() else model.no_sync()


class Statistics:
    """BatchNorm's running statistics as one process has them that sees the parts of a batch in order, the first process's first.

    Each process normalises with the statistics of its own part, as a ghost batch (Hoffer et al., arXiv 1705.08741). With
    momentum m, p parts change the running r0 into r = (1 - m)^p r0 + c, and those of all processes one after another into
    ... (1 - m)^p2 ((1 - m)^p1 r0 + c1) + c2 ..., so c = r - (1 - m)^p r0 of each process is all that has to be sent.
    """

    def __init__(self, model):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
                 and module.running_mean is not None] if active() else []
        self.running = [buffer for module in norms for buffer in (module.running_mean, module.running_var)]
        self.counts = [module.num_batches_tracked for module in norms]
        if norms:
            keep = [1.0 - module.momentum for module in norms for _ in range(2)]
            sizes = torch.tensor([buffer.numel() for buffer in self.running])
            self.keep = torch.tensor(keep, dtype=torch.float64).repeat_interleave(sizes).to(self.running[0])

    @contextlib.contextmanager
    def of_all(self, parts):
        """Around the passes of one batch, of which this process has `parts`; one without passes something all the same."""
        if not self.running:
            yield
            return
        before, counts = self._flat(), torch._foreach_add(self.counts, 0)
        yield
        changed = self._flat() - self.keep ** parts * before if parts else torch.zeros_like(before)
        own = torch.cat([changed, changed.new_full((1,), float(parts))])
        everyones = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(everyones, own)
        running, seen = before, 0
        for change in everyones:
            running = self.keep ** change[-1] * running + change[:-1]
            seen = seen + change[-1]
        sizes = [buffer.numel() for buffer in self.running]
        torch._foreach_copy_(self.running, [piece.view_as(buffer) for piece, buffer in zip(running.split(sizes), self.running)])
        torch._foreach_copy_(self.counts, [count + seen.to(count.dtype) for count in counts])

    def _flat(self):
        return torch.cat([buffer.flatten() for buffer in self.running])


def let_the_first_speak():
    """Where all processes fail alike the first says why, and torchrun ends the others while they wait here."""
    if not is_first():
        time.sleep(5)


def connection_lost(error):
    return active() and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def stop():
    """Leave the other processes, when all is done."""
    if active():
        dist.destroy_process_group()
