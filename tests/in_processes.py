"""Trains in double precision, alone or under torchrun, and saves what came out: python in_processes.py OUT, started by
test_distributed.py.

Every run is of one epoch of a small network on random images, without reading any file.
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import center  # noqa: E402
import cifar  # noqa: E402
from models import cifar as models  # noqa: E402
from utils import distributed, folders, methods  # noqa: E402
from utils.batches import Batches, Split, mean_and_std  # noqa: E402
from utils.run import Run, validate  # noqa: E402

methods.METHODS['center'] = center  # a loss term with parameters, and a rate of their own

# 21 images in batches of 8 end with one of 5, whose parts of 2 are 2, 2 and 1; of 18 the last 2 leave the second
# process none.
GHOST = '--train-batch 8 --mini-batch 2 '
RUNS = {
    'plain': '', 'momentum, clipped': '--clip-norm 0.5 --nesterov', 'Adam': '--optimizer Adam --lr 0.001',
    'accumulated': '--batch-multiplier 2', 'smoothed labels': '--label-smoothing 0.1',
    'dma': '--method dma', 'lsoftmax': '--method lsoftmax --margin 2 --beta 5',
    'large_margin': '--method large_margin --clip-norm 1',
    'large_margin, exact': '--method large_margin --exact --top-k 2 --large-margin-layers input layer2 '
                           '--cross-entropy-weight 1 --clip-norm 1',
    'amp': '--method amp --epsilon 0.1',
    'amp of all parameters, twice': '--method amp --epsilon 0.3 --perturbation global --inner-iter 2',
    'amp, every pass counts': '--method amp --epsilon 0.1 --perturbed-statistics',
    'dma amp': '--method dma amp --epsilon 0.1',
    'smoothout': '--method smoothout --ss 0.01', 'smoothout, filters': '--method smoothout --ss 0.1 --adapt-type '
                                                                       'filter --smoothing-type anneal',
    'center': '--method center --center-coef 0.1',
    'lsoftmax center': '--method lsoftmax center --margin 2 --beta 5 --center-coef 0.1 --clip-norm 0.5',
    'lsoftmax smoothout': '--method lsoftmax smoothout --ss 0.01 --batch-multiplier 2',
    'amp on a ramp, climbing on a part': '--method amp --epsilon 0.1 --climb-fraction 0.25 --method-ramp 0.5',
    'accumulated, climbing on a part': '--method sam --rho 0.2 --climb-fraction 0.4 --batch-multiplier 2',
    'center and large_margin, late': '--method center large_margin --cross-entropy-weight 1 --center-coef 0.1 '
                                     '--method-start 0.25 --clip-norm 1',
    'arcface sam': '--method arcface sam --adaptive --rho 0.3', 'momentum-sam': '--method sam --direction momentum',
    'mixed images': '--mixup 0.4 --cutmix 1 --batch-multiplier 2', 'flooded': '--flood 2.2 --clip-norm 1',
    'adversarial': '--adversarial 8/255 --method amp --epsilon 0.1', 'mean of weights': '--swa 0 --hflip alternating',
    'ldam': '--method ldam --deferred 0', 'logit_adjustment hinge': '--method logit_adjustment hinge',
}
# Without --mini-batch each process normalises its own half of a batch, so these have a network without batch norm.
WHOLE = {
    'a whole batch': '-a lenet',
    'whole batches, smoothout': '-a lenet --method smoothout --ss 0.01 --batch-multiplier 2',
    'a whole batch, amp': '-a lenet --method amp --epsilon 0.1',
    'a whole batch, mixed and flooded': '-a lenet --mixup 0.4 --flood 2.3',
    'a whole batch, adversarial': '-a lenet --adversarial 8/255',
    'a whole batch, climbing on a part': '-a lenet --method sam --rho 0.2 --climb-fraction 0.3',
}
LOCAL = {'amp, local': '--method amp --epsilon 0.1 --local-perturbation --inner-iter 2',
         'amp, local, on a part': '--method amp --epsilon 0.1 --local-perturbation --climb-fraction 0.5'}


def images_of(count):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.randperm(count, generator=generator) % 10, list('0123456789'))


def train(flags, count):
    parser = cifar.make_parser()
    args = parser.parse_args(['--epochs', '2', '--lr', '0.05', '--manualSeed', '3', *flags.split()])
    methods.check_arguments(args, parser)
    torch.manual_seed(args.seed)
    options = {} if args.arch == 'lenet' else {'depth': 8}
    model = models.build(args.arch, 10, methods.build_head(args), **options)
    validate(args, None, None, parser, model)
    model = methods.attach_loss_terms(args, model).double()
    split = images_of(count)
    mean, std = mean_and_std(split.images)
    options = {'padding': 4, 'flip': args.hflip or True, 'mix': folders.mixing(args.mixup, args.cutmix, 10)}
    make = lambda size: Batches(split, mean, std, size, 'cpu', **options)  # noqa: E731
    batches, whole = make(args.train_batch * args.batch_multiplier), make(7)
    for each in (batches, whole):
        each.mean, each.std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    optimizer = methods.build_optimizer(args, model, len(batches))
    criterion = methods.build_criterion(args, model, batches.class_counts)
    run = Run(args, {}, model, optimizer, {'train': batches})
    trained = cifar.train(run, criterion, optimizer, 0, args)
    tested = cifar.test(whole, run.to_test, args)
    weights = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    agree = len({tuple(each.tolist()) for each in distributed.all_gather(weights)}) == 1
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'trained': trained, 'tested': tested,
            'average': run.average.state_dict() if run.average else {}, 'agree': agree}


def main():
    distributed.start()
    torch.set_num_threads(1)
    results = {name: train(GHOST + flags, 18) for name, flags in RUNS.items()}
    results |= {name: train('--train-batch 8 ' + flags, 18) for name, flags in WHOLE.items()}
    results |= {f'{name}, 21 images': train(GHOST + RUNS[name], 21) for name in ('plain', 'lsoftmax smoothout')}
    if distributed.active():
        results |= {name: train(GHOST + flags, 18) for name, flags in LOCAL.items()}
    if distributed.is_first():
        torch.save(results, sys.argv[1])
    distributed.stop()


if __name__ == '__main__':
    main()
