"""Large Margin Deep Networks: a margin between each sample and the decision boundary, at any layer and in any norm.

Elsayed, Krishnan, Mobahi, Regan and Bengio, "Large Margin Deep Networks for Classification", NeurIPS 2018
(arXiv 1803.05598).

    d_j  = (p_y - p_j) / (|gradient of (p_y - p_j) with respect to the layer|_q + epsilon)
           the signed distance, to first order, from the sample to the boundary with class j (equation 7): p softmax
           probabilities, y the target, q the dual of the norm that measures distances (1 of inf, 2 of 2, inf of 1)
    loss = max(0, gamma - max(d, gamma (1 - alpha))) - gamma  =  -clip(d, gamma (1 - alpha), gamma)
           d of the nearest of the top_k other classes, or of each; mean over the batch and over the layers. The clip
           at gamma (1 - alpha), the constant -gamma and epsilon come from the authors' code.

A sample that is wrong by more than gamma (alpha - 1) has gradient zero, so add some cross-entropy if many samples are.

The gradients at the layers come from torch.autograd.grad, because only the loss may add to the .grad of parameters.
A loop over samples and classes that calls `backward` on each p_y - p_j, to read its gradient at the input, adds to the
.grad of every parameter too. The optimizer then mostly lowers p_y, until the softmax saturates on wrong classes, the
gradient at the input vanishes, d is clipped, and the loss has no gradient: learning stops. Such a loop needs a
zero_grad() before its last backward, or no other backward. `train_epoch` below can replace it; `python large_margin.py`
trains with it.

In your own loop:

    images.requires_grad_()
    logits = model(images)
    loss = LargeMarginLoss(gamma=10.0)(logits, targets, [images])      # or outputs of hidden layers, too
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
import argparse
import contextlib
import math

import torch
from torch import nn

DUAL = {'1': math.inf, '2': 2, 'inf': 1}


class LargeMarginLoss(nn.Module):
    """(logits, targets, activations) -> scalar from -gamma to gamma (alpha - 1), times top_k if aggregate='sum'.

    gamma: the distance that is enough, above 0, in the units of the norm. alpha: above 0; distances count from
    gamma (1 - alpha) up, so alpha above 1 includes wrong samples. top_k: number of other classes, the most probable; at
    most classes - 1. norm: 1, 2 or inf (math.inf or 'inf'), which measures distances. aggregate: 'worst', the nearest
    of the top_k, or their 'sum' or 'mean'. approximate: the gradient's norm is a constant in every derivative, which
    saves differentiating twice; second derivatives of the loss itself need False. layer_weights: for each layer a
    factor above 0 on its distances, or 'elements', the number of elements that the layer has for each sample, as in the
    authors' configuration. epsilon: added to the norm.

    logits (batch, classes), targets (batch,), and activations, a list of tensors (batch, ...) that the logits were
    computed from: the input, which must require grad, hidden layers, or both. Under BatchNorm in training the gradient
    at a sample includes its effect on the other samples' statistics, as in the original code. If an activation was
    overwritten in place, for example by ReLU(inplace=True), its gradient is the one after that operation.

    torch.func can differentiate the loss in reverse mode alone (grad, jacrev), as the loss takes gradients itself.

    Raises ValueError for an option out of range, too few classes for top_k, a wrong number of layers, or activations
    that the logits do not depend on.
    """

    def __init__(self, gamma=10000.0, alpha=4.0, top_k=1, norm=2, aggregate='worst', approximate=True,
                 layer_weights=None, epsilon=1e-8):
        super().__init__()
        self.dual = DUAL.get(str(norm).removesuffix('.0'))
        if self.dual is None:
            raise ValueError(f'norm must be 1, 2 or inf, was given {norm}')
        if aggregate not in ('worst', 'sum', 'mean'):
            raise ValueError(f"aggregate must be 'worst', 'sum' or 'mean', was given {aggregate!r}")
        if not (0 < gamma < math.inf and 0 < alpha < math.inf and 0 <= epsilon < math.inf):
            raise ValueError(f'gamma and alpha must be numbers above 0, and epsilon a number of at least 0, '
                             f'were given {gamma}, {alpha} and {epsilon}')
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f'top_k must be a whole number of at least 1, was given {top_k}')
        numbers = () if layer_weights in (None, 'elements') else layer_weights
        limits = torch.finfo(torch.float32)
        if not all(not isinstance(weight, str) and limits.tiny <= weight <= limits.max for weight in numbers):
            raise ValueError(f"layer_weights must be numbers above 0, or 'elements', were given {layer_weights}")
        self.gamma, self.alpha, self.top_k, self.aggregate = gamma, alpha, top_k, aggregate
        self.approximate, self.layer_weights, self.epsilon = approximate, layer_weights, epsilon

    def forward(self, logits, targets, activations):
        distances = self.distances(logits, targets, activations)
        if self.aggregate == 'worst':
            distances = distances.amin(dim=0, keepdim=True)
        # The authors' code adds gamma and subtracts it again, which rounds d to the precision of gamma.
        losses = -distances.clamp(self.gamma * (1 - self.alpha), self.gamma)
        losses = losses.mean(dim=0) if self.aggregate == 'mean' else losses.sum(dim=0)
        return losses.sum() / max(losses.numel(), 1)

    def distances(self, logits, targets, activations):
        """d of each of the top_k classes before the clip, (top_k, layers, batch), in float32 at least."""
        weights = self.layer_weights or [1.0] * len(activations)
        if weights == 'elements':
            weights = [math.prod(tensor.shape[1:]) for tensor in activations]
        if not activations or len(weights) != len(activations):
            raise ValueError(f'LargeMarginLoss needs at least one activation and a layer weight for each, was given '
                             f'{len(activations)} and {len(weights)}')
        if self.top_k > logits.shape[1] - 1:
            raise ValueError(f'top_k must be at most the number of other classes, {logits.shape[1] - 1}, '
                             f'was given {self.top_k}')
        if not all(tensor.requires_grad for tensor in (logits, *activations)):
            raise ValueError('LargeMarginLoss needs gradients: call it outside of torch.no_grad(), with activations '
                             'that require grad, such as images.requires_grad_()')
        distances = []
        with without_autocast(logits):
            for difference, slope in self._differences(logits, targets):
                # One call for all classes, is_grads_batched=True, took 1.2 times as long with ResNet-20 on a CPU.
                gradients = torch.autograd.grad(logits, activations, slope.to(logits.dtype), retain_graph=True,
                                                create_graph=not self.approximate, allow_unused=True)
                if any(gradient is None for gradient in gradients):
                    raise ValueError('LargeMarginLoss was given an activation that the logits do not depend on')
                distances.append(torch.stack([difference / (self._dual_norm(gradient) / weight + self.epsilon)
                                              for gradient, weight in zip(gradients, weights)]))
            return torch.stack(distances)

    def _differences(self, logits, targets):
        """For each of the top_k classes j: p_y - p_j (batch,), and its gradient at the logits (batch, classes).

        That gradient has the factor 1 - p_y + p_j, which rounds to 0 if p_y is nearly 1, although d is not small then.
        So 1 - p_y is computed as the sum of the other probabilities, and p_y - p_j is a tensor with that gradient.
        """
        logits, y = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[:, None]
        p = torch.softmax(logits, dim=1)
        p_y, but_y = p.gather(1, y), p.scatter(1, y, 0).sum(dim=1, keepdim=True)
        for j in p.detach().scatter(1, y, -1).topk(self.top_k).indices.split(1, dim=1):
            p_j, but_j = p.gather(1, j), p.scatter(1, j, 0).sum(dim=1, keepdim=True)
            slope = (p * (p_j - p_y)).scatter(1, y, p_y * (but_y + p_j)).scatter(1, j, -p_j * (but_j + p_y))
            yield _WithSlope.apply((p_y - p_j).detach().squeeze(1), logits, slope), slope

    def _dual_norm(self, gradient):
        """(batch, ...) -> (batch,), in float32 at least."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        gradient = gradient[..., None]  # because the shape (batch,) has no axis to reduce
        return torch.linalg.vector_norm(gradient, self.dual, dim=tuple(range(1, gradient.dim())), dtype=dtype)


