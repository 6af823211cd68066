"""Angles, margins, distances to the decision boundary, neural collapse and temperature: the mathematics.

features (N, F), logits (N, classes), targets (N,) class indices, weight (classes, F). What needs no network is computed
in float64. A dict holds what a number is -> the number, None where it is not defined, or its `summary` over images.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn

from dma import unit_rows
from large_margin import DUAL, LargeMarginLoss
from utils.errors import UserError

ROWS = 4096  # images that are converted to float64 at a time


def summary(values):
    """Mean, standard deviation (None of one value), 5% quantile, median of (N,); infinite values are only counted."""
    values = values.double().cpu().numpy()
    finite = values[np.isfinite(values)]
    result = dict.fromkeys(('mean', 'deviation', '5%', 'median'))
    if len(finite):
        result = {'mean': finite.mean().item(), 'deviation': finite.std(ddof=1).item() if len(finite) > 1 else None,
                  '5%': np.quantile(finite, 0.05).item(), 'median': np.median(finite).item()}
    return result | ({'not found': len(values) - len(finite)} if len(finite) < len(values) else {})


def by_rows(function, vectors, targets):
    """function of some rows of (N, ...) at a time, in float64, and of their targets: tensors (..., N), put together."""
    return torch.cat([function(rows.double(), y) for rows, y in zip(vectors.split(ROWS), targets.split(ROWS))], dim=-1)


# Angles

def angles(features, targets, weight):
    """In degrees: those of `angles_of_images`, and between class means and between class weights."""
    unit_means = unit_class_means(features, targets, len(weight))
    of_images = angles_of_images(features, targets, weight, unit_means)
    return {**{name: summary(values) for name, values in of_images.items()},
            **between('class means', unit_means[targets.unique()]),
            **between('class weights', unit_rows(weight.double()))}


def angles_of_images(features, targets, weight, unit_means=None):
    """{what it is: (N,)}, from 0 to 180 degrees; a vector of zeros is at 90 to every vector, as in DMA_Linear.

    unit_means: `unit_class_means` of the same features and targets, where they are known already.
    """
    unit_means = unit_class_means(features, targets, len(weight)) if unit_means is None else unit_means
    units = unit_rows(weight.double())

    def of(x, y):
        x, y = unit_rows(x), y[:, None]
        angle = degrees(x @ units.T)
        to_target, margin = angle.gather(1, y), ahead(-angle, y[:, 0])[:, None]
        nearest, to_mean = angle.amin(dim=1, keepdim=True), degrees((x * unit_means[y[:, 0]]).sum(1, keepdim=True))
        return torch.cat((nearest, to_target, margin, to_mean), dim=1).T

    names = 'angle to the nearest class weight', 'angle to the target', 'angular margin', 'angle to the class mean'
    return dict(zip(names, by_rows(of, features, targets)))


def degrees(cosine):
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def between(what, units):
    """Mean and smallest angle between any two of some unit vectors (vectors, F)."""
    rows, columns = torch.triu_indices(len(units), len(units), offset=1)
    angle = degrees((units @ units.T)[rows, columns])
    return {f'mean angle between {what}': angle.mean().item() if len(angle) else None,
            f'smallest angle between {what}': angle.min().item() if len(angle) else None}


def unit_class_means(features, targets, classes):
    """`class_means`, each divided by its length, (classes, F)."""
    return unit_rows(class_means(features, targets, classes)[0])


def class_means(features, targets, classes):
    """(classes, F), 0 where there is no image of a class, and how many images (classes,) there are."""
    counts = targets.bincount(minlength=classes)
    sums = features.new_zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, y in zip(features.split(ROWS), targets.split(ROWS)):
        sums.index_add_(0, y, rows.double())
    return sums / counts.clamp(min=1)[:, None], counts


# Margins

def margins(logits, targets):
    """Target minus best other class, of the logits (N,) and of the probabilities (N,)."""
    def of(z, y):
        return torch.stack([ahead(values, y) for values in (z, z.softmax(dim=1))])

    return by_rows(of, logits, targets)


def ahead(values, targets):
    """The target's value minus the best other one, (batch, classes) -> (batch,)."""
    y = targets[:, None]
    return (values.gather(1, y) - values.scatter(1, y, -math.inf).amax(dim=1, keepdim=True)).squeeze(1)


