"""Large-Margin Softmax: the target's logit must win by an angular margin.

Liu, Wen, Yu and Yang, "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016 (arXiv 1612.02295).

    logit_j = |w_j| |x| cos(theta_j) = w_j . x                                       for every class j
    logit_y = |w_y| |x| (psi(theta_y) + beta cos(theta_y)) / (1 + beta)              for the target y, in training
    psi(theta) = (-1)^k cos(m theta) - 2 k   for theta in [k pi/m, (k+1) pi/m], k = 0 .. m-1      (equation 6)

m is `margin`; m = 1 is plain softmax. beta (lambda in section 5.1) is large at first, which is plain softmax too, and
falls during training:

    beta = first (1 + gamma u)^-power    with u the share of the training that is behind      beta_schedule='position'
    beta = first decay^n                 after n optimizer steps                              beta_schedule='decay'

The first is the authors' Caffe configuration, where gamma is 0.75 and power 35 on MNIST with margin 4, and 0.6 and 45
on CIFAR-10 with margin 2: plain softmax until the learning rate first drops, and nearly all margin at the end.

In your own loop:

    head = LSoftmaxLinear(512, 10, margin=4)           # instead of nn.Linear(512, 10)
    logits = head(features, targets)                   # in evaluation: head(features)
    plain_logits = head.without_margin(logits)         # for the training accuracy; call it before the next forward pass
    loss = F.cross_entropy(logits, targets)
    ...
    optimizer.step()
    head.after_step()                                  # beta falls; without this line it stays as it is

With beta_schedule='position', head.before_step(step / steps) before each forward pass replaces after_step().
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

FIRST_BETA = {'position': 1000.0, 'decay': 100.0}  # where it is not given, by the schedule


class LSoftmaxLinear(nn.Linear):
    """A linear layer without bias, weight (out_features, in_features), whose target logits have a margin in training.

    margin: the whole number m, at least 1. beta: its first value, by default 100 of 'decay' and 1000 of 'position';
    `forward` uses beta or `beta_min`, whichever is larger. beta_schedule: 'decay', where `after_step()` multiplies beta
    by `beta_decay`, or 'position', where `before_step` sets it, see `beta_at`, by `beta_gamma` and `beta_power`. beta
    is a 0-d buffer, saved together with the weight.

    forward(x, targets=None), with x (batch, in_features) and targets (batch,), returns logits (batch, out_features),
    float32 at least, also under autocast. In evaluation they are x W^T, with or without targets.
    Raises ValueError for training without targets and for an option out of range. A zero vector has cosine 0 and
    finite gradients. The logits have derivatives of every order, by torch.autograd and by torch.func.
    """
    begins_anew = ('beta',)  # in another training that begins with these weights

    def __init__(self, in_features, out_features, margin=4, beta=None, beta_decay=0.99, beta_min=0.0,
                 beta_schedule='decay', beta_gamma=0.75, beta_power=35.0):
        if not isinstance(margin, int) or margin < 1:
            raise ValueError(f'margin must be a whole number of at least 1, was given {margin}')
        if beta_schedule not in FIRST_BETA:
            raise ValueError(f"beta_schedule must be 'decay' or 'position', was given {beta_schedule!r}")
        beta = FIRST_BETA[beta_schedule] if beta is None else beta
        if not (0 <= beta < math.inf and 0 <= beta_min < math.inf):
            raise ValueError(f'beta and its floor must be numbers of at least 0, were given {beta} and {beta_min}')
        if not 0 <= beta_decay <= 1:
            raise ValueError(f'the decay of beta must be between 0 and 1, was given {beta_decay}')
        beta_at(0, beta, beta_gamma, beta_power)  # raises ValueError if an option is out of range
        super().__init__(in_features, out_features, bias=False)
        self.margin, self.beta_decay, self.beta_min = margin, beta_decay, beta_min
        self.beta_at = functools.partial(beta_at, first=beta, gamma=beta_gamma, power=beta_power)
        self.beta_schedule, self.strength_is = beta_schedule, 'all'  # of its strength: 'none', 'part' or 'all'
        self.register_buffer('beta', torch.tensor(float(beta)))
        self.register_buffer('strength', torch.tensor(1.0), persistent=False)
        self._last = None

    def forward(self, x, targets=None):
        self._last = None
        if self.training and targets is None:
            raise ValueError('LSoftmaxLinear needs the targets in training: head(features, targets); '
                             'for plain logits use head.eval()')
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        with without_autocast(x):  # bfloat16 would round every angle below 3.6 degrees to 0
            if not self.training or self.strength_is == 'none':
                return F.linear(x, weight)
            logits, plain, length = linear_with_target(x, weight, targets)
            margined = self._with_margin(plain, length * lengths_of(x))
            logits = logits.scatter(1, targets[:, None], margined[:, None])
            self._last = targets, plain.detach()
            return logits

    def _with_margin(self, dot, lengths):
        """The target's logit (batch,), from w.x and |w||x|, both (batch,)."""
        not_zero = lengths > torch.finfo(lengths.dtype).tiny
        cosine = dot / torch.where(not_zero, lengths, torch.inf)
        k = (torch.arccos(cosine.detach().clamp(-1, 1)) * (self.margin / math.pi)).floor().clamp(max=self.margin - 1)
        psi = (1 - 2 * (k % 2)) * chebyshev(cosine, self.margin) - 2 * k
        beta = self.beta.clamp(min=self.beta_min)
        with_margin = (lengths * psi + beta * dot) / (1 + beta)
        return with_margin if self.strength_is == 'all' else dot + self.strength * (with_margin - dot)

    def without_margin(self, logits):
        """x W^T, detached, from the logits of the last training forward; in evaluation the logits as they are.

        Compute the training accuracy from these: a correct sample may lack only the margin. If an optimizer runs a
        closure several times, call this in the closure, right after the forward pass.
        """
        if self._last is None:
            return logits.detach()
        targets, plain = self._last
        return logits.detach().scatter(1, targets[:, None], plain[:, None])

    def before_step(self, behind, strength=1.0):
        """Sets beta by position, if that is its schedule, and the share of the margin that is used.

        behind: the share of the training that is behind, from 0 to 1. strength: from 0, which is plain softmax and
        costs what that costs, to 1; the target's logit is linear in it.
        """
        if self.beta_schedule == 'position':
            self.beta.fill_(self.beta_at(behind))
        self.strength_is = 'all' if strength == 1 else 'part' if strength > 0 else 'none'
        self.strength.fill_(strength)

    def after_step(self):
        """Multiplies beta by its decay, if that is its schedule; call it once after each optimizer step."""
        if self.beta_schedule == 'decay':
            self.beta.mul_(self.beta_decay)

    def __getstate__(self):
        state = self.__dict__.copy()
        if self._last and any(map(torch._C._functorch.is_functorch_wrapped_tensor, self._last)):
            state['_last'] = None  # tensors of torch.func can be neither copied nor saved
        return state

    def extra_repr(self):
        falls = f'beta_decay={self.beta_decay}, ' if self.beta_schedule == 'decay' else ''
        return f'{super().extra_repr()}, margin={self.margin}, {falls}beta_min={self.beta_min}'


