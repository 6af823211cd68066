"""The flags that cifar.py and imagenet.py share, and how a command line and a checkpoint become a run."""
import os
import random

import torch

from utils import checkpoint, distributed, methods, schedule
from utils.arguments import number
from utils.errors import UserError

# What a resumed run does not take over from the flags of the run before it; and the flags that mean something to --evaluate.
NOT_INHERITED = {'given', 'checkpoint', 'overwrite', 'resume', 'evaluate', 'start_epoch', 'gpu_id', 'coef', 'checkpoint_every',
                 'network'}
# What --resume auto may find changed: how far to train, and where and on what machine.
NOT_SETTINGS = {'epochs', 'data', 'workers', 'test_batch'}
USED_BY_EVALUATE = {'evaluate', 'resume', 'arch', 'data', 'workers', 'test_batch', 'precision', 'deterministic', 'gpu_id'}


def add_training_arguments(group, train_batch, test_batch):
    """train_batch, test_batch: the defaults."""
    group.add_argument('--train-batch', type=number(int, 1), default=train_batch, metavar='N',
                       help=f'images of a batch, all processes together ({train_batch})')
    group.add_argument('--mini-batch', type=number(int, 1), metavar='N',
                       help='pass each batch in parts of N, each with BatchNorm statistics (and noise) of its own')
    group.add_argument('--batch-multiplier', type=number(int, 1), default=1, metavar='N',
                       help='step along the mean gradient of N batches (1)')
    group.add_argument('--test-batch', type=number(int, 1), default=test_batch, metavar='N', help=f'({test_batch})')
    schedule.add_arguments(group)
    group.add_argument('--clip-norm', type=number(float, 0, above=True), metavar='NORM', help='largest norm of the gradient')
    group.add_argument('--label-smoothing', type=number(float, 0, 1), default=0.0, metavar='S',
                       help='spread this part of each target over all classes (0)')
    group.add_argument('--ema', type=number(float, 0, 0.999999999, above=True), metavar='DECAY',
                       help='test an exponential moving average of the weights, such as 0.999 at every step')


def add_run_arguments(group, folder):
    """folder: how the default of --checkpoint is named."""
    group.add_argument('-c', '--checkpoint', metavar='DIR', help=f'results ({folder})')
    group.add_argument('--overwrite', action='store_true', help='replace the run in that folder')
    group.add_argument('--resume', metavar='FILE',
                       help='go on from a checkpoint, with its flags unless given here; "auto": from that in the run\'s own folder, if any')
    group.add_argument('--checkpoint-every', type=number(int, 1), metavar='N', help='also within an epoch, every N batches')
    group.add_argument('-e', '--evaluate', action='store_true', help='only test the checkpoint of --resume')
    group.add_argument('--manualSeed', type=number(int, 0, 2 ** 32 - 1), dest='seed', metavar='N', help='(drawn and printed)')
    group.add_argument('--deterministic', action='store_true', help='same seed, same bits')
    group.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32', help='bf16: autocast (fp32)')
    group.add_argument('--compile', action='store_true', help='torch.compile the model')
    group.add_argument('--gpu-id', metavar='ID', help='the CUDA device to use, as in CUDA_VISIBLE_DEVICES (0)')


