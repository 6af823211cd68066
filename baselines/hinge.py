"""Hinge losses of several classes: the target's logit must win by 1, after which there is no gradient.

The name means at least three losses. y is the target, s the logits, K the number of classes:

    one-vs-all       sum_j max(0, 1 - sigma_j s_j), where sigma_y = 1 and otherwise -1
    crammer-singer   max(0, 1 + max_(j != y) s_j - s_y)
    weston-watkins   1/K sum_(j != y) max(0, 1 + s_j - s_y)

    loss = mean over the batch; with squared=True each max(0, .) is squared

One-vs-all is Caffe's HingeLoss, in which the code of L-Softmax (arXiv 1612.02295) was written; Tang (arXiv 1306.0239)
trains networks with its square. Crammer and Singer, JMLR 2001. Weston and Watkins, ESANN 1999, without the 1/K, which
is that of nn.MultiMarginLoss.

The losses depend on the scale of the logits: cosines cannot all keep a margin of 1.

In your own loop:

    loss = hinge_loss(model(images), targets, kind='crammer-singer')
"""
import torch

KINDS = 'one-vs-all', 'crammer-singer', 'weston-watkins'


def hinge_loss(logits, targets, kind='one-vs-all', squared=False):
    """The mean over the batch of the hinge loss, at least 0; 0 for an empty batch.

    logits: (batch, K). targets: (batch,), one class for each image. kind: 'one-vs-all', 'crammer-singer' or
    'weston-watkins'; with one class the last two are 0. squared: square each max(0, .).
    Computed in float32 at least. The gradient at a kink is 0; equal largest logits share it.
    Raises ValueError for another kind and for logits of another shape.
    """
    if kind not in KINDS:
        raise ValueError(f'kind must be one of {", ".join(KINDS)}, was given {kind!r}')
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f'hinge_loss takes logits (batch, classes) with at least one class, '
                         f'was given {tuple(logits.shape)}')
    logits, y = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[:, None]
    if kind == 'one-vs-all':
        violations = 1 + logits.scatter(1, y, -logits.gather(1, y))
    else:
        # The target itself never violates: relu(-inf) is 0.
        others = logits.scatter(1, y, -torch.inf)
        if kind == 'crammer-singer':
            others = others.amax(dim=1, keepdim=True)
        violations = 1 + others - logits.gather(1, y)
    losses = violations.relu()  # the gradient of clamp(min=0) at 0 differs between versions of PyTorch
    if squared:
        losses = losses.square()
    divisor = logits.shape[1] if kind == 'weston-watkins' else 1
    return losses.sum() / (divisor * max(len(logits), 1))


def add_arguments(parser):
    parser.add_argument('--hinge', choices=KINDS, default='one-vs-all', metavar='KIND',
                        help=f'{", ".join(KINDS)} (one-vs-all)')


CLASS_TARGETS = True  # the margin is for one class of each image


def cross_entropy_weight(args):
    return 0.0  # the hinge loss is used instead


def loss_term(args):
    """`args` -> (outputs, targets, activations) -> scalar."""
    def term(outputs, targets, activations):
        return hinge_loss(outputs[0] if isinstance(outputs, tuple) else outputs, targets, args.hinge)

    return term


if __name__ == '__main__':
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    for kind in KINDS:
        plain, squared = hinge_loss(logits, targets, kind), hinge_loss(logits, targets, kind, squared=True)
        print(f'{kind:14} {plain:.4f}, squared {squared:.4f}')