def beta_at(behind, first=1000.0, gamma=0.75, power=35.0):
    """first (1 + gamma behind)^-power, where `behind` is the share of the training that is behind, from 0 to 1.

    Raises ValueError for a number below 0.
    """
    for name, value in (('behind', behind), ('beta', first), ('gamma', gamma), ('power', power)):
        if not 0 <= value < math.inf:
            raise ValueError(f'{name} must be a number of at least 0, was given {value}')
    return first * (1 + gamma * behind) ** -power


def chebyshev(cosine, m):
    """cos(m theta) as a polynomial of cos(theta) (equation 7), whose slope is finite also where theta is 0 or pi."""
    previous, value = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        previous, value = value, 2 * cosine * value - previous
    return value


def lengths_of(rows):
    """|row| of (batch, features), with derivatives 0 at 0, where the second one of vector_norm is NaN."""
    zero = (rows == 0).all(dim=1, keepdim=True)
    return torch.linalg.vector_norm(rows.masked_fill(zero, 1), dim=1).masked_fill(zero.squeeze(1), 0)


def linear_with_target(x, weight, targets):
    """x W^T (batch, classes), and for the target alone w.x and |w|, each (batch,).

    As separate operations each of the three would have a gradient of the size of the weight; here they share one.
    """
    # torch.compile refuses a function that has a jvp.
    function = _LinearWithTarget if torch.compiler.is_compiling() else _LinearWithTargetAndJvp
    return function.apply(x, weight, targets)


class _LinearWithTarget(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, targets):
        logits = F.linear(x, weight)
        return logits, logits.gather(1, targets[:, None]).squeeze(1), torch.linalg.vector_norm(weight[targets], dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_logits, grad_dot, grad_length):
        x, weight, targets = ctx.saved_tensors
        grad_dot, grad_length = grad_dot[:, None], grad_length[:, None]
        with without_autocast(x):
            rows = weight[targets]
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_x = grad_logits @ weight + grad_dot * rows
            if ctx.needs_input_grad[1]:
                grad_rows = grad_dot * x + grad_length * directions(rows)
                grad_weight = grad_logits.t() @ x
                # In place, as a second tensor of this size would be the peak of memory, but not for torch.func.
                add = grad_weight.index_add if torch.is_grad_enabled() else grad_weight.index_add_
                grad_weight = add(0, targets, grad_rows)
        return grad_x, grad_weight, None