def read(parser, script, folder_of, used_by_evaluate, evaluated_without_resume=None):
    """The flags as given or as the checkpoint of --resume has them, and the checkpoint or None.

    script: whose checkpoints can be resumed. folder_of: flags -> the run's folder, if --checkpoint is left out.
    used_by_evaluate: the flags that mean something to --evaluate. evaluated_without_resume: the flag that it can do with, in
    place of --resume.
    """
    args, state = parser.parse_args(), None
    auto = args.resume == 'auto'
    if auto:
        if args.evaluate or args.overwrite:
            parser.error(f'--resume auto and --{"evaluate" if args.evaluate else "overwrite"} exclude each other')
        folder = args.checkpoint or named(folder_of, args, parser)
        args.resume = os.path.join(folder, checkpoint.LAST)
        if not os.path.exists(args.resume):
            args.resume, args.overwrite = None, checkpoint.never_saved(folder)
    if args.resume:
        state, given, path = checkpoint.read(args.resume, script), args.given, args.resume
        if auto:  # the same command once more, so what it says again is not a wish to change anything
            given -= {'start_epoch'} | {name for name in given if name in state['args'] and state['args'][name] == getattr(args, name)}
            for name in sorted(given & state['args'].keys() - NOT_SETTINGS):
                parser.error(f'--resume auto would go on with the run in {folder}, which has --{name.replace("_", "-")} '
                             f'{state["args"][name]}, not {getattr(args, name)}; give another --checkpoint, or --resume {path} to change it')
        checkpoint.check_flags(args, state, parser)
        args = parser.parse_args(defaults=state['args'])
        args.given, args.resume = given, path
    elif args.evaluate and not (evaluated_without_resume and getattr(args, evaluated_without_resume)):
        parser.error('--evaluate needs --resume FILE, the checkpoint to evaluate'
                     + (f', or --{evaluated_without_resume}' if evaluated_without_resume else ''))
    for name in sorted(args.given - used_by_evaluate if args.evaluate else ()):
        parser.error(f'--{name.replace("_", "-")} is not used by --evaluate')
    if args.gpu_id is not None and distributed.active():
        parser.error('--gpu-id is for a single process; under torchrun each takes the device of its own number')
    args.checkpoint = args.checkpoint or (os.path.dirname(args.resume) or '.' if args.resume else named(folder_of, args, parser))
    seeds = distributed.gathered((args.seed, state and (state['epoch'], state.get('step', 0))))
    if len(set(seeds)) > 1:
        raise UserError(f'not all processes see the same {args.resume or checkpoint.LAST}; --checkpoint must be a folder that all '
                        'machines share')
    if args.seed is None:
        args.seed = distributed.agreed(random.SystemRandom().randrange(2 ** 32))
    return args, state


def named(folder_of, args, parser):
    try:
        return folder_of(args)
    except ValueError as error:  # an option that the architecture does not have
        parser.error(str(error))


def settle(args, state, regime, parser):
    """Refuse batches, schedules and methods that cannot be, and fill in what was left open. regime: the model's."""
    # What is derived below from other flags is derived anew when the run is resumed, perhaps with other flags.
    args.inherited = {name: value for name, value in vars(args).items() if name not in NOT_INHERITED}
    processes, whole = distributed.world_size(), f'--train-batch, which is {args.train_batch}'
    if args.train_batch % processes:
        parser.error(f'{processes} processes cannot share {whole}; give a multiple of {processes}')
    if args.train_batch % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide {whole}')
    if args.train_batch // processes % (args.mini_batch or 1):
        parser.error(f'--mini-batch {args.mini_batch} does not divide the {args.train_batch // processes} images that each of '
                     f'{processes} processes has of {whole}')
    try:
        schedule.settle(args, regime, parser)
        if state and not args.evaluate:
            checkpoint.check_schedule(args, state, parser)
        methods.build_optimizer(args, torch.nn.Linear(1, 1), steps_per_epoch=1)
    except ValueError as error:
        parser.error(str(error))


def check_batch(args, images, left_by=''):
    """UserError if the batch is larger than the training set of `images` images."""
    if args.train_batch * args.batch_multiplier > images:
        times = f' times --batch-multiplier {args.batch_multiplier}' if args.batch_multiplier > 1 else ''
        raise UserError(f'--train-batch {args.train_batch}{times} is larger than the training set of {images} images{left_by}')


def leaves_one(args, images):
    """What is wrong, or None, where an epoch of `images` images ends with a pass of one image and batch norm cannot train on that."""
    size = args.mini_batch or args.train_batch // distributed.world_size()
    if images % size == 1 % size:
        return (f'cannot train on a single image, and {images} images in parts of {size} leave one; '
                f'choose another --{"mini" if args.mini_batch else "train"}-batch')
