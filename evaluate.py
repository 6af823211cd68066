"""What a checkpoint of cifar.py can do: loss and accuracy, the accuracy of each class, calibration, and what it confuses.

    python evaluate.py checkpoints/cifar10-resnet20/model_best.pth.tar

The checkpoint knows its network and its data. The confusion matrix is written beside it.
"""
import os

import torch

from cifar import in_words, input_transform, load_split, make_parser, test
from models import cifar as models
from utils import checkpoint, conditions, data, device as devices, methods, metrics
from utils.arguments import Parser, number
from utils.errors import run


def parse_arguments():
    """(flags of this script, the checkpoint, the flags of its run with those of this script in their place)."""
    parser = Parser(prog='evaluate.py', usage='python evaluate.py FILE [flags]', description=__doc__.split('\n')[0])
    parser.add_argument('file', metavar='FILE', help='a checkpoint')
    parser.add_argument('--mode', choices=('test', 'train', 'val'), default='test',
                        help='which images: train and val are those of the run, without augmentation (test)')
    parser.add_argument('-o', '--out', metavar='DIR', help='where the confusion matrix goes (beside the checkpoint)')
    parser.add_argument('-d', '--dataset', choices=data.DATASETS, metavar='NAME', help='(that of the run)')
    parser.add_argument('--data', metavar='DIR', help='(that of the run)')
    parser.add_argument('-j', '--workers', type=number(int, 1), metavar='N', help='(that of the run)')
    parser.add_argument('-b', '--test-batch', type=number(int, 1), metavar='N', help='(that of the run)')
    parser.add_argument('--precision', choices=('fp32', 'bf16'), help='(that of the run)')
    parser.add_argument('--gpu-id', metavar='ID', help='the CUDA device to use, as in CUDA_VISIBLE_DEVICES (0)')
    args = parser.parse_args()
    state = checkpoint.read(args.file)
    asked = make_parser().parse_args([], defaults=state['args'])
    for name in args.given - {'file', 'mode', 'out'}:
        setattr(asked, name, getattr(args, name))
    if args.mode == 'val' and not asked.val_split:
        parser.error(f'--mode val needs a run with --val-split, and {args.file} is of one without')
    if 'data' in args.given and asked.dataset == 'digits':
        parser.error('--data is not used by --dataset digits, which scikit-learn brings along')
    asked.resume, asked.network = args.file, {name: value for name, value in state['network'].items() if name in models.OPTION_FLAGS}
    return args, state, asked


def main():
    args, state, asked = parse_arguments()
    device = devices.set_up(asked)
    model = models.build(asked.arch, len(state['classes']), methods.build_head(asked), **asked.network)
    checkpoint.load_model(model, state, state['network'], args.file)
    model.to(device, memory_format=torch.channels_last)

    split = load_split(asked, 'test' if args.mode == 'test' else 'train', state['classes'])
    if args.mode != 'test':
        train, val = conditions.apply(asked, split)
        split = train if args.mode == 'train' else val
    batches = data.Batches(split, state['mean'], state['std'], asked.test_batch, device,
                           transform=input_transform(asked, model).get('eval'), workers=asked.workers)
    predictions = metrics.Predictions(len(batches), batches.num_classes, device)
    measured = test(batches, model, asked, predictions)
    by_class, confusion = metrics.of_classes(*predictions.gathered())

    print(f'{args.file}, of epoch {state["epoch"]} | {in_words(args.mode, measured)}')
    print(metrics.in_words(state['classes'], by_class))
    folder = os.path.dirname(args.file) if args.out is None else args.out
    if args.out:
        os.makedirs(args.out, exist_ok=True)
    stem = os.path.join(folder, f'{os.path.basename(args.file).split(".")[0]}-{args.mode}-confusion')
    metrics.write_confusion(confusion, state['classes'], f'{stem}.csv', f'{stem}.png')
    print(f'confusion    {stem}.csv  {stem}.png')


if __name__ == '__main__':
    run(main)
