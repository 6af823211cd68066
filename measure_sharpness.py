"""Numbers for how sharp the minimum is that a checkpoint lies in.

    python measure_sharpness.py FILE [FILE ...]                         Keskar's sharpness of each
    python measure_sharpness.py FILE [FILE ...] --all --images 5000     everything below, on 5000 training images

L is the mean cross-entropy in evaluation, w the weights as one vector of P numbers, w_t those of one parameter tensor.

    --box          100 (max L(w + z) - L(w)) / (1 + L(w)) percent, over |z_i| <= epsilon (|w_i| + 1): Keskar et al.,
                   ICLR 2017 (arXiv 1609.04836), equation 4, by their search, bounded L-BFGS, and by steps from corner
                   to corner.
                   --manifolds N: over z = A y with |y_i| <= epsilon (|(A^+ w)_i| + 1), for a random P x N matrix A
    --ball         max L(w + z) - L(w), over |z_t|_2 <= epsilon for every tensor t: the ball of AMP (arXiv 2010.04925)
    --noise        mean L(w + z) - L(w), over SmoothOut's noise z (arXiv 1805.07898)
    --eigenvalues  the largest of the Hessian of L
    --trace        of the Hessian, by Hutchinson's estimate (Communications in Statistics 18, 1989)

A maximum is the best that its search found, so it is a lower bound. Each measurement is added to FILE-sharpness.json
beside the checkpoint, with all its settings, and is not made again when it is there.
"""
import math

import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import torch
import torch.nn.functional as F

import smoothout
from utils import memory, metrics
from utils.batches import seeded_generator
from utils.errors import Stopped, UserError
from utils.flags import Parser, bounded
from utils.lab import checkpoints, entries
from utils.script import run_script


def box(landscape, seed, box_epsilon, box_iterations, manifolds, times):
    """Keskar's sharpness by his search; in the whole space also by steps from corner to corner of the box, which often
    find more.

    With `manifolds`, that many dimensions, the mean and deviation over `times` random manifolds.
    """
    if not manifolds:
        reach = box_epsilon * (landscape.weights.abs() + 1)
        before, rises = climb(landscape, lambda gradient: reach * gradient.sign(), torch.zeros_like(reach),
                              box_iterations)
        corner = {'sharpness': 100 * highest(rises) / (1 + before), 'each step': rises}
        return {**box_sharpness(landscape, box_epsilon, box_iterations), 'corners': corner}
    if manifolds > len(landscape.weights):
        raise UserError(f'--manifolds must be at most the number of parameters, {len(landscape.weights)}, was given '
                        f'{manifolds}')
    memory.check(2 * 4 * manifolds * len(landscape.weights), f'{manifolds} directions of {len(landscape.weights)} '
                 'weights', '--manifolds')
    each = []
    for index in range(times):
        rows = torch.randn(manifolds, len(landscape.weights), generator=seeded_generator(seed, index))
        each.append(box_sharpness(landscape, box_epsilon, box_iterations, rows.to(landscape.weights)))
    mean, deviation = metrics.spread([one['sharpness'] for one in each])
    return {'sharpness': mean, 'deviation': deviation, 'each': each}