def log_spectral_product(model):
    """The logarithm of the product of the spectral norms of all linear layers, convolutions and BatchNorms, auxiliary
    classifiers too.

    A convolution counts as its weight reshaped to (out_channels, all else), which is not the norm of what it does to
    an image; BatchNorm, which in evaluation scales each channel, as max |gamma| / sqrt(var + eps).
    """
    total = 0.0
    for name, module in model.named_modules():
        weight = getattr(module, 'weight', None)
        if torch.is_tensor(weight) and weight.dim() > 1:
            norm = torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_var is None:
                raise UserError(f'--spectral needs the statistics of BatchNorm, and {name} keeps none')
            gamma = 1 if module.weight is None else module.weight.detach().double()
            norm = (gamma / (module.running_var.double() + module.eps).sqrt()).abs().max()
        else:
            continue
        total += norm.log().item()
    return total


# Distances

def first_order(network, activations, inputs, targets, top_k, norms=tuple(DUAL)):
    """large_margin.py's d (batch,) of the nearest of the top_k other classes: {(layer, norm): d}.

    activations: an `Activations` of the model that `network`, inputs -> logits, evaluates.
    """
    logits = network(inputs)
    layers = activations.read()
    found = LargeMarginInNorms(top_k, norms).distances(logits, targets, layers).amin(dim=0).detach()
    return {(name, norm): found[index, place] for place, norm in enumerate(norms)
            for index, name in enumerate(activations.names)}


class LargeMarginInNorms(LargeMarginLoss):
    """Its `distances` are in several norms, (top_k, layers, norms, batch), and take as many backward passes as one."""

    def __init__(self, top_k, norms):
        super().__init__(top_k=top_k)
        self.each = [LargeMarginLoss(norm=norm) for norm in norms]

    def _dual_norm(self, gradient):
        return torch.stack([loss._dual_norm(gradient) for loss in self.each])


def deepfool(network, inputs, targets, norm, top_k, steps=50, overshoot=0.02):
    """The length (batch,) of a perturbation that changes the prediction, by DeepFool (arXiv 1511.04599, algorithm 2 and
    section 3.3).

    0 where the prediction is wrong already, inf where `steps` steps found none. norm: '2' or 'inf'. Each step goes to
    the nearest boundary of the network made linear there, among those of the top_k other classes best at the start.
    """
    left, moved = torch.arange(len(targets), device=targets.device), torch.zeros_like(inputs)
    distance = inputs.new_full((len(targets),), math.inf)
    for step in range(steps + 1):
        x, y = (inputs[left] + (1 + overshoot) * moved[left]).requires_grad_(), targets[left, None]
        logits = network(x)
        if step == 0:
            others = logits.detach().scatter(1, y, -math.inf).topk(top_k).indices
        right = ahead(logits.detach(), y[:, 0]) > 0  # a tie is on the boundary
        changed = left[~right]
        distance[changed] = length((1 + overshoot) * moved[changed], norm)
        if step == steps or not right.any():
            break
        nearest, best = inputs.new_full((len(left),), math.inf), torch.zeros_like(x)
        for k in others[left].split(1, dim=1):
            difference = (logits.gather(1, y) - logits.gather(1, k)).squeeze(1)
            slope, = torch.autograd.grad(difference.sum(), x, retain_graph=True)
            away = difference.detach().abs() / length(slope, 1 if norm == 'inf' else 2)
            closer = away < nearest  # not where the slope is 0
            nearest, best = away.where(closer, nearest), slope.where(beside(closer, slope), best)
        moved[left] -= beside(nearest.nan_to_num(posinf=0), best) * direction(best, norm)
        left = left[right]
    return distance


