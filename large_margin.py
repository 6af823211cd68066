"""Large Margin Deep Networks: a margin between each sample and the decision boundary, at any layer and in any norm.

Elsayed, Krishnan, Mobahi, Regan and Bengio, "Large Margin Deep Networks for Classification", NeurIPS 2018 (arXiv 1803.05598).

    d_j  = (p_y - p_j) / (|gradient of (p_y - p_j) with respect to the layer|_q + epsilon)
           the distance, to first order, from the sample to the boundary with class j: p softmax probabilities, y the
           target, q the dual of the norm that distances are measured in (1 of inf, 2 of 2, inf of 1); equation 7, signed
    loss = max(0, gamma - max(d, gamma (1 - alpha))) - gamma  =  -clip(d, gamma (1 - alpha), gamma)
           for d of the nearest of the top_k other classes, or of each; mean over the batch and over the layers. The clip
           at gamma (1 - alpha), the constant -gamma and epsilon are of the authors' code.

A sample that is wrong by more than gamma (alpha - 1) has gradient zero, so add some cross-entropy where many are.

Only the loss may write into the .grad of the parameters, so the gradients at the layers come from torch.autograd.grad. A loop
over samples and classes that calls `backward` on each p_y - p_j, to read its gradient off the input, also adds it to the
.grad of every parameter. The optimizer then follows mostly these, downhill, which lowers p_y; the softmax saturates on
wrong classes, the gradient at the input vanishes, d is clipped, and the loss has no gradient any more: learning stops. That
shows where the input's gradient is set to zero in between. Where it is not it adds up, so d is shorter and clipped later,
and the parameters are polluted as before; what helps them is a zero_grad() before the last backward, or no backward but
the last. `python large_margin.py` trains with `train_epoch` below, which can stand in for such a loop.

Use in a loop of your own:

    images.requires_grad_()
    logits = model(images)
    loss = LargeMarginLoss(gamma=10.0)(logits, targets, [images])      # or outputs of hidden layers, too
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
import math

import torch
from torch import nn

DUAL = {'1': math.inf, '2': 2, 'inf': 1}


class LargeMarginLoss(nn.Module):
    """(logits, targets, activations) -> scalar between -gamma and gamma (alpha - 1), both times top_k with aggregate='sum'.

    gamma: the distance beyond which a sample is left alone, in the units of the norm; above 0. alpha: samples count down
    to the distance gamma (1 - alpha), so alpha above 1 keeps wrong ones; above 0. top_k: how many other classes, the
    most probable; at most classes - 1. norm: 1, 2 or inf (math.inf or 'inf'), in which distances are measured.
    aggregate: 'worst', the nearest of the top_k; 'sum' or 'mean' over them. approximate: hold the gradient's norm constant
    while differentiating, which saves differentiating twice. layer_weights: one number above 0 for each layer, which its
    distances are multiplied by. epsilon: added to the norm.

    logits (batch, classes), targets (batch,), and activations, a list of tensors (batch, ...) of the graph that the logits
    were computed in: the input, which must require grad, hidden layers, or both. Under BatchNorm in training the gradient
    at one sample includes what it does to the statistics of the others, as in the original code. An activation that was
    overwritten in place afterwards, by ReLU(inplace=True) for instance, gives the gradient behind that.

    Raises ValueError for an option out of range, too few classes for top_k, a wrong number of layers, or activations
    that the logits do not depend on.
    """

    def __init__(self, gamma=10000.0, alpha=4.0, top_k=1, norm=2, aggregate='worst', approximate=True, layer_weights=None,
                 epsilon=1e-8):
        super().__init__()
        self.dual = DUAL.get(str(norm).removesuffix('.0'))
        if self.dual is None:
            raise ValueError(f'norm must be 1, 2 or inf, was given {norm}')
        if aggregate not in ('worst', 'sum', 'mean'):
            raise ValueError(f"aggregate must be 'worst', 'sum' or 'mean', was given {aggregate!r}")
        if not (0 < gamma < math.inf and 0 < alpha < math.inf and 0 <= epsilon < math.inf):
            raise ValueError(f'gamma and alpha must be numbers above 0 and epsilon one of at least 0, were given '
                             f'{gamma}, {alpha} and {epsilon}')
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f'top_k must be a whole number of at least 1, was given {top_k}')
        if not all(0 < weight < math.inf for weight in layer_weights or ()):
            raise ValueError(f'layer_weights must be numbers above 0, were given {layer_weights}')
        self.gamma, self.alpha, self.top_k = gamma, alpha, top_k
        self.aggregate, self.approximate, self.layer_weights, self.epsilon = aggregate, approximate, layer_weights, epsilon

    def forward(self, logits, targets, activations):
        weights = self.layer_weights or [1.0] * len(activations)
        if not activations or len(weights) != len(activations):
            raise ValueError(f'LargeMarginLoss needs at least one activation and a layer weight for each, was given '
                             f'{len(activations)} and {len(weights)}')
        if self.top_k > logits.shape[1] - 1:
            raise ValueError(f'top_k must be at most the number of other classes, {logits.shape[1] - 1}, was given {self.top_k}')
        if not all(tensor.requires_grad for tensor in (logits, *activations)):
            raise ValueError('LargeMarginLoss needs gradients: call it outside of torch.no_grad(), with activations that '
                             'require grad, such as images.requires_grad_()')
        distances = []
        with torch.autocast(logits.device.type, enabled=False):
            for difference, slope in self._differences(logits, targets):
                # One call for all classes, is_grads_batched=True, took 1.2 times as long with ResNet-20 on a CPU.
                gradients = torch.autograd.grad(logits, activations, slope.to(logits.dtype), retain_graph=True,
                                                create_graph=not self.approximate, allow_unused=True)
                if any(gradient is None for gradient in gradients):
                    raise ValueError('LargeMarginLoss was given an activation that the logits do not depend on')
                distances.append(torch.stack([difference / (self._dual_norm(gradient) / weight + self.epsilon)
                                              for gradient, weight in zip(gradients, weights)]))
            distances = torch.stack(distances)  # (top_k, layers, batch)
            if self.aggregate == 'worst':
                distances = distances.amin(dim=0, keepdim=True)
            # Written as in the authors' code, with gamma added and taken away again, d would be rounded to the precision of gamma.
            losses = -distances.clamp(self.gamma * (1 - self.alpha), self.gamma)
            losses = losses.mean(dim=0) if self.aggregate == 'mean' else losses.sum(dim=0)
            return losses.sum() / max(losses.numel(), 1)

    def _differences(self, logits, targets):
        """For each of the top_k classes j: p_y - p_j (batch,), and its slope with respect to the logits (batch, classes).

        The slope has the factor 1 - p_y + p_j, which rounding makes 0 where p_y is nearly 1, while d is as large there as
        elsewhere. Hence the sum of the other probabilities in place of 1 - p_y, and p_y - p_j as a tensor of that slope.
        """
        logits, y = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[:, None]
        with torch.set_grad_enabled(not self.approximate):
            p = torch.softmax(logits, dim=1)
            p_y, but_y = p.gather(1, y), p.scatter(1, y, 0).sum(dim=1, keepdim=True)
        for j in p.detach().scatter(1, y, -1).topk(self.top_k).indices.split(1, dim=1):
            with torch.set_grad_enabled(not self.approximate):
                p_j, but_j = p.gather(1, j), p.scatter(1, j, 0).sum(dim=1, keepdim=True)
                slope = (p * (p_j - p_y)).scatter(1, y, p_y * (but_y + p_j)).scatter(1, j, -p_j * (but_j + p_y))
            change = (slope.detach() * (logits - logits.detach())).sum(dim=1)  # 0
            yield (p_y - p_j).detach().squeeze(1) + change, slope

    def _dual_norm(self, gradient):
        """(batch, ...) -> (batch,), in float32 at least."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        axes = tuple(range(1, gradient.dim() + 1))
        return torch.linalg.vector_norm(gradient[..., None], self.dual, dim=axes, dtype=dtype)  # (batch,) has no axis to sum over