def box_sharpness(landscape, epsilon=1e-3, iterations=10, manifold=None):
    """By `iterations` of bounded L-BFGS from w. A dict: 'sharpness' in percent, 'loss', 'worst loss', and how the
    search went.

    manifold: (N, P), the rows of A^+ before each is divided by its length; None is the whole space. The search is in
    float64, the loss in the precision of the landscape.
    """
    w = landscape.weights
    if manifold is None:
        start, reach = w, epsilon * (w.double().abs() + 1)
        to_weights, to_variables = lambda y: y, lambda gradient: gradient
    else:
        rows = F.normalize(manifold, dim=1)
        inverse = torch.linalg.inv((rows @ rows.T).double()).to(w)  # A = rows^T inverse
        start, reach = w.new_zeros(len(rows)), epsilon * ((rows @ w).double().abs() + 1)
        to_weights, to_variables = lambda y: w + rows.T @ (inverse @ y), lambda gradient: inverse @ (rows @ gradient)

    def minus_loss(y):
        loss, gradient = landscape.loss_and_gradient(to_weights(torch.from_numpy(y).to(w)))
        return -loss.item(), -to_variables(gradient).double().cpu().numpy()  # both of -L, as SciPy looks for a minimum

    start, reach = start.double().cpu().numpy(), reach.cpu().numpy()
    before = -minus_loss(start)[0]
    # SciPy's own tolerances would end the search at its start where a network fits its images and all slopes are small.
    found = scipy.optimize.minimize(minus_loss, start, jac=True, method='L-BFGS-B',
                                    bounds=np.stack((start - reach, start + reach), axis=1),
                                    options={'maxiter': iterations, 'gtol': 0.0, 'ftol': 0.0})
    return {'sharpness': 100 * (-found.fun - before) / (1 + before), 'loss': before, 'worst loss': -float(found.fun),
            'iterations': found.nit, 'gradients': found.nfev + 1, 'ended': str(found.message)}


def ball(landscape, seed, ball_epsilon, ball_steps):
    """The largest rise of the loss; each step is AMP's inner step, at a length that takes every tensor to its radius.
    """
    def at_radius(vector):
        # In float64: the squares of the small slopes at a good minimum vanish in float32.
        pieces = [F.normalize(piece.flatten().double(), dim=0, eps=1e-300)
                  for piece in landscape.tensors(vector).values()]
        return ball_epsilon * torch.cat(pieces).to(vector)

    # The first begins beside w, as a gradient of exactly zero has no direction.
    beside = 1e-3 * at_radius(torch.randn(len(landscape.weights),
                                          generator=seeded_generator(seed)).to(landscape.weights))
    _, rises = climb(landscape, at_radius, beside, ball_steps)
    return {'rise': highest(rises), 'each step': rises}


def climb(landscape, to_edge, z, steps):
    """(L(w), [L(w + z) - L(w) after each step]): every step goes to where a linear loss would be highest.

    to_edge: gradient -> that point of the set of all z. z: where it begins.
    """
    before, rises = landscape.measure()['Loss'], []
    for _ in range(steps):
        z = to_edge(landscape.loss_and_gradient(landscape.weights + z)[1])
        rises.append(landscape.measure(landscape.weights + z)['Loss'] - before)
    return before, rises


def highest(rises):
    """At least 0, the rise of not moving; NaN if one is."""
    return float(np.max([0.0, *rises]))


def noise(landscape, seed, ss, noise_type, adapt_type, perturb_batch_norm, draws):
    """The mean rise of the loss over `draws` draws, and its standard deviation."""
    before, rises, generator = landscape.measure()['Loss'], [], seeded_generator(seed, device=landscape.weights.device)
    for _ in range(draws):
        z = ss * landscape.noise(generator, noise_type, adapt_type, perturb_batch_norm)
        rises.append(landscape.measure(landscape.weights + z)['Loss'] - before)
    mean, deviation = metrics.spread(rises)
    return {'rise': mean, 'deviation': deviation}


def eigenvalues(landscape, seed, eigenvalue_count, eigenvalue_tolerance):
    """The `eigenvalue_count` largest, in descending order, from products of the Hessian with vectors (ARPACK's Lanczos
    method).

    Unlike power iteration it finds those that are largest with their sign, and several from the same products.
    """
    size, products = len(landscape.weights), 0
    if eigenvalue_count >= size:
        raise UserError(f'--eigenvalue-count must be less than the number of parameters, {size}, was given '
                        f'{eigenvalue_count}')

    def product(vector):
        nonlocal products
        products += 1
        vector = torch.from_numpy(vector).flatten().to(landscape.weights)
        return landscape.hessian_product(vector).double().cpu().numpy()

    hessian = scipy.sparse.linalg.LinearOperator((size, size), product, dtype=np.float64)
    start = torch.randn(size, generator=seeded_generator(seed)).double().numpy()
    try:
        values = scipy.sparse.linalg.eigsh(hessian, eigenvalue_count, which='LA', v0=start, tol=eigenvalue_tolerance,
                                           return_eigenvectors=False)
    except scipy.sparse.linalg.ArpackError as error:  # a Hessian with NaN, or one that it does not get done with
        raise UserError(f'the eigenvalues were not found after {products} products with the Hessian '
                        f'({" ".join(str(error).split())}); '
                        'try a larger --eigenvalue-tolerance') from error
    return {'largest': sorted(values.tolist(), reverse=True), 'products': products}


