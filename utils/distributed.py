"""Several processes, started by torchrun, that train one network together. Without torchrun a process is the only one.

Each process takes the same part of every batch; DistributedDataParallel averages the gradients over all images of the
batch. Only the first process prints and writes files.
"""
import atexit
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
    """Join the process group, if torchrun started this process. With CUDA each takes the device of its local rank."""
    if not started_by_torchrun() or active():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(f'torchrun started process {local_rank() + 1} on this machine, which has '
                            f'{torch.cuda.device_count()} '
                            'CUDA devices; give --nproc-per-node as many as there are devices')
        torch.cuda.set_device(local_rank())
    store, own_rank, processes = next(dist.rendezvous('env://'))
    dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', rank=own_rank, world_size=processes,
                            store=_store_of_this_start(store, own_rank, processes))
    if not is_first():
        sys.stdout = open(os.devnull, 'w', errors='backslashreplace')


def _store_of_this_start(store, own_rank, processes):
    """A prefix of `store` that is new and the same for all processes.

    torchrun keeps one store over all of its restarts (PyTorch 2.14), and a process would take what a killed one left
    there for that of its successor. So each process asks with a word of its own, and the first one answers those that
    are alive.
    """
    if own_rank > 0:
        word = uuid.uuid4().hex
        store.set(f'hello {own_rank}', word)
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
    """The rank of this process, from 0."""
    return dist.get_rank() if active() else 0


def world_size():
    return dist.get_world_size() if active() else 1


def local_rank():
    """The rank of this process on its machine, from 0."""
    return int(os.environ.get('LOCAL_RANK', 0))


def is_first():
    return rank() == 0


def barrier():
    """Wait until all processes are here. A process that has failed never comes; torchrun then ends the others."""
    if active():
        dist.barrier()


def broadcast(value):
    """The first process's `value`, any object that can be pickled, in all processes."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather(value):
    """A list of every process's `value`, any object that can be pickled, by rank, in all processes."""
    values = [value] * world_size()
    if active():
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """The sum of every process's `tensor`, in place; returns it."""
    if active():
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_on_each_machine():
    """The first process of each machine runs the block before the others, so that it alone downloads."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def local_slices(images, batch_size, first=0):
    """This process's part of each batch from index `first` on: slices, perhaps empty, of the positions 0 .. images - 1.

    Every batch is cut at the same places, so a short last batch leaves fewer images, or none, to the last processes.
    """
    size = batch_size // world_size()
    starts = range(first * batch_size + rank() * size, -(-images // batch_size) * batch_size, batch_size)
    ends = (min(start // batch_size * batch_size + rank() * size + size, images) for start in starts)
    return [slice(min(start, end), end) for start, end in zip(starts, ends)]


def data_parallel(model):
    """`model`, among several processes inside of DistributedDataParallel, which averages the gradients in `backward`.

    Raises UserError for a BatchNorm whose running statistics several processes cannot combine.
    """
    if not active():
        return model
    norms = (module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm))
    if any(norm.momentum is None for norm in norms):
        raise UserError('BatchNorm with momentum None, an average over all batches, cannot be trained by several '
                        'processes')
    kind = torch.nn.parallel.DistributedDataParallel
    # utils/parts.py takes care of buffers; the option that says so has another name from PyTorch 2.14 on.
    parameters = inspect.signature(kind.__init__).parameters
    return kind(model, **{'forward_sync_buffers' if 'forward_sync_buffers' in parameters
                          else 'broadcast_buffers': False})


def pause_unless_first():
    """Where all processes fail alike the first says why, and torchrun ends the others while they wait here."""
    if not is_first():
        time.sleep(5)


def connection_lost(error):
    return active() and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def stop():
    """End this process, at the end of a script, if it is one of several; after a `barrier`, so that all end together.

    Python's own end is skipped, as threads of gloo outlive the group (a network in DistributedDataParallel keeps it,
    PyTorch 2.14): one that frees a collective while Python ends aborts its process, and torchrun then kills the others.
    """
    if active():
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