def train_epoch(model, batches, optimizer, loss_function, device='cpu'):
    """One epoch on the margin at the input alone; returns the share of images that were classified right on the way.

    batches: of (images, targets), as a DataLoader gives. loss_function: a LargeMarginLoss.
    """
    model.train()
    right = seen = 0
    for images, targets in batches:
        images, targets = images.to(device).detach().requires_grad_(), targets.to(device)
        logits = model(images)
        optimizer.zero_grad()
        loss_function(logits, targets, [images]).backward()
        optimizer.step()
        right += (logits.argmax(dim=1) == targets).sum()
        seen += len(targets)
    return right.item() / seen


def add_arguments(parser):
    flag = parser.add_argument
    flag('--large-margin-layers', nargs='+', default=['input'], metavar='NAME', help='modules, or input (input)')
    flag('--large-margin-coef', type=float, default=1.0, metavar='C', help='weight of the loss (1)')
    flag('--cross-entropy-weight', type=float, default=0.0, metavar='C', help='weight of the cross-entropy beside it (0)')
    flag('--large-margin-gamma', type=float, default=10000.0, metavar='G', help='the distance that is enough (10000)')
    flag('--large-margin-alpha', type=float, default=4.0, metavar='A', help='distances count from gamma (1 - alpha) up (4)')
    flag('--top-k', type=int, default=1, metavar='K', help='other classes that count, the most probable (1)')
    flag('--norm', choices=('1', '2', 'inf'), default='2', help='in which distances are measured (2)')
    flag('--aggregate', choices=('worst', 'sum', 'mean'), default='worst', help='over the top k (worst)')
    flag('--exact', action='store_true', help='differentiate through the norm of the gradient too')
    flag('--layer-weights', type=float, nargs='+', metavar='W', help='for each layer, on its distances (1)')


CLASS_TARGETS = True  # the distance is from one class


def layers(args):
    """`args` -> the names of the modules whose outputs are the activations of the loss term."""
    return args.large_margin_layers


def cross_entropy_weight(args):
    if not 0 <= args.cross_entropy_weight < math.inf:
        raise ValueError(f'--cross-entropy-weight must be a number of at least 0, was given {args.cross_entropy_weight}')
    return args.cross_entropy_weight


def loss_term(args):
    """`args` -> (outputs, targets, activations) -> scalar."""
    if 'aggregate' in args.given and args.top_k == 1:
        raise ValueError('--aggregate does nothing with --top-k 1, as there is one class to aggregate over')
    loss = LargeMarginLoss(args.large_margin_gamma, args.large_margin_alpha, args.top_k, args.norm, args.aggregate,
                           not args.exact, args.layer_weights)

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
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for epoch in range(10):
        batches = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)
        share = train_epoch(model, batches, optimizer, LargeMarginLoss())
        print(f'epoch {epoch + 1:2}: training accuracy {100 * share:.1f}%')
    images, targets = test[:]
    print(f'test accuracy {100 * (model(images).argmax(dim=1) == targets).float().mean():.1f}%')