class _WithSlope(torch.autograd.Function):
    """`difference` (batch,), whose gradient at the logits (batch, classes) is `slope`, itself a function of them."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(difference, logits, slope):
        return difference.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        slope, = ctx.saved_tensors
        return None, grad[:, None] * slope, None


def without_autocast(tensor):
    """A context without autocast on the device of `tensor`; some, such as meta, have none to switch off."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def train_epoch(model, batches, optimizer, loss_function, device='cpu'):
    """One epoch with the margin at the input alone; returns the training accuracy, between 0 and 1.

    batches: an iterable of (images, targets), such as a DataLoader. loss_function: a LargeMarginLoss.
    """
    model.train()
    correct = count = 0
    for images, targets in batches:
        images, targets = images.to(device).detach().requires_grad_(), targets.to(device)
        logits = model(images)
        optimizer.zero_grad()
        loss_function(logits, targets, [images]).backward()
        optimizer.step()
        correct += (logits.argmax(dim=1) == targets).sum()
        count += len(targets)
    return correct.item() / count


def add_arguments(parser):
    flag = parser.add_argument
    flag('--large-margin-layers', nargs='+', default=['input'], metavar='NAME', help='modules, or input (input)')
    flag('--large-margin-coef', type=float, default=1.0, metavar='C', help='weight of the loss (1)')
    flag('--cross-entropy-weight', type=float, default=0.0, metavar='C', help='weight of the cross-entropy (0)')
    flag('--large-margin-gamma', type=float, default=10000.0, metavar='G', help='the distance that is enough (10000)')
    flag('--large-margin-alpha', type=float, default=4.0, metavar='A',
         help='distances count from gamma (1 - alpha) up (4)')
    flag('--top-k', type=int, default=1, metavar='K', help='number of other classes, the most probable (1)')
    flag('--norm', choices=('1', '2', 'inf'), default='2', help='the norm that measures distances (2)')
    flag('--aggregate', choices=('worst', 'sum', 'mean'), default='worst', help='of the top k distances (worst)')
    flag('--exact', action='store_true', help='differentiate through the norm of the gradient too')
    flag('--layer-weights', type=number_or_elements, nargs='+', metavar='W',
         help="for each layer a factor on its distances, or elements: each layer's number of elements (1)")


