"""How a batch passes the network: whole, in ghost batches, or shared out among processes; the gradient is the same."""
import contextlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from utils import distributed
from utils.errors import UserError
from utils.eval import shown_logits


class Batch(NamedTuple):
    """images: float (N, 3, height, width), of this process. targets: (N,), or (N, classes). size: images of all
    processes; of one process it is N, whatever it says.
    """
    images: torch.Tensor
    targets: torch.Tensor
    size: int


class Parts:
    """The parts in which each batch passes the network, for the closure of an optimizer's step:

        for images, targets, weight in parts.of(batch):
            outputs = network(images, targets)
            loss = criterion(outputs, targets)             # the mean over the part
            (weight * loss).backward()                     # all parts of all processes: the mean over the batch
            parts.keep(outputs, loss)
        parts.flood(args.flood)                            # --flood
        return parts.logits, parts.loss

    A batch is one part. With --mini-batch N it is cut into ghost batches of N images (Hoffer et al., arXiv
    1705.08741), each with BatchNorm statistics, and noise on the weights, of its own. Among several processes each has
    a part of every batch, or several; DistributedDataParallel averages the gradients in the last backward, and
    BatchNorm's running statistics are combined after it. A process without images passes two blank ones with weight 0,
    as the others wait for it.

    With --adversarial each part passes twice, with half the weight: as it is, and after a step of the fast gradient
    sign method along the gradient that the first backward left at the images (Goodfellow et al., arXiv 1412.6572,
    section 6). What is kept is of the first.

    network: `Run.network`, in training mode. optimizer: told by `next_part(parts)`, where it has that, that the noise
    on the weights must be new; where its `local_pass` is true, gradients are not averaged; its `pass_fraction`, where
    it is below 1, is the share of the batch that the pass is over. pixels: a `Pixels`, for --adversarial.
    """

    def __init__(self, network, optimizer, args, pixels=None):
        self.network, self.optimizer = network, optimizer
        self.statistics, self.shown_logits = BatchNormStatistics(network), shown_logits(network)
        self.adversarial, self.pixels = args.adversarial, pixels
        self.ghost_batch, self.mini_batch = ghost_batch(args), args.mini_batch
        self.noise_batch = args.mini_batch or args.train_batch
        self.local_batch = args.train_batch * args.batch_multiplier // distributed.world_size()
        self.rank_offset = distributed.rank() * self.local_batch
        self.whole = not (distributed.active() or args.mini_batch or args.batch_multiplier > 1)

    def of(self, batch):
        """(images, targets, weight) of each part of a `Batch`; the weight is a number."""
        if not distributed.active():  # then a loop may make a batch longer or shorter
            batch = batch._replace(size=len(batch.targets) or batch.size)
        batch, passes = self._to_pass(batch), 2 if self.adversarial else 1
        self.batch_size, self.passes, self.trained_losses = batch.size, passes, []
        images, targets = batch.images, batch.targets
        self.kept_logits, self.kept_losses, self.local_images, noise_index = [], [], len(targets), 0
        ghost_batch = self.ghost_batch
        if self.whole:  # also a batch that the loop has made longer
            ghost_batch = self.noise_batch = max(ghost_batch, len(targets))
        expected = min(max(batch.size - self.rank_offset, 0), self.local_batch)
        sizes = part_sizes(len(targets), expected, ghost_batch)
        parts = list(zip(images.split(sizes), targets.split(sizes)))
        if not parts:
            parts = [(images.new_zeros(2, *images.shape[1:]), targets.new_zeros(2, *targets.shape[1:]))]
        averaged = not getattr(self.optimizer, 'local_pass', False)
        with self.statistics.combined(passes * len(sizes)):
            for index, (images, targets) in enumerate(parts):
                noise_index = self._renew_noise(noise_index, self.rank_offset + index * ghost_batch, batch.size)
                self.part_images = len(targets)
                weight = len(targets) * distributed.world_size() / batch.size if self.local_images else 0.0
                last = averaged and index == len(parts) - 1
                with self._averaging(now=last and passes == 1):
                    self.keeping = True
                    yield images.requires_grad_() if passes == 2 else images, targets, weight / passes
                if passes == 2:
                    with self._averaging(now=last):
                        self.keeping = False
                        moved = self.pixels.uphill(images.detach(), images.grad, self.adversarial)
                        yield moved, targets, weight / passes
        self._renew_noise(noise_index, batch.size, batch.size)  # as often as in every other process

    def _to_pass(self, batch):
        """The images of the batch that the optimizer's pass is over, all or the first ones, as a `Batch`.

        They are the first pass_fraction of the images of all processes, rounded up to whole ghost batches with
        --mini-batch, otherwise to an even number, as BatchNorm may need two. So several processes climb as one would,
        and those whose images come later wait; where `local_pass` is true, each takes as much of its own images.
        """
        fraction, local = getattr(self.optimizer, 'pass_fraction', 1.0), len(batch.targets)
        if fraction == 1:
            return batch
        unit = self.mini_batch or 2
        if getattr(self.optimizer, 'local_pass', False):
            count = min(unit * whole_units(fraction * local / unit), local)
            size = batch.size * count / max(local, 1)
        else:
            size = min(unit * whole_units(fraction * batch.size / unit), batch.size)
            count = min(max(size - self.rank_offset, 0), local)
        return Batch(batch.images[:count], batch.targets[:count], size)

    def keep(self, outputs, loss):
        """What `logits` and `loss` are made of; to be called once for each part."""
        mean = loss.detach() * (self.part_images / max(self.local_images, 1))
        self.trained_losses.append(mean / self.passes)
        if self.keeping:
            self.kept_logits.append(self.shown_logits(outputs))
            self.kept_losses.append(mean)

    def flood(self, level):
        """Make the gradients those of |loss - level| + level, unless `level` is None (Ishida et al., arXiv 2002.08709).

        The loss is the mean over all images of the pass, of all processes, with --adversarial also of the second pass;
        where it is below `level`, the step goes up. Nothing here waits for the device.
        """
        if level is None:
            return
        loss = sum(self.trained_losses)
        if distributed.active() and not getattr(self.optimizer, 'local_pass', False):
            loss = distributed.all_reduce(loss.double() * (self.local_images / self.batch_size))
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, torch.sign(loss - level).to(gradients[0].dtype))

    @property
    def logits(self):
        """(N, classes) of this process's images in the last pass over a batch, detached, without a margin."""
        return torch.cat(self.kept_logits)

    @property
    def loss(self):
        """The mean loss over this process's images in the last pass over a batch, detached, 0-d."""
        return sum(self.kept_losses)

    def _renew_noise(self, noise_index, position, batch_size):
        """New noise where a ghost batch, or else a batch of --train-batch, begins; returns how often there was new
        noise.
        """
        wanted = min(position, batch_size - 1) // self.noise_batch
        if wanted > noise_index and hasattr(self.optimizer, 'next_part'):
            self.optimizer.next_part(wanted - noise_index)
        return max(wanted, noise_index)

    def _averaging(self, now):
        """A context for a forward and backward pass, at whose end DistributedDataParallel averages the gradients if
        `now`.
        """
        return contextlib.nullcontext() if now or not distributed.active() else self.network.no_sync()