class _LinearWithTargetAndJvp(_LinearWithTarget):
    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, _):
        # PyTorch switches forward mode off here, and a derivative of this derivative would silently be 0.
        with forward_ad._set_fwd_grad_enabled(True), without_autocast(ctx.saved_tensors[0]):
            x, weight, targets = (forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors)
            x_tangent = torch.zeros_like(x) if x_tangent is None else x_tangent
            weight_tangent = torch.zeros_like(weight) if weight_tangent is None else weight_tangent
            logits = F.linear(x_tangent, weight) + F.linear(x, weight_tangent)
            length = (directions(weight[targets]) * weight_tangent[targets]).sum(dim=1)
            return logits, logits.gather(1, targets[:, None]).squeeze(1), length


def directions(rows):
    """Each row of (batch, features) divided by its length; 0 for 0."""
    lengths = lengths_of(rows)[:, None]
    return rows / lengths.masked_fill(lengths == 0, torch.inf)


def without_autocast(tensor):
    """A context without autocast on the device of `tensor`; some, such as meta, have none to switch off."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


class LargeMarginSoftmaxLoss(nn.Module):
    """Cross-entropy of LSoftmaxLinear: (features (batch, in_features), targets (batch,)) -> scalar.

    For a network that ends in features. Its classifier, `head`, is LSoftmaxLinear(in_features, num_classes, margin,
    **beta_settings): give its parameters to the optimizer too, and call `after_step()` after each step.
    """

    def __init__(self, in_features, num_classes, margin=4, **beta_settings):
        super().__init__()
        self.head = LSoftmaxLinear(in_features, num_classes, margin, **beta_settings)

    def forward(self, features, targets):
        return F.cross_entropy(self.head(features, targets), targets)

    def after_step(self):
        self.head.after_step()


def add_arguments(parser):
    flag = parser.add_argument
    flag('--margin', type=int, default=4, metavar='M', help='factor on the angle to the target (4)')
    flag('--beta-schedule', choices=tuple(BETA_FLAGS), default='position',
         help="position: beta is B (1 + G u)^-P, with u the share of the training that is behind; decay: it is "
              'multiplied by F at every step (position)')
    flag('--beta', type=float, metavar='B', help='weight of the plain logit at first (1000, of decay 100)')
    flag('--beta-gamma', type=float, metavar='G', help='position: (0.75, with --margin 2 0.6)')
    flag('--beta-power', type=float, metavar='P', help='position: (35, with --margin 2 45)')
    flag('--beta-decay', type=float, default=0.99, metavar='F', help='decay: (0.99)')
    flag('--beta-min', type=float, default=0.0, metavar='B', help='smallest beta that is used (0)')


BETA_FLAGS = {'position': {'beta_gamma', 'beta_power'}, 'decay': {'beta_decay'}}  # which each schedule has
CLASS_TARGETS = True  # the margin is for one class of each image


def strength(args):
    """0 where --method-start and --method-ramp have nothing to scale."""
    return args.margin - 1


def by_position(args):
    """Whether beta depends on the share of the training that is behind."""
    return args.beta_schedule == 'position' and args.margin > 1


def first_values(args):
    """Flags that a resumed run takes from the checkpoint."""
    return {'beta'} if args.beta_schedule == 'decay' else set()


def head(args):
    """`args` -> (in_features, num_classes) -> module."""
    if args.margin > 1000:  # a pass computes as many terms, and the paper has at most 4
        raise ValueError(f'--margin must be at most 1000, was given {args.margin}')
    falls = set().union(*BETA_FLAGS.values()) & args.given
    unused = falls | {'beta', 'beta_min', 'beta_schedule'} & args.given
    if args.margin == 1 and unused:
        raise ValueError(f'{_spelled(unused)} does nothing with --margin 1, which is plain softmax')
    for schedule, flags in BETA_FLAGS.items():
        if flags & args.given and schedule != args.beta_schedule:
            raise ValueError(f'{_spelled(flags & args.given)} belongs to --beta-schedule {schedule}, not '
                             f'{args.beta_schedule}')
    if 'beta' in args.given and args.beta == 0 and falls:
        raise ValueError(f'{_spelled(falls)} does nothing with --beta 0, which stays 0')
    first = FIRST_BETA[args.beta_schedule] if args.beta is None else args.beta
    if 0 <= first < args.beta_min and (unused := falls | {'beta'} & args.given):
        raise ValueError(f'{_spelled(unused)} does nothing, as beta begins at {first:g}, below --beta-min '
                         f'{args.beta_min:g}')
    gamma, power = (0.6, 45.0) if args.margin == 2 else (0.75, 35.0)  # the authors' configurations
    return functools.partial(LSoftmaxLinear, margin=args.margin, beta=args.beta, beta_decay=args.beta_decay,
                             beta_min=args.beta_min, beta_schedule=args.beta_schedule,
                             beta_gamma=gamma if args.beta_gamma is None else args.beta_gamma,
                             beta_power=power if args.beta_power is None else args.beta_power)


def _spelled(names):
    return f'--{min(names).replace("_", "-")}'


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
