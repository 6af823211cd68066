"""LDAM-DRW for imbalanced classes: a larger margin for rarer classes, and class weights late in training.

Cao, Wei, Gaidon, Arechiga and Ma, "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
NeurIPS 2019 (arXiv 1906.07413). n_j, `class_counts`, is the number of training images of class j.

    margin_j = max_margin n_j^(-1/4) / max_k n_k^(-1/4)                       the rarest class has max_margin
    z_ij     = scale (cosine_ij - margin_j [j = y_i])                         y_i is the target of image i
    loss     = sum_i weight_(y_i) cross_entropy(z_i, y_i) / sum_i weight_(y_i)
    weight_j = 1 at first; later in proportion to (1 - beta) / (1 - beta^n_j), with sum K over the K classes

In your own loop:

    head = NormalizedLinear(512, 10, scale=30.0)       # instead of nn.Linear(512, 10)
    weight = deferred_weights(class_counts) if epoch >= 160 else None
    loss = ldam_loss(head(features) / head.scale, targets, class_counts, weight=weight)
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


def ldam_loss(logits, targets, class_counts, max_margin=0.5, scale=30.0, weight=None):
    """The weighted mean over the batch of the cross-entropy with margins; 0 for an empty batch.

    logits: (batch, K), the cosines of a normalised head, not scaled. targets: (batch,). class_counts: K whole numbers
    of at least 1. max_margin: at least 0. scale: above 0. weight: (K,), of at least 0, or None for 1.
    Computed in float32 at least. Raises ValueError for an option out of range or a wrong number of classes.
    """
    check_scale(scale)
    margins = class_margins(class_counts, max_margin)
    weight = torch.ones_like(margins) if weight is None else torch.as_tensor(weight)
    if not logits.shape[-1:] == margins.shape == weight.shape:
        raise ValueError(f'ldam_loss needs a count and a weight for each of {logits.shape[-1]} classes, '
                         f'was given {len(margins)} counts and weights of shape {tuple(weight.shape)}')
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return _loss(logits.to(dtype), targets, margins.to(logits.device, dtype), weight.to(logits.device, dtype), scale)


def _loss(cosines, targets, margins, weight, scale):
    scaled = scale * cosines.scatter_add(1, targets[:, None], -margins[targets][:, None])
    total = weight[targets].sum()
    return F.cross_entropy(scaled, targets, weight, reduction='sum') / total.masked_fill(total == 0, 1)


def class_margins(class_counts, max_margin=0.5):
    """margin_j of each class, (K,) float64, from 0 to max_margin; ValueError for an option out of range."""
    if not 0 <= max_margin < math.inf:
        raise ValueError(f'max_margin must be a number of at least 0, was given {max_margin}')
    counts = whole_counts(class_counts)
    return max_margin * (counts.min() / counts) ** 0.25


def deferred_weights(class_counts, beta=0.9999):
    """weight_j of each class, (K,) float64, with sum K. beta: from 0, where every weight is 1, to below 1.

    Raises ValueError for beta out of range and for a class whose count is not a whole number of at least 1.
    """
    if not 0 <= beta < 1:
        raise ValueError(f'beta must be at least 0 and below 1, was given {beta}')
    counts = whole_counts(class_counts)
    weights = 1 / (1 - beta ** counts)  # the factor 1 - beta, the same for every class, cancels
    return weights * (len(weights) / weights.sum())


def whole_counts(class_counts):
    """class_counts as (K,) float64 on the CPU; ValueError unless each is a whole number of at least 1."""
    counts = torch.as_tensor(class_counts).to('cpu', torch.float64)
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f'class_counts must be a list of one number per class, was given shape {tuple(counts.shape)}')
    for j, count in enumerate(counts.tolist()):
        if not (1 <= count < math.inf and count == int(count)):
            raise ValueError(f'class_counts must be whole numbers of at least 1, was given {count:g} for class {j}')
    return counts


def check_scale(scale):
    if not 0 < scale < math.inf:
        raise ValueError(f'scale must be a number above 0, was given {scale}')


class NormalizedLinear(nn.Linear):
    """A linear layer without bias that returns scale * cosine, (batch, out_features), in training and in evaluation.

    features: (batch, in_features). scale: above 0, ValueError otherwise. float32 at least, also under autocast.
    A zero vector has cosine 0 to every other vector, and gradient 0. `targets` are not used.
    """

    def __init__(self, in_features, out_features, scale=30.0):
        check_scale(scale)
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, features, targets=None):
        dtype = torch.promote_types(torch.promote_types(features.dtype, self.weight.dtype), torch.float32)
        with without_autocast(features):
            return self.scale * F.linear(unit_rows(features.to(dtype)), unit_rows(self.weight.to(dtype)))


def unit_rows(vectors):
    """Each row of (..., columns) divided by its length; a row too short to divide by becomes 0, with gradient 0."""
    # Scaled by the largest entry first, so that squares neither overflow nor vanish; the direction does not change.
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    short = largest < torch.finfo(vectors.dtype).tiny
    vectors = vectors / largest.masked_fill(short, torch.inf)
    # A row of 0 counts as a row of 1 here, because the second derivative of a length is NaN at 0.
    return vectors / torch.linalg.vector_norm(vectors + short, dim=-1, keepdim=True)


def without_autocast(tensor):
    """A context without autocast on the device of `tensor`; some, such as meta, have none to switch off."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def add_arguments(parser):
    flag = parser.add_argument
    flag('--max-margin', type=float, default=0.5, metavar='M', help='margin of the rarest class, on its cosine (0.5)')
    flag('--scale', type=float, default=30.0, metavar='S', help='factor on the cosines (30)')
    flag('--deferred', type=float, default=0.8, metavar='F',
         help='share of the training after which the class weights apply; 1: never (0.8)')
    flag('--reweight-beta', type=float, default=0.9999, metavar='B', help='0: equal weights, below 1 (0.9999)')


