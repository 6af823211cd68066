"""What several test files share."""
import io
import shlex
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cifar
from utils import data
from utils.errors import UserError


def refused(monkeypatch, capsys, tmp_path, flags):
    """What cifar.py says of these flags, started in `tmp_path`: one sentence, before any data is read."""
    monkeypatch.setattr(data, 'load', lambda *args: pytest.fail('data was loaded'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *shlex.split(flags)])
    with pytest.raises((SystemExit, UserError)) as error:
        cifar.main()
    printed = capsys.readouterr().err + (str(error.value) if error.type is UserError else '')
    assert printed.strip().count('\n') == 0 and (error.type is UserError or error.value.code == 2)
    return printed


def broken_off(monkeypatch, flags, epoch):
    """A run of cifar.py that ends like one that was killed when epoch `epoch`, counted from 0, should begin."""
    train = cifar.train

    def killed(batches, model, criterion, optimizer, number, args):
        if number == epoch:
            raise KeyboardInterrupt
        return train(batches, model, criterion, optimizer, number, args)

    monkeypatch.setattr(sys, 'argv', ['cifar.py', *shlex.split(flags)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar, 'train', killed)
        cifar.main()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, expected):
    expected = expected if isinstance(expected, list) else weights(expected)
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class NothingIsRead(TorchDispatchMode):
    """Raises where the value of a tensor is read, for which the host would wait on a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                               torch.ops.aten.equal), function
        return function(*args, **(kwargs or {}))