def number_or_elements(text):
    try:
        return text if text == 'elements' else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be numbers or the word elements, was given {text[:50]}') from None


CLASS_TARGETS = True  # the distance is from one class of each image


def layers(args):
    """`args` -> the names of the modules whose outputs are the loss term's activations."""
    return args.large_margin_layers


def cross_entropy_weight(args):
    weight = args.cross_entropy_weight
    if not 0 <= weight < math.inf:
        raise ValueError(f'--cross-entropy-weight must be a number of at least 0, was given {weight}')
    return weight


def loss_term(args):
    """`args` -> (outputs, targets, activations) -> scalar."""
    if 'aggregate' in args.given and args.top_k == 1:
        raise ValueError('--aggregate does nothing with --top-k 1, as there is one class to aggregate over')
    if args.large_margin_coef == 0 and args.cross_entropy_weight == 0:
        raise ValueError('--large-margin-coef 0 leaves nothing to train on without a --cross-entropy-weight')
    unused = {'large_margin_layers', 'large_margin_gamma', 'large_margin_alpha', 'top_k', 'norm', 'exact',
              'layer_weights'} & args.given
    if args.large_margin_coef == 0 and unused:
        raise ValueError(f'--{min(unused).replace("_", "-")} does nothing with --large-margin-coef 0')
    weights = 'elements' if args.layer_weights == ['elements'] else args.layer_weights
    loss = LargeMarginLoss(args.large_margin_gamma, args.large_margin_alpha, args.top_k, args.norm, args.aggregate,
                           not args.exact, weights)

    def term(outputs, targets, activations):
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return args.large_margin_coef * loss(logits, targets, activations)

    return term


if __name__ == '__main__':
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images, targets = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    train, test = torch.utils.data.random_split(torch.utils.data.TensorDataset(images, targets), (1500, 297))
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for epoch in range(10):
        batches = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)
        accuracy = train_epoch(model, batches, optimizer, LargeMarginLoss())
        print(f'epoch {epoch + 1:2}: training accuracy {100 * accuracy:.1f}%')
    images, targets = test[:]
    print(f'test accuracy {100 * (model(images).argmax(dim=1) == targets).float().mean():.1f}%')