class BatchNormStatistics:
    """BatchNorm's running statistics as those of one process that sees the parts of all processes, one after another.

    Each process normalises with the statistics of its own part, as a ghost batch (Hoffer et al., arXiv 1705.08741).
    With momentum m, p parts change the running r0 into r = (1 - m)^p r0 + c, and those of all processes one after
    another into ... (1 - m)^p2 ((1 - m)^p1 r0 + c1) + c2 ..., so c = r - (1 - m)^p r0 of each process is all that has
    to be sent. Frozen layers, which are not in training mode, are left alone.
    """

    def __init__(self, network):
        norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
                 and module.running_mean is not None and module.training] if distributed.active() else []
        self.running = [buffer for module in norms for buffer in (module.running_mean, module.running_var)]
        self.counts = [module.num_batches_tracked for module in norms]
        if norms:
            keep = [1.0 - module.momentum for module in norms for _ in range(2)]
            sizes = torch.tensor([buffer.numel() for buffer in self.running])
            self.keep = torch.tensor(keep, dtype=torch.float64).repeat_interleave(sizes).to(self.running[0])

    @contextlib.contextmanager
    def combined(self, parts):
        """A context for the passes of one batch, of which this process has `parts`; with 0, among several processes, a
        blank pass does not count.
        """
        if not self.running:
            yield
            return
        before, counts = self._flat(), torch._foreach_add(self.counts, 0)
        yield
        changed = self._flat() - self.keep ** parts * before if parts else torch.zeros_like(before)
        local = torch.cat([changed, changed.new_full((1,), float(parts))])
        gathered = [torch.empty_like(local) for _ in range(distributed.world_size())]
        dist.all_gather(gathered, local)
        running, seen = before, 0
        for change in gathered:
            running = self.keep ** change[-1] * running + change[:-1]
            seen = seen + change[-1]
        pieces = running.split([buffer.numel() for buffer in self.running])
        torch._foreach_copy_(self.running, [piece.view_as(buffer) for piece, buffer in zip(pieces, self.running)])
        torch._foreach_copy_(self.counts, [count + seen.to(count.dtype) for count in counts])

    def _flat(self):
        return torch.cat([buffer.flatten() for buffer in self.running])