def pgd(network, inputs, targets, norm, upper, steps, bisections):
    """As `deepfool`, by halving an interval `bisections` times: (0, upper] at first, upper (batch,) finite or inf.

    Its middle is the new upper bound if projected gradient descent on the logit margin changes the prediction within
    that radius, in `steps` steps of 2.5 radius / steps from the image on. Where `upper` is inf, so is the result.
    """
    searched = (upper.isfinite() & (upper > 0)).nonzero().squeeze(1)
    x, y, low, high = inputs[searched], targets[searched], torch.zeros_like(upper[searched]), upper[searched]
    for _ in range(bisections if len(searched) else 0):
        radius = (low + high) / 2
        changed, moved = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(x)
        for step in range(steps + 1):
            at = (x + moved).requires_grad_()
            logits = network(at)
            changed |= ahead(logits.detach(), y) <= 0
            if step == steps or changed.all():
                break
            slope, = torch.autograd.grad(ahead(logits, y).sum(), at)
            moved = moved - beside(2.5 * radius / steps, x) * direction(slope, norm)
            edge = beside(radius, x)
            moved = (moved.clamp(-edge, edge) if norm == 'inf'
                     else moved * (edge / beside(length(moved, norm), x)).clamp(max=1))
        low, high = low.where(changed, radius), radius.where(changed, high)
    return upper.index_copy(0, searched, high)


def direction(slope, norm):
    """The steepest one of length 1 in this norm, '2' or 'inf', for each of (batch, ...); 0 where the slope is."""
    return slope.sign() if norm == 'inf' else unit_rows(slope.flatten(1)).view_as(slope)


def length(vectors, norm):
    return torch.linalg.vector_norm(vectors.flatten(1), float(norm), dim=1)


def beside(values, images):
    """(batch,) as (batch, 1, 1, 1), to multiply images with."""
    return values.view(-1, *[1] * (images.dim() - 1))


# Neural collapse

def collapse(features, targets, weight):
    """NC1 to NC3 of Papyan, Han and Donoho (arXiv 2008.08186), over the C classes that the images are of.

    Each class counts the same, however many images it has: the global mean and S_W are means over classes of what is
    a mean over the images of a class. Deviations of norms divide by C. All are None unless class means differ.
    """
    means, counts = class_means(features, targets, len(weight))
    present = counts > 0
    centred, number = means[present] - means[present].mean(dim=0), int(present.sum())
    names = ('NC1: within over between variation', 'NC2: variation of the norms', 'NC2: deviation from equal angles',
             'NC3: weights from means')
    norms, total = torch.linalg.vector_norm(centred, dim=1), torch.linalg.matrix_norm(centred)
    if total <= 1e-12 * torch.linalg.matrix_norm(means):
        return dict.fromkeys(names)
    # With centred = U S V^T: pinv(S_B) = C V S^-2 V^T, so that no matrix (F, F) is needed.
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = values > values[0] * math.sqrt(max(centred.shape) * torch.finfo(torch.float64).eps)
    scaled = axes[kept] / values[kept, None]
    within = by_rows(lambda x, y: ((x - means[y]) @ scaled.T).square().sum(dim=1) / counts[y], features, targets)
    units = unit_rows(centred)
    cosine = (units @ units.T)[~torch.eye(number, dtype=torch.bool)]
    own = weight.double()[present]
    own = own / torch.linalg.matrix_norm(own).clamp(min=torch.finfo(torch.float64).tiny)
    return dict(zip(names, (within.sum().item() / number, (norms.std(correction=0) / norms.mean()).item(),
                            (cosine + 1 / (number - 1)).abs().mean().item(),
                            (own - centred / total).square().sum().item())))


# Calibration

def mean_loss(logits, targets, temperature=1.0):
    """The mean cross-entropy of logits / temperature."""
    return by_rows(lambda z, y: F.cross_entropy(z / temperature, y, reduction='none'), logits, targets).mean().item()


def best_temperature(logits, targets, least=0.01, most=100.0):
    """The T between `least` and `most` whose mean_loss is the lowest (Guo et al., arXiv 1706.04599, section 4.2).

    The loss is convex in 1 / T, so it has one valley. If all predictions are right it falls towards `least`.
    """
    found = minimize_scalar(lambda log: mean_loss(logits, targets, math.exp(log)), method='bounded',
                            bounds=(math.log(least), math.log(most)), options={'xatol': 1e-6})
    return math.exp(found.x)
