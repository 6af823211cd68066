"""Numbers for how far apart a checkpoint keeps the classes: angles, margins, distances, collapse, calibration.

    python measure_margins.py FILE [FILE ...]                       angles and margins of each, on the test images
    python measure_margins.py FILE [FILE ...] --all --images 500    everything below, on 500 of them

x are the features, which go into the head, w_j the class weights, p the probabilities, y the target.

    --angles       in degrees: of x to the nearest class weight, which DMA lowers, to w_y, and to the mean of its class;
                   margin: of x to the nearest other class weight, minus that to w_y; between class means, and between
                   class weights. Biases do not count. A vector of zeros is at 90 degrees to every vector.
    --margins      logit of y minus that of the best other class, and the same of probabilities. --spectral: that of
                   logits, divided by the product of the spectral norms of the layers (Bartlett et al., arXiv
                   1706.08498, without their factor of distances). A convolution counts as its weight reshaped to a
                   matrix, BatchNorm as max |gamma| / sqrt(var + eps), any other layer as 1, a shortcut as one more
                   layer, and the head as its raw weight, also if it normalises it. So compare networks of one shape.
    --distances    to first order, from the image and from --layers to the decision boundary, in the norms 1, 2 and inf,
                   as large_margin.py computes it: below 0 if the image is wrong, and from probabilities, so that it
                   grows exponentially with the logit margin: its median says more than its mean. From the image also
                   the length of a perturbation that changes the prediction, in the norms 2 and inf: by DeepFool (arXiv
                   1511.04599), and that shortened by PGD (arXiv 1706.06083) and bisection. These are upper bounds, and
                   0 for wrong images. Images are as the network gets them, normalised, which is the unit; perturbed
                   ones need not be colours.
    --collapse     NC1, NC2 and NC3 of neural collapse (arXiv 2008.08186), which is about the training images: give
                   --mode train --no-augment
    --calibration  loss (NLL) and calibration error (ECE), and both after the logits are divided by the temperature T
                   (arXiv 1706.04599) that is best on the run's validation images, which it needs (--val-split)

Of what each image has, the mean, the standard deviation, the 5% quantile and the median over the images. Each
measurement is added to FILE-margins.json beside the checkpoint, with all its settings, and is not made again when it is
there.
"""
import math

import torch

from utils import metrics
from utils.errors import Stopped, UserError
from utils.flags import Parser, bounded
from utils.lab import checkpoints, entries, margins as lab
from utils.lab.view import View
from utils.script import run_script

NEED_WEIGHT = '--angles and --collapse need'


def angles(view):
    features, _, targets = view.outputs
    return lab.angles(features, targets, view.weight(NEED_WEIGHT))


def margins(view, spectral):
    _, logits, targets = view.outputs
    of_logits, of_probabilities = lab.margins(logits, targets)
    result = {'top-1 (%)': 100 * (logits.argmax(dim=1) == targets).double().mean().item(),
              'logit margin': lab.summary(of_logits), 'probability margin': lab.summary(of_probabilities)}
    if spectral:
        product = lab.log_spectral_product(view.model)
        defined = product > -math.inf  # not of a layer of zeros
        result['spectrally normalised margin'] = lab.summary(of_logits * math.exp(-product)) if defined else None
        result['log10 of the product of norms'] = product / math.log(10) if defined else None
    return result


def distances(view, layers, top_k, pgd_steps, bisections):
    found, top_k = {}, min(top_k, view.model.num_classes - 1)
    view.outputs  # refused if it is NaN
    for inputs, targets in view.batches:
        inputs = inputs.to(view.dtype)
        of_batch = {f'first-order distance at {name}, norm {norm}': d for (name, norm), d
                    in view.first_order(inputs, targets, top_k).items()}
        for norm in ('2', 'inf'):
            by_deepfool = lab.deepfool(view.network, inputs, targets, norm, top_k)
            by_pgd = lab.pgd(view.network, inputs, targets, norm, by_deepfool, pgd_steps, bisections)
            of_batch[f'upper bound by DeepFool, norm {norm}'] = by_deepfool
            of_batch[f'upper bound by PGD, norm {norm}'] = by_pgd
        for name, values in of_batch.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: lab.summary(torch.cat(parts)) for name, parts in found.items()}


def collapse(view):
    features, _, targets = view.outputs
    return lab.collapse(features, targets, view.weight(NEED_WEIGHT))


def calibration(view):
    _, logits, targets = view.outputs
    _, *held_out = view.outputs_on(view.validation)
    temperature = lab.best_temperature(*held_out)

    def numbers(temperature):
        probabilities = (logits / temperature).softmax(dim=1).numpy()
        return (lab.mean_loss(logits, targets, temperature),
                100 * metrics.calibration_error(probabilities, targets.numpy()))

    names = 'loss (NLL)', 'calibration error (%)', 'temperature', 'loss after it', 'calibration error after it (%)'
    return dict(zip(names, (*numbers(1.0), temperature, *numbers(temperature))))


# A measure -> its function, and the flags that are its further arguments.
MEASURES = {
    'angles': (angles, ()),
    'margins': (margins, ('spectral',)),
    'distances': (distances, ('layers', 'top_k', 'pgd_steps', 'bisections')),
    'collapse': (collapse, ()),
    'calibration': (calibration, ()),
}


