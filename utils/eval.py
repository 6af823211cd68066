"""Loss and accuracy, counted on the device: nothing here waits for it until a number is read."""
import contextlib
import copy

import torch
import torch.nn.functional as F

from utils import distributed
from utils.errors import UserError


def logits_of(outputs):
    """The logits in what a model returns: the outputs themselves, or the first of a tuple (a method's head adds more).

    The first may be a tuple again: WithAuxiliary holds what the head returned.
    """
    while isinstance(outputs, tuple):
        outputs = outputs[0]
    return outputs


@contextlib.contextmanager
def evaluating(model):
    """A context in which `model` is in evaluation mode; behind it each of its modules is in the mode that it was in, as
    where a test is made between two steps, or a part of the network is frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict(model, images, tta=None):
    """What the model returns for images (batch, 3, height, width); with tta='mirror', test-time augmentation, the mean
    of the logits of each image and of its mirror image.
    """
    outputs = model(images)
    if tta is None:
        return outputs
    one, mirrored = logits_of(outputs), logits_of(model(images.flip(-1)))
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) + mirrored.to(wide)) / 2


def shown_logits(model):
    """A function outputs -> logits, detached, which training accuracy is counted on: without the head's margin."""
    head = next((module for module in model.modules() if hasattr(module, 'without_margin')), None)
    plain = head.without_margin if head else torch.Tensor.detach
    return lambda outputs: plain(logits_of(outputs))


def cross_entropy(outputs, targets, label_smoothing=0.0):
    """Mean cross-entropy over the batch, natural logarithm, in float32 at least, whatever the precision of the network.

    targets: class indices (batch,), or shares of the classes (batch, classes). label_smoothing: the part of each
    target that is spread over all classes (Szegedy et al., arXiv 1512.00567, section 7).
    """
    logits = logits_of(outputs)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def quantities(num_classes):
    """The names of what a Meter reads."""
    return ['Loss', 'Top-1'] + ['Top-5'] * (num_classes > 5)


def metrics_line(part, values):
    """What a meter has read, as words: 'test loss 0.1234 top-1 98.76%'."""
    return f'{part} ' + ' '.join(f'{name.lower()} {value:.4f}' if name == 'Loss' else f'{name.lower()} {value:.2f}%'
                                 for name, value in values.items())


TWICE = 'meter.update is for each batch once, and the loop has called it again for the same'


class Meter:
    """Mean loss and top-1 accuracy over the batches of one pass; top-5 too where there are more than five classes.

    `update` only adds up on the device; `read` and `first_bad_batch` wait for it. Among several processes each counts
    its own images; `of_all_processes` and `read_all` put them together.
    """

    def __init__(self, batches, num_classes, device):
        self.losses = torch.zeros(batches, dtype=torch.float64, device=device)  # sums over the images of each batch
        self.correct = torch.zeros(2, dtype=torch.int64, device=device)  # among the first 1, among the first 5
        self.sizes = []
        self.quantities = quantities(num_classes)

    def update(self, outputs, targets, loss):
        """Count one batch; without targets it is a batch of which this process has no images.

        outputs: what the model returned. targets: (batch,), or (batch, classes) of which the largest counts. loss: the
        mean over the batch, a scalar tensor.
        """
        if len(self.sizes) == len(self.losses):
            raise UserError(TWICE)
        if len(targets):
            logits = logits_of(outputs).detach()
            targets = targets.argmax(dim=1) if targets.dim() == 2 else targets
            self.losses[len(self.sizes)] = loss.detach().double() * len(targets)
            first = logits.argmax(dim=1) == targets  # of equal logits the first, as in metrics.of_classes
            among_five = (logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]).any(dim=1)
            self.correct += torch.stack((first.sum(), (first | among_five).sum()))
        self.sizes.append(len(targets))

    def end_batch(self, index):
        """Batch `index`, from 0, is over: it has no images if `update` was not called. UserError if it was twice."""
        if len(self.sizes) > index + 1:
            raise UserError(TWICE)
        self.sizes += [0] * (index + 1 - len(self.sizes))

    def of_all_processes(self):
        """A Meter of the images of all processes, each batch as a whole."""
        if not distributed.active():
            return self
        sizes = torch.zeros_like(self.losses)
        sizes[:len(self.sizes)] = torch.tensor(self.sizes, dtype=sizes.dtype, device=sizes.device)
        whole = copy.copy(self)
        whole.losses, sizes = distributed.all_reduce(torch.stack((self.losses, sizes)))
        whole.sizes = sizes.tolist()[:max(distributed.all_gather(len(self.sizes)))]
        whole.correct = distributed.all_reduce(self.correct.clone())
        return whole

    def state(self):
        """What `load` in another Meter takes, plain tensors."""
        return {'losses': self.losses.cpu(), 'correct': self.correct.cpu(), 'sizes': self.sizes}

    def load(self, state, local=True):
        """Resume counting. If not `local`, the batches of `state` count as batches without images of this process."""
        if local:
            self.losses.copy_(state['losses'])
            self.correct.copy_(state['correct'])
        self.sizes = list(state['sizes']) if local else [0] * len(state['sizes'])

    def read(self):
        """Quantity -> value so far: 'Loss' (mean per image), 'Top-1' and perhaps 'Top-5' (percent)."""
        seen = max(sum(self.sizes), 1)
        correct = (100 * self.correct.double().cpu() / seen).tolist()
        return dict(zip(self.quantities, [self.losses.sum().item() / seen, *correct]))

    def read_all(self, part):
        """`read` over all processes. UserError if none of the images of `part`, 'train' or 'test', could be read."""
        whole = self.of_all_processes()
        if not sum(whole.sizes):
            raise UserError(f'none of the images to {part} on can be read, or the loop leaves out meter.update')
        return whole.read()

    def __str__(self):
        return ' | '.join(f'{name.lower()} {value:.4g}' for name, value in self.read().items())

    def first_bad_batch(self):
        """(index, loss) of the first batch whose loss is NaN or infinite; None if there is none."""
        bad = (~self.losses.isfinite()).nonzero()
        return (bad[0].item(), self.losses[bad[0]].item()) if len(bad) else None
