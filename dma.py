"""DMA regularisation: pull each feature towards the class weight that is already nearest to it in angle.

"DMA Regularization: Enhancing Discriminability of Neural Networks by Decreasing the Minimal Angle".

    cosine_ij = x_i . w_j / (|x_i| |w_j|)              w is held constant: the term moves features, not weights
    theta_i   = arccos(max_j cosine_ij)                the smallest angle to any class, true or not
    dma_loss  = mean_i 1/2 theta_i^2
    loss      = cross_entropy(x W^T + b, targets) + coef * dma_loss

In your own loop:

    head = DMA_Linear(512, 10)                         # instead of nn.Linear(512, 10)
    logits, cosine = head(features)
    loss = F.cross_entropy(logits, targets) + 0.5 * dma_loss(cosine)
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad


class DMA_Linear(nn.Linear):
    """A linear layer that also returns the cosine of the angle between its input and each of its weight rows.

    forward(x, targets=None), in training and in evaluation, with x (batch, in_features), returns
        logits  (batch, out_features)  x W^T + b, in the dtype of nn.Linear
        cosine  (batch, out_features)  in [-1, 1] up to rounding, float32 at least, also under autocast
    The bias is not part of the angle, `targets` are not used, and no gradient reaches the weight through cosine.
    A zero vector has cosine 0 to every other vector, and gradient 0.
    """

    def forward(self, x, targets=None):
        logits = super().forward(x)
        with without_autocast(x):  # bfloat16 would round every angle below 3.6 degrees to 0
            cosine = F.linear(unit_rows(x), unit_rows(self.weight.detach()))
        return logits, cosine


def dma_loss(cosine):
    """mean over the batch of 1/2 theta^2, in squared radians, where theta = arccos(max over classes of cosine).

    cosine: (batch, classes), of any floating dtype. Returns a scalar in [0, pi^2 / 2]; 0 for an empty batch.
    It has derivatives of every order, by torch.autograd and by torch.func.
    Raises ValueError if cosine has another shape.
    """
    if cosine.dim() != 2 or cosine.shape[1] == 0:
        raise ValueError(f'dma_loss takes cosines (batch, classes) with at least one class, '
                         f'was given {tuple(cosine.shape)}')
    nearest = cosine.to(at_least_float32(cosine)).max(dim=1).values
    return half_squared_angle(nearest).sum() / max(len(nearest), 1)


def half_squared_angle(cosine, order=0):
    """f(c) = 1/2 arccos(c)^2, or its derivative of this `order`, which can itself be differentiated, in every mode.

    f'(c) = -theta / sin(theta), whose limit at c = 1 is -1, where the chain rule through arccos gives 0 * inf. At
    c = -1 the slope is infinite, so sin(theta) is kept at or above the square root of the rounding error of c, which
    makes the slope finite.
    """
    # torch.compile refuses a function that has a jvp.
    function = _HalfSquaredAngle if torch.compiler.is_compiling() else _HalfSquaredAngleWithJvp
    return function.apply(cosine, order)


class _HalfSquaredAngle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(cosine, order):
        cosine = cosine.clamp(-1, 1)
        theta = torch.arccos(cosine)
        if order == 0:
            return 0.5 * theta ** 2
        sine = torch.sqrt((1 - cosine) * (1 + cosine)).clamp(min=torch.finfo(cosine.dtype).eps ** 0.5)
        slope = -torch.where(cosine > 0, 1 / torch.sinc(theta / torch.pi), theta / sine)
        return slope if order == 1 else torch.where(cosine > 0.5, _near_one(cosine, order),
                                                    _from_slope(cosine, slope, sine ** 2, order))

    @staticmethod
    def setup_context(ctx, inputs, output):
        cosine, ctx.order = inputs
        ctx.save_for_backward(cosine)
        ctx.save_for_forward(cosine)

    @staticmethod
    def backward(ctx, grad):
        cosine, = ctx.saved_tensors
        return grad * half_squared_angle(cosine, ctx.order + 1), None


class _HalfSquaredAngleWithJvp(_HalfSquaredAngle):
    @staticmethod
    def jvp(ctx, tangent, _):
        cosine, = ctx.saved_tensors
        # PyTorch switches forward mode off here, and a derivative of this derivative would silently be 0.
        with forward_ad._set_fwd_grad_enabled(True):
            return tangent * half_squared_angle(forward_ad.unpack_dual(cosine).primal, ctx.order + 1)


def _from_slope(cosine, slope, squared_sine, order):
    """The derivative of f of `order` 2 or more: (1 - c^2) f'' = 1 + c f', differentiated order - 2 times."""
    before, value = slope, (1 + cosine * slope) / squared_sine
    for n in range(1, order - 1):
        before, value = value, ((2 * n + 1) * cosine * value + n ** 2 * before) / squared_sine
    return value


def _near_one(cosine, order, terms=50):
    """The same from f(c) = sum over k of (2 - 2 c)^k / (k^2 (2k choose k)), as the other is 0 / 0 at c = 1."""
    powers = range(order, order + terms)
    factors = [(-1) ** order * 2 ** k * math.perm(k, order) / (k ** 2 * math.comb(2 * k, k)) for k in powers]
    exponents = torch.arange(terms, dtype=cosine.dtype, device=cosine.device)
    return ((1 - cosine)[..., None] ** exponents) @ torch.tensor(factors, dtype=cosine.dtype, device=cosine.device)


def unit_rows(vectors):
    """Each row of (..., columns) divided by its length; a row too short to divide by becomes 0, with gradient 0."""
    vectors = vectors.to(at_least_float32(vectors))
    # Scaled by the largest entry first, so that squares neither overflow nor vanish; the direction does not change.
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    short = largest < torch.finfo(vectors.dtype).tiny
    vectors = vectors / largest.masked_fill(short, torch.inf)
    # A row of 0 counts as a row of 1 here, because the second derivative of a length is NaN at 0.
    length = torch.linalg.vector_norm(vectors + short, dim=-1, keepdim=True)
    return vectors / length


def without_autocast(tensor):
    """A context without autocast on the device of `tensor`; some, such as meta, have none to switch off."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def at_least_float32(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def add_arguments(parser):
    parser.add_argument('--dma-coef', type=float, default=0.5, metavar='C', help='weight of dma_loss (0.5)')


def head(args):
    """`args` -> (in_features, num_classes) -> module."""
    return DMA_Linear


def loss_term(args):
    """`args` -> (outputs, targets, activations) -> scalar, where outputs are (logits, cosine)."""
    return lambda outputs, targets, activations: args.dma_coef * dma_loss(outputs[1])


if __name__ == '__main__':
    torch.manual_seed(0)
    layer = DMA_Linear(in_features=4, out_features=3)
    x, targets = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    logits, cosine = layer(x)
    angles = torch.rad2deg(torch.arccos(cosine.max(dim=1).values))
    print('nearest class  ', cosine.argmax(dim=1).tolist())
    print('its angle (deg)', [round(angle, 1) for angle in angles.tolist()])
    print(f'cross-entropy    {F.cross_entropy(logits, targets):.4f}')
    print(f'dma_loss         {dma_loss(cosine):.4f}')
    print(f'total            {F.cross_entropy(logits, targets) + 0.5 * dma_loss(cosine):.4f}')
