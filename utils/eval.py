"""Loss and accuracy, counted on the device: nothing here waits for it until a number is read."""
import torch
import torch.nn.functional as F


def logits_of(outputs):
    """The logits in what a model returns: the outputs themselves, or the first of a tuple (a method's head adds more)."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def shown_logits(model):
    """What training accuracy is counted on: outputs -> logits, detached, without the margin if the head trains with one."""
    head = next((module for module in model.modules() if hasattr(module, 'without_margin')), None)
    plain = head.without_margin if head else torch.Tensor.detach
    return lambda outputs: plain(logits_of(outputs))


def cross_entropy(outputs, targets):
    """Mean cross-entropy over the batch, natural logarithm, in float32 at least, whatever the precision of the network."""
    logits = logits_of(outputs)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def quantities(num_classes):
    """The names of what a Meter reads."""
    return ['Loss', 'Top-1'] + ['Top-5'] * (num_classes > 5)


class Meter:
    """Mean loss and top-1 accuracy over the batches of one pass; top-5 too where there are more than five classes.

    `update` only adds up on the device; `read` and `first_bad_batch` wait for it.
    """

    def __init__(self, batches, num_classes, device):
        self.losses = torch.zeros(batches, dtype=torch.float64, device=device)
        self.correct = torch.zeros(2, dtype=torch.int64, device=device)  # among the first 1, among the first 5
        self.sizes = []
        self.quantities = quantities(num_classes)

    def update(self, outputs, targets, loss):
        """outputs: what the model returned. targets: (batch,). loss: the batch's mean, a scalar tensor."""
        logits = logits_of(outputs).detach()
        self.losses[len(self.sizes)] = loss.detach()
        self.sizes.append(len(targets))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        self.correct += torch.stack((hits[:, 0].sum(), hits.sum()))

    def read(self):
        """Quantity -> value so far: 'Loss' (mean per image), 'Top-1' and perhaps 'Top-5' (percent)."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        mean_loss = (self.losses[:len(sizes)].cpu() * sizes).sum() / sizes.sum()
        values = [mean_loss.item(), *(100 * self.correct.double().cpu() / sizes.sum()).tolist()]
        return dict(zip(self.quantities, values))

    def __str__(self):
        return ' | '.join(f'{name.lower()} {value:.4g}' for name, value in self.read().items())

    def first_bad_batch(self):
        """(index, loss) of the first batch whose loss is NaN or infinite; None if there is none."""
        bad = (~self.losses.isfinite()).nonzero()
        return (bad[0].item(), self.losses[bad[0]].item()) if len(bad) else None
