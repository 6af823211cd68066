"""What several test files share."""
import io
import json
import pathlib
import shlex
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cifar
from utils import datasets
from utils.errors import UserError
from utils.lab.landscape import Landscape
from utils.run import Run

ENVIRONMENT = {'commit': 'abc1234', 'torch': '2.15.0', 'device': 'cpu'}


def refused(monkeypatch, capsys, tmp_path, flags, script=cifar):
    """What a script says of these flags, started in `tmp_path`: one sentence, before any data is read."""
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *shlex.split(flags)])
    with pytest.raises((SystemExit, UserError)) as error:
        script.main()
    printed = capsys.readouterr().err + (str(error.value) if error.type is UserError else '')
    assert printed.strip().count('\n') == 0 and (error.type is UserError or error.value.code == 2)
    return printed


def broken_off(monkeypatch, flags, epoch):
    """A run of cifar.py that ends like one that was killed when epoch `epoch`, counted from 0, should begin."""
    train = cifar.train

    def killed(run, criterion, optimizer, number, args):
        if number == epoch:
            raise KeyboardInterrupt
        return train(run, criterion, optimizer, number, args)

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


def unrecorded(args, model, optimizer, batches):
    """A Run that writes nothing, for `train` of a script."""
    return Run(args, {}, model, optimizer, {'train': batches})


class Fixed(list):
    """(inputs, targets) pairs with what a Batches says of itself."""

    def __init__(self, pairs, num_classes):
        super().__init__(pairs)
        self.num_classes, self.labels = num_classes, torch.cat([targets for _, targets in pairs])


def sharpness_golden():
    """(goldens/sharpness.npz, a function 'master' or 'slave' -> the Landscape of its network)."""
    golden = np.load(pathlib.Path(__file__).parent / 'goldens/sharpness.npz')

    def landscape_of(name):
        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
        torch.nn.utils.vector_to_parameters(torch.tensor(golden[f'params_{name}']), net.parameters())
        return Landscape(net, Fixed([(torch.tensor(golden['x']), torch.tensor(golden['y']))], 3))

    return golden, landscape_of


def call(monkeypatch, script, flags):
    monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *shlex.split(flags)])
    script.main()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def few_digits(patch, train, test, load=datasets.load):
    """Let every data set be so many of the digits."""
    patch.setattr(datasets, 'load', lambda name, root, part, *rest:
                  load('digits', None, part).subset(torch.arange(train if part == 'train' else test)))


def write_run(folder, flags='', seed=1, curve=(40.0, 60.0, 50.0), top1=None, missing=(), args=None, result=None,
              files=None):
    """A run as cifar.py leaves it. missing: flags that this version did not have yet; the dicts replace what is
    written.
    """
    read = vars(cifar.make_parser().parse_args(shlex.split(flags)))
    given = {name: value for name, value in read.items() if name not in ('given', 'coef', *missing)} | {'seed': seed}
    part = 'Val' if given.get('val_split') else 'Test'
    settled = given | {'epochs': len(curve), 'lr': 0.1, 'schedule': [1], 'checkpoint': str(folder),
                       'coef': read['coef']}
    best = max(range(len(curve)), key=lambda index: (curve[index] == curve[index], curve[index]))
    contents = {
        'args.json': settled | {'as given': given, 'environment': ENVIRONMENT, 'network': {}} | (args or {}),
        'result.json': {'epoch': len(curve), 'test loss': 1.0, 'test top-1': curve[-1] if top1 is None else top1,
                        'best': {'top1': curve[best], 'epoch': best + 1}, 'parameters': 270000,
                        'seconds per epoch': 2.5,
                        'chosen by': 'validation' if part == 'Val' else 'last epoch'} | (result or {}),
        'log.txt': f'Epoch\tLearning Rate\tTrain Loss\tTrain Top-1\t{part} Loss\t{part} Top-1\tSeconds\n'
                   + ''.join(f'{epoch}\t0.1\t1.5\t30\t1.4\t{value:.6g}\t2.5\n' for epoch, value in enumerate(curve, 1))}
    folder.mkdir(parents=True)
    for name, content in {**contents, **(files or {})}.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def toy_runs(**flags):
    """A fixture: the folder of short trainings on 160 digits, one for each name, with these flags of cifar.py. No
    curves are drawn.
    """
    @pytest.fixture(scope='module')
    def runs(tmp_path_factory):
        folder = tmp_path_factory.mktemp('runs')
        with pytest.MonkeyPatch.context() as patch:
            few_digits(patch, 160, 60)
            patch.setattr('utils.run.plot_log', lambda *args: None)
            for name, own in flags.items():
                call(patch, cifar, f'-d digits --epochs 1 --lr 0.02 --train-batch 16 --manualSeed 2 {own} -c '
                                   f'{folder}/{name}')
            yield folder
    return runs
