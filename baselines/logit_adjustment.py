"""Logit adjustment for imbalanced classes: logits are compared after their class's frequency is taken into account.

Menon, Jayasumana, Rawat, Jain, Veit and Kumar, "Long-tail learning via logit adjustment", ICLR 2021
(arXiv 2007.07314). class_counts are the numbers of training images of the K classes.

    prior_j  = class_counts_j / sum_k class_counts_k
    loss     = cross_entropy(logits + tau log prior, targets)        (equation 10): train with it, then predict with the
                                                                     logits as they are
    adjusted = logits - tau log prior                                (equation 9): or train with plain cross-entropy,
                                                                     then predict with these

Use one of the two; both together adjust twice.

In your own loop:

    loss = logit_adjusted_loss(model(images), targets, class_counts)
"""
import functools
import math

import torch
import torch.nn.functional as F


def logit_adjusted_loss(logits, targets, class_counts, tau=1.0):
    """The mean over the batch of the cross-entropy of logits + tau log prior; 0 for an empty batch.

    logits: (batch, K). targets: (batch,), or probabilities (batch, K). class_counts: K whole numbers of at least 1.
    tau: at least 0, which is plain cross-entropy. Computed in float32 at least.
    Raises ValueError for an option out of range, and for a class without images, whose log prior is infinite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _loss(logits, targets, _adjustment_for(logits, class_counts, tau))


def adjusted(logits, class_counts, tau=1.0):
    """logits - tau log prior, (..., K), float32 at least: predictions for a test set of equally frequent classes.

    For logits of a model that was trained with plain cross-entropy. Raises ValueError as logit_adjusted_loss does.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - _adjustment_for(logits, class_counts, tau)


def _loss(logits, targets, adjustment):
    return F.cross_entropy(logits + adjustment, targets, reduction='sum') / max(len(targets), 1)


def _adjustment_for(logits, class_counts, tau):
    values = adjustment(class_counts, tau)
    if logits.shape[-1:] != values.shape:
        raise ValueError(f'class_counts must have one number for each of {logits.shape[-1]} classes, '
                         f'was given {len(values)}')
    return values.to(logits.device, logits.dtype)


def adjustment(class_counts, tau=1.0):
    """tau log prior, (K,) float64; ValueError for tau out of range or a count that is not a whole number above 0."""
    if not 0 <= tau < math.inf:
        raise ValueError(f'tau must be a number of at least 0, was given {tau}')
    counts = torch.as_tensor(class_counts).to('cpu', torch.float64)
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f'class_counts must be a list of one number per class, was given shape {tuple(counts.shape)}')
    for j, count in enumerate(counts.tolist()):
        if not (1 <= count < math.inf and count == int(count)):
            raise ValueError(f'class_counts must be whole numbers of at least 1, was given {count:g} for class {j}')
    return tau * (counts / counts.sum()).log()


def add_arguments(parser):
    parser.add_argument('--tau', type=float, default=1.0, metavar='T', help='factor on the log of the prior (1)')


def strength(args):
    return args.tau


def cross_entropy_weight(args):
    return 0.0  # the loss is a cross-entropy itself


def loss_term(args, model, class_counts):
    """`args`, a model with num_classes, and its K class counts -> (outputs, targets, activations) -> scalar."""
    values = adjustment(class_counts, args.tau)
    if len(values) != model.num_classes:
        raise ValueError(f'class_counts must have {model.num_classes} numbers, one for each class, '
                         f'was given {len(values)}')
    if len(set(class_counts)) == 1 < class_counts[0]:  # before the data are read, each has 1
        print(f'--method logit_adjustment changes nothing here: every class has {class_counts[0]} training images')
    # The copies on the device are kept, because each copy from the CPU waits for the device.
    place = functools.cache(values.to)

    def term(outputs, targets, activations):
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _loss(logits, targets, place(logits.device, logits.dtype))

    return term


if __name__ == '__main__':
    torch.manual_seed(0)
    counts, logits, targets = [5000, 500, 50], torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    print('tau log prior    ', [round(value, 3) for value in adjustment(counts).tolist()])
    print(f'cross-entropy      {F.cross_entropy(logits, targets):.4f}')
    print(f'adjusted loss      {logit_adjusted_loss(logits, targets, counts):.4f}')
    print('predicted          ', logits.argmax(dim=1).tolist())
    print('predicted, adjusted', adjusted(logits, counts).argmax(dim=1).tolist())