def trace(landscape, seed, probes):
    """The mean of v.Hv over `probes` random vectors v of signs, and its standard error."""
    generator, values = seeded_generator(seed), []
    for _ in range(probes):
        v = (2 * torch.randint(2, (len(landscape.weights),), generator=generator) - 1).to(landscape.weights)
        values.append((v.double() @ landscape.hessian_product(v).double()).item())
    mean, deviation = metrics.spread(values)
    return {'trace': mean, 'standard error': None if deviation is None else deviation / math.sqrt(probes)}


def loss(landscape, seed):
    return landscape.measure()


# A measure -> its function, and the flags that are its further arguments. The first is always made.
MEASURES = {
    'loss': (loss, ()),
    'box': (box, ('box_epsilon', 'box_iterations', 'manifolds', 'times')),
    'ball': (ball, ('ball_epsilon', 'ball_steps')),
    'noise': (noise, ('ss', 'noise_type', 'adapt_type', 'perturb_batch_norm', 'draws')),
    'eigenvalues': (eigenvalues, ('eigenvalue_count', 'eigenvalue_tolerance')),
    'trace': (trace, ('probes',)),
}


def parse_arguments():
    """(flags, with the chosen `measures`; the checkpoints)."""
    parser = Parser(prog='measure_sharpness.py', usage='python measure_sharpness.py FILE [FILE ...] [flags]',
                    description='Numbers for how sharp the minimum is that a checkpoint lies in.')
    checkpoints.add_arguments(parser, modes=None, default_modes='train', precision='fp32')
    group = parser.add_argument_group('what is measured')
    group.add_argument('--all', action='store_true', help='all of these')
    group.add_argument('--box', action='store_true', help="Keskar's sharpness, which is also measured if nothing is "
                                                          "named")
    group.add_argument('--box-epsilon', type=bounded(float, 0, above=True), default=1e-3, metavar='E', help='(0.001)')
    group.add_argument('--box-iterations', type=bounded(int, 1), default=10, metavar='N', help='of each search (10)')
    group.add_argument('--manifolds', type=bounded(int, 1), metavar='N',
                       help='in a random manifold of N dimensions (the whole space)')
    group.add_argument('--times', type=bounded(int, 1), default=1, metavar='K',
                       help='in K manifolds, their mean and deviation (1)')
    group.add_argument('--ball', action='store_true', help="the worst rise of the loss in AMP's ball")
    group.add_argument('--ball-epsilon', type=bounded(float, 0, above=True), default=0.5, metavar='E',
                       help='its radius (0.5)')
    group.add_argument('--ball-steps', type=bounded(int, 1), default=10, metavar='N', help='of the search (10)')
    group.add_argument('--noise', action='store_true', help="the mean rise of the loss under SmoothOut's noise")
    smoothout.add_noise_arguments(group, kind=bounded(float, 0))
    group.add_argument('--draws', type=bounded(int, 1), default=10, metavar='K', help='of the noise (10)')
    group.add_argument('--eigenvalues', action='store_true', help='the largest of the Hessian')
    group.add_argument('--eigenvalue-count', type=bounded(int, 1), default=1, metavar='K', help='how many (1)')
    group.add_argument('--eigenvalue-tolerance', type=bounded(float, 0), default=1e-3, metavar='T',
                       help='relative (0.001)')
    group.add_argument('--trace', action='store_true', help='the trace of the Hessian')
    group.add_argument('--probes', type=bounded(int, 1), default=10, metavar='K', help='random vectors (10)')
    args = parser.parse_args()
    chosen = [name for name in MEASURES if name != 'loss' and (args.all or getattr(args, name))]
    args.measures = ['loss', *(chosen or ['box'])]
    entries.check_arguments(args, parser, MEASURES)
    if args.times > 1 and not args.manifolds:
        parser.error('--times repeats the draw of a random manifold, so it needs --manifolds; in the whole space '
                     'there is '
                     'nothing random to repeat')
    return args, [checkpoints.open_checkpoint(path, args, parser) for path in checkpoints.files_of(args, parser)]


