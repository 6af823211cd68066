"""What a checkpoint can do: loss and accuracy, by class too, calibration; under noise on its weights; under attack.

    python evaluate.py checkpoints/cifar10-resnet20/model_best.pth.tar
    python evaluate.py checkpoints/cifar10-resnet20/model_best.pth.tar --ss 0.01 --draws 10
    python evaluate.py checkpoints/cifar10-resnet20/model_best.pth.tar --attack pgd --attack-eps 8/255
    python evaluate.py checkpoints/plain/checkpoint.pth.tar --logit-adjust 1 --as-run checkpoints/adjusted
    python compare.py checkpoints/plain checkpoints/adjusted --baseline "(none)"

The checkpoint knows its network and its data. The confusion matrix is written beside it, under a name of its own for a
test with other flags than the run's.
"""
import os
import re

import torch

import smoothout
from baselines.logit_adjustment import adjusted
from utils import datasets, metrics
from utils.bar import ProgressLine
from utils.batches import input_transform, seeded_generator
from utils.device import environment
from utils.errors import UserError
from utils.eval import logits_of, metrics_line
from utils.flags import Parser, bounded, file_path, pixels
from utils.lab import as_run, checkpoints
from utils.lab.attack import Attack
from utils.script import run_script

ON_OTHERS = ('dataset', 'data', 'images', 'no_augment', 'precision')  # of other images, or otherwise
OF_THE_RUN = ('mode', *ON_OTHERS, 'ss', 'attack')  # not with --as-run
NEEDING = {'ss': ('draws', 'noise_type', 'adapt_type', 'perturb_batch_norm'), 'attack': ('attack_eps', 'attack_steps')}


def parse_arguments():
    parser = Parser(prog='evaluate.py', usage='python evaluate.py FILE [flags]',
                    description='What a checkpoint can do: loss and accuracy, by class too, calibration; under noise '
                    'on its weights; under attack.')
    checkpoints.add_arguments(parser, modes=None, default_modes='test')
    group = parser.add_argument_group('under noise on the weights, when --ss is given')
    smoothout.add_noise_arguments(group, ss=None, kind=bounded(float, 0))
    group.add_argument('--draws', type=bounded(int, 1), default=10, metavar='K', help='how often noise is drawn (10)')
    group = parser.add_argument_group('under attack')
    group.add_argument('--attack', choices=('fgsm', 'pgd'), help='on the images, each pixel by at most --attack-eps')
    group.add_argument('--attack-eps', type=pixels, default=8 / 255, metavar='E',
                       help='with white - black = 1 (8/255)')
    group.add_argument('--attack-steps', type=bounded(int, 1), default=10, metavar='N',
                       help='of pgd, 2.5 eps / N each (10)')
    parser.add_argument('--logit-adjust', type=bounded(float, 0, 1000, above=True), metavar='TAU',
                        help='subtract TAU log prior from each logit, with the class counts of the training set: for a '
                             'checkpoint that was trained on other shares of the classes than it is tested on')
    parser.add_argument('--tta', choices=('mirror', 'none'),
                        help='mirror: the mean of the logits of each image and of its mirror image (as in the run)')
    parser.add_argument('--as-run', type=file_path, metavar='DIR',
                        help='write the result into DIR too, as a run for compare.py: trained as this one, and tested '
                             'with --logit-adjust or another --tta')
    args = parser.parse_args()
    for flag in OF_THE_RUN if args.as_run else ():
        if flag in args.given:
            parser.error(f'--as-run and {parser.spelling(flag)} exclude each other: it is of the test images of '
                         'the run, in its precision')
    for name, flags in NEEDING.items():
        for flag in flags if getattr(args, name) is None else ():
            if flag in args.given:
                parser.error(f'--{flag.replace("_", "-")} is not used without --{name}')
    if args.attack == 'fgsm' and 'attack_steps' in args.given:
        parser.error('--attack-steps belongs to --attack pgd; fgsm makes one step')
    path, = checkpoints.files_of(args, parser, at_most=1)
    return args, checkpoints.open_checkpoint(path, args, parser)


