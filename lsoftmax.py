"""Large-Margin Softmax: the target's logit must win by an angular margin.

Liu, Wen, Yu and Yang, "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016 (arXiv 1612.02295).

    logit_j = |w_j| |x| cos(theta_j) = w_j . x                                       for every class, in evaluation
    logit_y = |w_y| |x| (psi(theta_y) + beta cos(theta_y)) / (1 + beta)              for the target y, in training
    psi(theta) = (-1)^k cos(m theta) - 2 k   for theta in [k pi/m, (k+1) pi/m], k = 0 .. m-1      (equation 6)

m is `margin`; m = 1 is plain softmax. beta (lambda in section 5.1) begins large, which is plain softmax as well, and falls
once per optimizer step. Use in a loop of your own:

    head = LSoftmaxLinear(512, 10, margin=4)           # in place of nn.Linear(512, 10)
    logits = head(features, targets)                   # in evaluation head(features)
    loss = F.cross_entropy(logits, targets)            # to count accuracy: head.without_margin(logits), before another pass
    ...
    optimizer.step()
    head.after_step()                                  # beta falls; without this line it stays where it is
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


class LSoftmaxLinear(nn.Linear):
    """A linear layer without bias, weight (out_features, in_features), whose target logits have a margin in training.

    margin: whole number m of at least 1. beta: its first value; `after_step()` multiplies it by `beta_decay`, and
    what is used is never below `beta_min`. beta is a 0-d buffer, saved with the weight.

    forward(x, targets=None), with x (batch, in_features) and targets (batch,), returns logits (batch, out_features),
    float32 at least, also under autocast. In evaluation they are x W^T, whether there are targets or not; training
    without targets raises ValueError, as does an option out of range. A zero vector has cosine 0 and finite gradients.
    """

    def __init__(self, in_features, out_features, margin=4, beta=100.0, beta_decay=0.99, beta_min=0.0):
        if not isinstance(margin, int) or margin < 1:
            raise ValueError(f'margin must be a whole number of at least 1, was given {margin}')
        if not (0 <= beta < math.inf and 0 <= beta_min < math.inf):
            raise ValueError(f'beta and its floor must be numbers of at least 0, were given {beta} and {beta_min}')
        if not 0 <= beta_decay <= 1:
            raise ValueError(f'the decay of beta must be between 0 and 1, was given {beta_decay}')
        super().__init__(in_features, out_features, bias=False)
        self.margin, self.beta_decay, self.beta_min = margin, beta_decay, beta_min
        self.register_buffer('beta', torch.tensor(float(beta)))
        self._last = None

    def forward(self, x, targets=None):
        self._last = None
        if self.training and targets is None:
            raise ValueError('LSoftmaxLinear needs the targets in training: head(features, targets); '
                             'for plain logits use head.eval()')
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round every angle under 3.6 degrees to 0
            if not self.training:
                return F.linear(x, weight)
            logits, plain, length = _LinearWithTarget.apply(x, weight, targets)
            margined = self._with_margin(plain, length * torch.linalg.vector_norm(x, dim=1))
            # In place: with very many classes a second (batch, classes) tensor would be what fills the memory.
            logits.scatter_(1, targets[:, None], margined[:, None])
            self._last = targets, plain.detach()
            return logits

    def _with_margin(self, dot, lengths):
        """The target's logit from w.x and |w||x|, both (batch,)."""
        apart = lengths > torch.finfo(lengths.dtype).tiny
        cosine = dot / torch.where(apart, lengths, torch.inf)
        k = (torch.arccos(cosine.detach().clamp(-1, 1)) * (self.margin / math.pi)).floor().clamp(max=self.margin - 1)
        psi = (1 - 2 * (k % 2)) * chebyshev(cosine, self.margin) - 2 * k
        beta = self.beta.clamp(min=self.beta_min)
        return (lengths * psi + beta * dot) / (1 + beta)

    def without_margin(self, logits):
        """x W^T, detached, from the logits that the last training forward returned; in evaluation the logits as they are.

        What says whether a sample is right: its target may have the largest cosine and still lack the margin. In a
        closure that an optimizer runs several times, call it there, right after the forward pass.
        """
        if self._last is None:
            return logits.detach()
        targets, plain = self._last
        return logits.detach().scatter(1, targets[:, None], plain[:, None])

    def after_step(self):
        """Call once after each optimizer step."""
        self.beta.mul_(self.beta_decay)

    def extra_repr(self):
        return f'{super().extra_repr()}, margin={self.margin}, beta_decay={self.beta_decay}, beta_min={self.beta_min}'


