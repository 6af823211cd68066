"""NormFace, CosFace and ArcFace: the target's logit must win by a margin on its angle, on its cosine, or on both.

Deng, Guo, Xue and Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (arXiv 1801.07698).
Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (arXiv 1801.09414).

    cosine_j = x . w_j / (|x| |w_j|) = cos(theta_j)
    logit_j  = scale cosine_j                                                     for every class j
    logit_y  = scale (cos(theta_y + angular_margin) - cosine_margin)              for the target y, in training
               scale (cosine_y - angular_margin sin(angular_margin) - cosine_margin)   if theta_y + angular_margin >= pi

ArcFace has an angular margin, CosFace a cosine margin, NormFace neither. Beyond pi, cos(theta + margin) would rise
again; the second form, from the authors' code, keeps falling.

In your own loop:

    head = ArcFaceLinear(512, 10, scale=30.0, angular_margin=0.5)   # instead of nn.Linear(512, 10)
    logits = head(features, targets)                   # in evaluation: head(features)
    plain_logits = head.without_margin(logits)         # for the training accuracy; call it before the next forward pass
    loss = F.cross_entropy(logits, targets)
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


class ArcFaceLinear(nn.Linear):
    """A cosine classifier without bias, weight (out_features, in_features), with a margin at the target in training.

    scale: above 0. angular_margin: in radians, from 0 to below pi. cosine_margin: at least 0.

    forward(features, targets=None), with features (batch, in_features) and targets (batch,), returns logits
    (batch, out_features), float32 at least, also under autocast. In evaluation they are scale * cosine, with or
    without targets. Raises ValueError for training without targets and for an option out of range.
    A zero vector has cosine 0 to every other vector, and gradient 0. Gradients are exact; at theta = 0, where
    cos(theta + angular_margin) has none, the target's logit contributes 0.
    """

    def __init__(self, in_features, out_features, scale=30.0, angular_margin=0.5, cosine_margin=0.0):
        if not 0 < scale < math.inf:
            raise ValueError(f'scale must be a number above 0, was given {scale}')
        if not 0 <= angular_margin < math.pi:
            raise ValueError(f'angular_margin must be at least 0 and below pi radians, was given {angular_margin}')
        if not 0 <= cosine_margin < math.inf:
            raise ValueError(f'cosine_margin must be a number of at least 0, was given {cosine_margin}')
        super().__init__(in_features, out_features, bias=False)
        self.scale, self.angular_margin, self.cosine_margin = scale, angular_margin, cosine_margin
        # A tensor, because torch.compile would recompile for each new value of a Python number.
        self.register_buffer('strength', torch.tensor(1.0), persistent=False)
        self.before_step(0.0, 1.0)
        self._last = None

    def forward(self, features, targets=None):
        self._last = None
        if self.training and targets is None:
            raise ValueError('ArcFaceLinear needs the targets in training: head(features, targets); '
                             'for plain logits use head.eval()')
        dtype = torch.promote_types(torch.promote_types(features.dtype, self.weight.dtype), torch.float32)
        with without_autocast(features):  # bfloat16 would round every angle below 3.6 degrees to 0
            cosine = F.linear(unit_rows(features.to(dtype)), unit_rows(self.weight.to(dtype)))
            logits = self.scale * cosine
            if not (self.training and self.has_margin):
                return logits
            y = targets[:, None]
            self._last = y, logits.detach().gather(1, y)
            return logits.scatter(1, y, self.scale * self._with_margin(cosine.gather(1, y)))

    def _with_margin(self, cosine):
        angle = self.angular_margin * self.strength.to(cosine.dtype)
        squared_sine = (1 - cosine) * (1 + cosine)
        slanted = squared_sine > 0  # otherwise theta is 0 or pi, where the slope of the square root is infinite
        sine = squared_sine.where(slanted, 1).sqrt().where(slanted, 0)
        rotated = cosine * angle.cos() - sine * angle.sin()
        fallback = cosine - angle * angle.sin()
        return rotated.where(cosine > -angle.cos(), fallback) - self.cosine_margin * self.strength.to(cosine.dtype)

    def without_margin(self, logits):
        """scale * cosine, detached, from the logits of the last training forward; in evaluation the logits as they are.

        Compute the training accuracy from these: a correct sample may lack only the margin.
        """
        if self._last is None:
            return logits.detach()
        return logits.detach().scatter(1, *self._last)

    def before_step(self, behind, strength):
        """Multiplies both margins by `strength`, from 0 to 1, until the next call; `behind` is not used."""
        if not 0 <= strength <= 1:
            raise ValueError(f'strength must be between 0 and 1, was given {strength}')
        self.strength.fill_(strength)
        self.has_margin = strength > 0 and (self.angular_margin > 0 or self.cosine_margin > 0)

    def __getstate__(self):
        return {**self.__dict__, '_last': None}  # tensors of torch.func can be neither copied nor saved


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
    flag('--scale', type=float, default=30.0, metavar='S', help='factor on the cosines (30)')
    flag('--angular-margin', type=float, default=0.5, metavar='M', help='added to the angle, in radians (0.5)')
    flag('--cosine-margin', type=float, default=0.0, metavar='M', help='subtracted from the cosine (0)')


CLASS_TARGETS = True  # the margin is for one class of each image


def strength(args):
    """0 where --method-start and --method-ramp have nothing to scale."""
    return max(abs(args.angular_margin), abs(args.cosine_margin))


def head(args):
    """`args` -> (in_features, num_classes) -> module."""
    return functools.partial(ArcFaceLinear, scale=args.scale, angular_margin=args.angular_margin,
                             cosine_margin=args.cosine_margin)


if __name__ == '__main__':
    x, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    for name, margins in (('NormFace', (0.0, 0.0)), ('CosFace', (0.0, 0.35)), ('ArcFace', (0.5, 0.0))):
        torch.manual_seed(0)
        layer = ArcFaceLinear(4, 3, 30.0, *margins)
        logits = layer(x, targets)
        target_logits = [round(logit, 2) for logit in logits.gather(1, targets[:, None]).flatten().tolist()]
        print(f'{name:8}: loss {F.cross_entropy(logits, targets):7.4f}, target logits {target_logits}')