def main():
    args, subject = parse_arguments()
    if args.attack and input_transform(subject.args, subject.model):
        raise UserError(f'--attack needs to know the pixels, and {subject.path} has a model that transforms its '
                        'images itself; '
                        'give --no-augment to evaluate it on the images as they are')
    tta = {None: subject.args.tta, 'mirror': 'mirror', 'none': None}[args.tta]
    if tta and not datasets.may_be_mirrored(dataset := getattr(subject.args, 'dataset', 'folder')):
        raise UserError(f'--tta mirror is not for --dataset {dataset}, whose mirrored images mean something else')
    if args.as_run:
        adjusted_by = {'logit_adjust': args.logit_adjust} if args.logit_adjust else {}
        files = as_run.read(subject, {'tta': tta, **adjusted_by}, args.as_run)
    batches = checkpoints.images_of(subject, args.mode, args)
    landscape = checkpoints.landscape(subject, batches)
    landscape.tta = tta
    if args.logit_adjust:
        landscape.adjust = logit_adjustment(subject, args.logit_adjust)
    predictions = metrics.Predictions(len(batches), batches.num_classes, subject.device)
    with ProgressLine(args.mode, len(batches)) as bar:
        measured = landscape.measure(meter=predictions, bar=bar)
    probabilities, targets = predictions.of_all_images()
    by_class, confusion = metrics.of_classes(probabilities, targets)
    how = tested_how(args)
    words = ''.join(f' | {name.replace("-", " ")} {value}'.rstrip() for name, value in how.items())
    print(f'{subject.path}, of epoch {subject.state["epoch"]}{words} | {metrics_line(args.mode, measured)}')
    print(metrics.class_report(subject.state['classes'], by_class, at_most=len(by_class['class accuracy'])))
    if args.ss is not None:
        print(f'under noise  {under_noise(landscape, args)}', flush=True)
    if args.attack:
        print(f'under attack {under_attack(landscape, args)}', flush=True)

    named = re.sub(r'[^\w.+-]+', '-', ''.join(f'-{name}-{value}'.rstrip('-') for name, value in how.items()))
    stem = f'{checkpoints.stem(args, subject.path)}-{args.mode}{named}-confusion'
    os.makedirs(os.path.dirname(stem) or '.', exist_ok=True)
    metrics.write_confusion(confusion, subject.state['classes'], f'{stem}.csv', f'{stem}.png')
    print(f'confusion    {stem}.csv  {stem}.png')
    if args.as_run:
        as_run.write(args.as_run, files, measured, by_class, len(targets), environment(subject.device))
        print(f'as a run     {args.as_run}')


def tested_how(args):
    """Flag -> value, of those that make the test another than the run's, for its line and the names of its files."""
    names = [name for name in (*ON_OTHERS, 'seed', 'tta', 'logit_adjust') if name in args.given]
    given = {name.replace('_', '-'): getattr(args, name) for name in names}
    return {name: '' if value is True else f'{value:g}' if isinstance(value, float) else os.path.basename(str(value))
            for name, value in given.items()}


def logit_adjustment(subject, tau):
    """A function outputs -> logits that are adjusted post hoc, see baselines/logit_adjustment.py."""
    if 'logit_adjustment' in subject.args.method:
        raise UserError(f'--logit-adjust would adjust twice, as {subject.path} was trained with --method '
                        'logit_adjustment, which predicts with the logits as they are')
    counts = subject.script.load_part(subject.args, subject.state, 'train').class_counts()
    try:
        adjusted(torch.zeros(1, len(counts)), counts, tau)
    except ValueError as error:  # a class without training images
        raise UserError(f'--logit-adjust: {error}') from error
    if len(set(counts)) == 1:
        raise UserError(f'--logit-adjust changes nothing: all classes of the training set have {counts[0]} images')
    return lambda outputs: adjusted(logits_of(outputs), counts, tau)


def under_noise(landscape, args):
    """Mean and standard deviation of each quantity over --draws draws of noise on the weights."""
    generator, draws = seeded_generator(args.seed, device=landscape.weights.device), []
    with ProgressLine('noise', args.draws, unit='draw') as bar:
        for _ in range(args.draws):
            noise = landscape.noise(generator, args.noise_type, args.adapt_type, args.perturb_batch_norm)
            draws.append(landscape.measure(landscape.weights + args.ss * noise))
            bar.advance(metrics_line('last', draws[-1]))
    spread = {name: metrics.spread([draw[name] for draw in draws]) for name in draws[0]}
    words = [f'{name.lower()} {metrics.plus_minus(*values, ".4f" if name == "Loss" else ".2f")}{"%" * (name != "Loss")}'
             for name, values in spread.items()]
    return ' '.join([f'ss {args.ss:g} {args.noise_type}, adapt {args.adapt_type}, {args.draws} '
                     f'draw{"s" * (args.draws > 1)} |', *words])


def under_attack(landscape, args):
    batches, tensors = landscape.batches, landscape.at()
    generator = seeded_generator(args.seed, device=landscape.weights.device)
    attack = Attack(args.attack, lambda inputs: landscape.outputs(tensors, inputs), args.attack_eps, args.attack_steps,
                    batches.mean, batches.std, generator)
    with ProgressLine('attack', len(batches)) as bar:
        measured = landscape.measure(inputs_of=attack, bar=bar)
    steps = f', {args.attack_steps} steps' if args.attack == 'pgd' else ''
    return f'{args.attack}, eps {255 * args.attack_eps:g}/255{steps} | {metrics_line(args.mode, measured)}'


if __name__ == '__main__':
    run_script(main)
