"""The device that a script runs on."""
import contextlib
import functools
import os
import pathlib
import platform
import random
import shutil
import subprocess

import numpy as np
import torch

from utils.errors import UserError


def set_up(args, compiling=False):
    """The device, with PyTorch's switches and seeds set for it as args.gpu_id, args.deterministic and args.seed say."""
    if args.gpu_id is not None:
        use_only(args.gpu_id)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if compiling and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError('--compile needs a C++ compiler, and there is no g++ here')
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # CUDA reads it when it is first used
        torch.use_deterministic_algorithms(True)
    seed(args.seed)
    return device


def seed(number):
    """Seed the generators of PyTorch, Python and NumPy, from which a loop may draw."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed([number % 2 ** 32, number // 2 ** 32])


@functools.cache  # it says it once, however many checkpoints are opened
def use_only(gpu_id):
    """Hide all other CUDA devices; without any here, say that the CPU is used. UserError for a device that is not here.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    os.environ['CUDA_VISIBLE_DEVICES'] = gpu_id
    if torch.cuda.device_count() == 1:
        return
    if visible is None:
        del os.environ['CUDA_VISIBLE_DEVICES']
    else:
        os.environ['CUDA_VISIBLE_DEVICES'] = visible
    number = torch.cuda.device_count()
    if number:
        raise UserError(f'--gpu-id {gpu_id} is no CUDA device of this machine, which has {number}, from 0')
    print(f'--gpu-id {gpu_id}: there is no CUDA device here, so the CPU is used')


def autocast(args, images):
    """bfloat16 autocast for a pass of `images`, with --precision bf16."""
    return bf16_autocast(images.device, args.precision == 'bf16')


def bf16_autocast(device, enabled=True):
    """bfloat16 autocast on `device`; nothing where there is no autocast, as on the meta device."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def generator(device='cpu'):
    """A torch.Generator for tensors on `device`; the meta device, which draws nothing, takes one of the CPU."""
    return torch.Generator('cpu' if torch.device(device).type == 'meta' else device)


def environment(device):
    """What a number should be reported with: {'commit': of this repository or None, 'device': its name, 'torch':
    version}.
    """
    def git(*command):
        try:
            return subprocess.run(('git', *command), cwd=pathlib.Path(__file__).parent, capture_output=True,
                                  text=True, errors='replace').stdout.strip()
        except OSError:  # no git here
            return ''

    commit = git('rev-parse', '--short', 'HEAD')
    if commit and git('status', '--porcelain', '--untracked-files=no'):
        commit += ' with changes'
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()
    return {'commit': commit or None, 'device': name, 'torch': torch.__version__}


def _processor():
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