def parse_arguments():
    """(flags, with the chosen `measures`; the checkpoints)."""
    parser = Parser(prog='measure_margins.py', usage='python measure_margins.py FILE [FILE ...] [flags]',
                    description='Numbers for how far apart a checkpoint keeps the classes.')
    checkpoints.add_arguments(parser, modes=None, default_modes='test', precision='fp32')
    group = parser.add_argument_group('what is measured')
    group.add_argument('--all', action='store_true', help='all of these; calibration only where it is possible')
    group.add_argument('--angles', action='store_true', help='between features, class weights and class means; '
                                                             'measured with margins if nothing is named')
    group.add_argument('--margins', action='store_true', help='of logits and of probabilities')
    group.add_argument('--spectral', action='store_true', help='also divided by the spectral norms of the layers')
    group.add_argument('--distances', action='store_true', help='to the decision boundary')
    group.add_argument('--layers', nargs='+', default=['input'], metavar='NAME',
                       help='of the first-order distance: modules, features, or input (input)')
    group.add_argument('--top-k', type=bounded(int, 1), default=9, metavar='K',
                       help='other classes whose boundaries count, the most probable (9)')
    group.add_argument('--pgd-steps', type=bounded(int, 1), default=20, metavar='N', help='at each radius (20)')
    group.add_argument('--bisections', type=bounded(int, 1), default=8, metavar='N', help='of the radius of PGD (8)')
    group.add_argument('--collapse', action='store_true', help='neural collapse: NC1, NC2, NC3')
    group.add_argument('--calibration', action='store_true', help='before and after temperature scaling')
    args = parser.parse_args()
    chosen = [name for name in MEASURES if args.all or getattr(args, name)]
    args.measures, args.spectral = chosen or ['angles', 'margins'], args.spectral or args.all
    entries.check_arguments(args, parser, MEASURES)
    subjects = [checkpoints.open_checkpoint(path, args, parser) for path in checkpoints.files_of(args, parser)]
    why = why_no_calibration(args, subjects) if 'calibration' in args.measures else None
    if why and args.calibration:
        parser.error(why)
    if why:
        args.measures.remove('calibration')
        print(f'left out: {why}')
    return args, subjects


def why_no_calibration(args, subjects):
    """One sentence, or None."""
    if args.mode == 'val':
        return '--calibration finds the temperature on the validation images, so it needs --mode test or train'
    without = [one.path for one in subjects if not getattr(one.args, 'val_split', None)]
    if without:
        return (f'--calibration finds the temperature on validation images, so it needs runs with --val-split, and '
                f'{without[0]} is of one without')
    return None


def main():
    args, subjects = parse_arguments()
    checkpoints.check_alike(subjects)
    torch.backends.cudnn.allow_tf32 = False  # small distances need all digits of fp32
    paths = [f'{checkpoints.stem(args, subject.path)}-margins.json' for subject in subjects]
    views = [View(subject, args.layers) for subject in subjects]
    for view, path in zip(views, paths):
        entries.read(path, cells)
        if view.model.num_classes < 2:
            raise UserError(f'{view.subject.path} knows one class, and a margin is between two')
        if {'angles', 'collapse'} & set(args.measures):
            view.weight(NEED_WEIGHT)
    names, columns, numbers = checkpoints.names_of([subject.path for subject in subjects]), [], []
    try:
        for name, view, path, (batches, images) in zip(names, views, paths,
                                                       checkpoints.images_of_each(subjects, args.mode, args)):
            view.batches = batches
            numbers.append(images['number'])
            columns.append(column_of(args, view, name, images, path))
            view.__dict__.pop('outputs', None)  # those of one checkpoint at a time
    except Stopped as stop:
        stop.sentence = 'Stopped; what was measured is kept, and the same command goes on.'
        raise
    print_table(args, numbers, names, columns)
    print('\ntables', *paths)


def column_of(args, view, name, images, path):
    """The numbers of a checkpoint, {what it is: text}."""
    column = {}
    for measure in args.measures:
        settings = {'checkpoint': checkpoints.description(view.subject), 'images': images, 'precision': args.precision}
        if measure == 'calibration':
            view.validation = checkpoints.images_of(view.subject, 'val', args)
            settings['validation'] = checkpoints.describe_images(view.validation)
        entry = entries.measured(measure, MEASURES, args, settings, (view,), path, cells, view.subject.device)
        column |= cells(measure, entry['result'])
        print(f'{name} | {measure} | {entry["seconds"]:.1f} s', flush=True)
    return column


def cells(measure, result):
    """{what is measured: text} of a measurement."""
    return {what: text(value) for what, value in result.items()}


def text(value):
    if not isinstance(value, dict):
        return '-' if value is None else f'{value:.4g}'
    missing = f', {value["not found"]} not found' if 'not found' in value else ''
    if value['mean'] is None:
        return '-' + missing
    spread = metrics.plus_minus(value['mean'], value['deviation'], '.4g')
    return f'{spread} ({value["5%"]:.4g}, {value["median"]:.4g}){missing}'


def print_table(args, numbers, names, columns):
    print(f'\n| {" | ".join(["", *names])} |', '| --- ' * (1 + len(names)) + '|', sep='\n')
    for what in dict.fromkeys(what for column in columns for what in column):
        print(f'| {" | ".join([what, *(column[what] for column in columns)])} |')
    print(f'\n{checkpoints.how_many(numbers)} {args.mode} images, {args.precision}. +- is the standard deviation over '
          'images, in brackets are the 5% quantile and the median. Angles are in degrees, distances in units of the '
          'normalised images.')


if __name__ == '__main__':
    run_script(main)