CLASS_TARGETS = True  # the margin is for one class of each image


def head(args):
    """`args` -> (in_features, num_classes) -> module."""
    return functools.partial(NormalizedLinear, scale=args.scale)


def cross_entropy_weight(args):
    return 0.0  # the loss is a cross-entropy itself


def begins(args):
    """The share of the training after which the class weights apply."""
    return {'--deferred': args.deferred} if 0 < args.deferred < 1 else {}


def loss_term(args, model, class_counts):
    """`args`, a model with num_classes, and its K class counts -> (outputs, targets, activations) -> scalar."""
    if args.deferred == 1 and 'reweight_beta' in getattr(args, 'given', ()):
        raise ValueError('--reweight-beta does nothing with --deferred 1, where no class weights apply')
    if args.reweight_beta == 0 and 'deferred' in getattr(args, 'given', ()) and args.deferred < 1:
        raise ValueError('--deferred does nothing with --reweight-beta 0, with which all class weights are 1')
    if len(set(class_counts)) == 1 < class_counts[0]:  # before the data are read, each has 1
        print(f'--method ldam has one margin and no weights here: every class has {class_counts[0]} training images')
    return LDAMTerm(class_counts, model.num_classes, args.max_margin, args.scale, args.deferred, args.reweight_beta)


class LDAMTerm:
    """ldam_loss of a NormalizedLinear's outputs; before_step(behind, strength) says when the class weights apply."""

    def __init__(self, class_counts, num_classes, max_margin, scale, deferred, beta):
        if not 0 <= deferred <= 1:
            raise ValueError(f'--deferred must be between 0 and 1, was given {deferred}')
        check_scale(scale)
        margins, weights = class_margins(class_counts, max_margin), deferred_weights(class_counts, beta)
        if len(margins) != num_classes:
            raise ValueError(f'class_counts must have {num_classes} numbers, one for each class, '
                             f'was given {len(margins)}')
        tensors = margins, torch.ones_like(weights), weights
        # Cached, because each copy from the CPU waits for the device.
        self._tensors_on = functools.cache(lambda device, dtype: [tensor.to(device, dtype) for tensor in tensors])
        self.scale, self.deferred = scale, deferred
        self.before_step(0.0, 1.0)

    def before_step(self, behind, strength):
        """behind: the share of the training, from 0 to 1, that is behind. `strength` is not used."""
        self.reweighted = self.deferred <= behind and self.deferred < 1

    def __call__(self, outputs, targets, activations):
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        cosines = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.scale
        margins, *weights = self._tensors_on(cosines.device, cosines.dtype)
        return _loss(cosines, targets, margins, weights[self.reweighted], self.scale)


if __name__ == '__main__':
    torch.manual_seed(0)
    counts, targets = [5000, 500, 50], torch.tensor([0, 1, 2, 0, 1])
    cosines = NormalizedLinear(4, 3, scale=1.0)(torch.randn(5, 4))
    print('margins      ', [round(margin, 3) for margin in class_margins(counts).tolist()])
    print('class weights', [round(weight, 3) for weight in deferred_weights(counts).tolist()])
    print(f'loss           {ldam_loss(cosines, targets, counts):.4f}')
    print(f'reweighted     {ldam_loss(cosines, targets, counts, weight=deferred_weights(counts)):.4f}')