def whole_units(number):
    """A number above 0 rounded up, unless it is a whole one but for the error of floating point."""
    return max(math.ceil(round(number, 9)), 1)


def ghost_batch(args):
    """How many images pass the network together, at most."""
    return args.mini_batch or args.train_batch // distributed.world_size()


def check_parts(args, parser):
    """Refuse a batch that the processes, or the ghost batches, cannot share evenly."""
    processes, batch = distributed.world_size(), f'--train-batch, which is {args.train_batch}'
    if args.train_batch % processes:
        parser.error(f'{processes} processes cannot share {batch}; give a multiple of {processes}')
    if args.train_batch % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide {batch}')
    if args.train_batch // processes % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide the {args.train_batch // processes} images that '
                     'each of '
                     f'{processes} processes has of {batch}')


def check_batch(args, images, left_by=''):
    """UserError if the batch is larger than the training set of `images` images."""
    if args.train_batch * args.batch_multiplier > images:
        times = f' times --batch-multiplier {args.batch_multiplier}' if args.batch_multiplier > 1 else ''
        raise UserError(f'--train-batch {args.train_batch}{times} is larger than the training set of {images} '
                        f'images{left_by}')


def part_sizes(images, expected, ghost_batch):
    """The sizes of the parts of `images` images, a list: `ghost_batch` each, the last one what is left.

    Where images cannot be read, so that there are fewer than `expected`, a single image at the end joins the part
    before it, as BatchNorm may need two.
    """
    sizes = [min(ghost_batch, images - start) for start in range(0, images, ghost_batch)]
    if images < expected and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [ghost_batch + 1]
    return sizes


def smallest_part(args, images):
    """The images of the smallest part of an epoch of `images` images: 1, or 2 for any larger number."""
    return 1 if images % ghost_batch(args) == 1 % ghost_batch(args) else 2


@contextlib.contextmanager
def single_image_explained(args, images):
    """UserError, with what to change, for BatchNorm's ValueError about a single image; images: of the training set."""
    try:
        yield
    except ValueError as error:
        if 'more than 1 value per channel' not in str(error):
            raise
        why = 'a part of a batch has one, as images cannot be read or the loop has left some out'
        if smallest_part(args, images) == 1:
            why = (f'{images} images (less those that cannot be read) in parts of {ghost_batch(args)} leave one; '
                   f'choose another --{"mini" if args.mini_batch else "train"}-batch')
        raise UserError(f'BatchNorm cannot train on a single image, and {why}') from error