def chebyshev(cosine, m):
    """cos(m theta) as a polynomial of cos(theta) (equation 7), which unlike cos(m arccos) has a finite slope at 0 and pi."""
    before, value = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, value = value, 2 * cosine * value - before
    return value


class _LinearWithTarget(torch.autograd.Function):
    """x W^T (batch, classes), and for the target alone w.x and |w|, each (batch,).

    Apart, each of the three would have a gradient as large as the weight; here all are added into one.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.save_for_backward(x, weight, targets)
        logits = F.linear(x, weight)
        return logits, logits.gather(1, targets[:, None]).squeeze(1), torch.linalg.vector_norm(weight[targets], dim=1)

    @staticmethod
    def backward(ctx, grad_logits, grad_dot, grad_length):
        x, weight, targets = ctx.saved_tensors
        grad_dot, grad_length = grad_dot[:, None], grad_length[:, None]
        with torch.autocast(x.device.type, enabled=False):
            rows = weight[targets]
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_x = grad_logits @ weight + grad_dot * rows
            if ctx.needs_input_grad[1]:
                length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
                directions = rows / length.masked_fill(length == 0, torch.inf)
                grad_weight = (grad_logits.t() @ x).index_add_(0, targets, grad_dot * x + grad_length * directions)
        return grad_x, grad_weight, None


class LargeMarginSoftmaxLoss(nn.Module):
    """Cross-entropy of LSoftmaxLinear: (features (batch, in_features), targets (batch,)) -> scalar.

    For a network that ends in features, as loss functions with a classifier of their own are used: give its
    parameters to the optimizer too, and call `after_step()` after each step. `head` is the classifier; the further
    arguments are its own.
    """

    def __init__(self, in_features, num_classes, margin=4, **options):
        super().__init__()
        self.head = LSoftmaxLinear(in_features, num_classes, margin, **options)

    def forward(self, features, targets):
        return F.cross_entropy(self.head(features, targets), targets)

    def after_step(self):
        self.head.after_step()


def add_arguments(parser):
    parser.add_argument('--margin', type=int, default=4, metavar='M', help='the angle is multiplied by this (4)')
    parser.add_argument('--beta', type=float, default=100.0, metavar='B', help='weight of the plain logit at first (100)')
    parser.add_argument('--beta-decay', type=float, default=0.99, metavar='F', help='factor on beta at every step (0.99)')
    parser.add_argument('--beta-min', type=float, default=0.0, metavar='B', help='beta does not count as less (0)')


FIRST_VALUES = {'beta'}  # a checkpoint has the beta that was reached
CLASS_TARGETS = True  # one class for each image has the margin


def head(args):
    """`args` -> (in_features, num_classes) -> module."""
    unused = {'beta', 'beta_decay', 'beta_min'} & args.given
    if args.margin == 1 and unused:
        raise ValueError(f'--{sorted(unused)[0].replace("_", "-")} does nothing with --margin 1, which is plain softmax')
    if 'beta' in args.given and 0 <= args.beta < args.beta_min:
        raise ValueError(f'--beta {args.beta:g} does nothing below --beta-min {args.beta_min:g}')
    return functools.partial(LSoftmaxLinear, margin=args.margin, beta=args.beta, beta_decay=args.beta_decay,
                             beta_min=args.beta_min)


if __name__ == '__main__':
    torch.manual_seed(0)
    layer = LSoftmaxLinear(in_features=4, out_features=3, margin=4)
    x, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    cosine = F.cosine_similarity(x, layer.weight[targets])
    print('angle to the target (deg)', [round(angle, 1) for angle in torch.rad2deg(torch.arccos(cosine)).tolist()])
    for beta in (100.0, 1.0, 0.0):
        layer.beta.fill_(beta)
        logits = layer(x, targets)
        target_logits = [round(logit, 2) for logit in logits.gather(1, targets[:, None]).flatten().tolist()]
        print(f'beta {beta:5.1f}: loss {F.cross_entropy(logits, targets):.4f}, target logits {target_logits}')
    print(f'plain logits: loss {F.cross_entropy(layer.without_margin(logits), targets):.4f}')