def main():
    args, subjects = parse_arguments()
    checkpoints.check_alike(subjects)
    torch.backends.cudnn.allow_tf32 = False  # differences of losses need all digits of fp32
    paths = [f'{checkpoints.stem(args, subject.path)}-sharpness.json' for subject in subjects]
    for path in paths:
        entries.read(path, cells)
    names, rows, numbers = checkpoints.names_of([subject.path for subject in subjects]), [], []
    try:
        for name, subject, path, (batches, images) in zip(names, subjects, paths,
                                                          checkpoints.images_of_each(subjects, args.mode, args)):
            numbers.append(images['number'])
            settings = {'checkpoint': checkpoints.description(subject), 'images': images, 'precision': args.precision,
                        'seed': args.seed}
            rows.append([name])
            for measure in args.measures:
                arguments = checkpoints.landscape(subject, batches), args.seed
                entry = entries.measured(measure, MEASURES, args, settings, arguments, path, cells, subject.device)
                rows[-1] += cells(measure, entry['result'])
                print(f'{name} | {measure} {" ".join(cells(measure, entry["result"]))} | {entry["seconds"]:.1f} '
                      's', flush=True)
    except Stopped as stop:
        stop.sentence = 'Stopped; what was measured is kept, and the same command goes on.'
        raise
    print_table(args, numbers, rows)
    print('\ntables', *paths)


def cells(measure, result):
    """The numbers of a measurement, a list with a text for each column of the table."""
    if measure == 'loss':
        return [f'{result["Loss"]:.4g}', f'{result["Top-1"]:.2f}']
    if measure == 'eigenvalues':
        return [', '.join(f'{value:.4g}' for value in result['largest'])]
    mean = {'box': 'sharpness', 'ball': 'rise', 'noise': 'rise', 'trace': 'trace'}[measure]
    corners = [f'{result["corners"]["sharpness"]:.4g}'] if 'corners' in result else []
    return [metrics.plus_minus(result[mean], result.get('deviation', result.get('standard error')), '.4g'), *corners]


def print_table(args, numbers, rows):
    space = f', {args.manifolds} of P dimensions (%)' if args.manifolds else ' (%) | its corners (%)'
    heads = {'loss': f'{args.mode} loss | top-1 (%)', 'box': f'box {args.box_epsilon:g}{space}',
             'ball': f'ball {args.ball_epsilon:g}',
             'noise': f'noise {args.ss:g}', 'eigenvalues': 'largest eigenvalues' if args.eigenvalue_count > 1
             else 'largest eigenvalue',
             'trace': 'trace'}
    columns = 1 + sum(heads[name].count('|') + 1 for name in args.measures)
    print(f'\n| {" | ".join(["checkpoint", *(heads[name] for name in args.measures)])} |', '| --- ' * columns + '|',
          sep='\n')
    for row in rows:
        print(f'| {" | ".join(row)} |')
    print(f'\n{checkpoints.how_many(numbers)} {args.mode} images, {args.precision}. +- is the standard deviation '
          'over draws, of the trace the standard error.')


if __name__ == '__main__':
    run_script(main)
