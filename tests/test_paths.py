"""Paths on the command line, and what is said of files that are of no use."""
import shlex
import sys
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torchvision

import cifar
import compare
import evaluate
import imagenet
import measure_margins
import measure_sharpness
import visualize_features
import visualize_sharpness
from helpers import call, toy_runs
from utils import metrics
from utils.errors import UserError
from utils.files import drawn, save_figure, write_json
from utils.lab import checkpoints

runs = toy_runs(plain='-a lenet')
FLAGS = [(cifar, flag) for flag in ('--data', '-c', '--checkpoint', '--resume', '--init')] + [
    (imagenet, flag) for flag in ('--data', '-c', '--resume', '--init')] + [
    (script, flag) for script in (evaluate, measure_sharpness, measure_margins, visualize_features,
                                    visualize_sharpness)
    for flag in ('--data', '--out')] + [
    (evaluate, '--evaluate'), (visualize_sharpness, '--slave-evaluate'), (compare, '--plot'), (compare, '')]


@pytest.mark.parametrize('script, flag', FLAGS)
def test_an_empty_word_is_no_path(script, flag, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (f"{flag} ''", f'{flag}=') if flag.startswith('--') else (f"{flag} ''",):
        monkeypatch.setattr(sys, 'argv', ['', *shlex.split(words)])
        with pytest.raises(SystemExit):
            script.main()
        assert 'was given an empty' in capsys.readouterr().err


def test_the_home_folder(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    for script, flag, name in ((cifar, '--data', 'data'), (cifar, '--checkpoint', 'checkpoint'),
                               (imagenet, '--init', 'init'), (imagenet, '--resume', 'resume')):
        parser = script.make_parser()
        for words in ([f'{flag}=~/a b'], [flag, '~/a b']):
            assert getattr(parser.parse_args(words), name) == f'{tmp_path}/a b'
        assert getattr(parser.parse_args([flag, '$HOME/~']), name) == '$HOME/~'
    (tmp_path / 'run').symlink_to(runs / 'plain')
    call(monkeypatch, evaluate, "'~/run/checkpoint.pth.tar' --out=~/out --images 5")
    assert (tmp_path / 'out').is_dir() and f'{tmp_path}/run/checkpoint.pth.tar' in capsys.readouterr().out
    call(monkeypatch, compare, "'~/run' --plot=~/picture.png")
    assert (tmp_path / 'picture.png').exists()


def test_weights_without_a_network_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def fail(*args, **options):
        raise urllib.error.URLError(OSError(-2, 'Name or service not known'))

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    file = tmp_path / 'checkpoints' / url.rsplit('/', 1)[1]
    with pytest.raises(ValueError) as error:
        imagenet.models.build('resnet18', 3, pretrained=True)
    assert str(error.value) == (f'--pretrained: {url} could not be downloaded ([Errno -2] Name or service not known); '
                                f'put it by hand where it is looked for, {file}')
    file.write_text('<html>')
    with pytest.raises(ValueError, match=f'--pretrained: {file} is damaged .*; remove it, or replace it by {url}'):
        imagenet.models.build('resnet18', 3, pretrained=True)


@pytest.mark.parametrize('flags', ['-e --resume FILE', '--resume FILE --epochs 2', '-d digits -a lenet --init FILE'])
def test_weights_that_are_nan_are_named(flags, runs, monkeypatch, tmp_path):
    state = torch.load(runs / 'plain/checkpoint.pth.tar', weights_only=True)
    name = list(state['state_dict'])[2]
    state['state_dict'][name].fill_(torch.nan)
    torch.save(state, tmp_path / 'nan.pth.tar')
    flags = flags.replace('FILE', f'{tmp_path}/nan.pth.tar') + f' -c {tmp_path}/run' * ('-e' not in flags)
    with pytest.raises(UserError, match=rf'the weights in {tmp_path}/nan.pth.tar are NaN \({name}\)'):
        call(monkeypatch, cifar, flags)


def test_outputs_that_are_nan_are_not_measured():
    probabilities = np.full((4, 3), 1 / 3, dtype=np.float32)
    probabilities[1:3] = np.nan
    with pytest.raises(UserError, match='NaN for 2 of 4 images'):
        metrics.of_classes(probabilities, np.zeros(4, dtype=int))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('protocol', [None, 4])
def test_files_that_are_no_checkpoint_are_refused_without_a_warning(protocol, tmp_path):
    if protocol:
        torch.save({'a': torch.zeros(2)}, tmp_path / 'file', pickle_protocol=protocol)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / 'file')
    with pytest.raises(UserError, match='is not a checkpoint'):
        checkpoints.checkpoint.read(str(tmp_path / 'file'))


@pytest.mark.filterwarnings('error')
def test_any_name_can_be_drawn(tmp_path):
    from matplotlib.figure import Figure

    names = ['$x^$ $', r'\$', '$a$', '_under', 'new\nline', 'caf\udce9', '猫', '%s', '{', '\x00', '$']
    figure = Figure()
    axes = figure.subplots()
    for name in names:
        axes.plot([0, 1], label=drawn(name))
    axes.legend(title=drawn(''.join(names)))
    assert len(axes.get_legend().get_texts()) == len(names)
    save_figure(figure, tmp_path / 'a.png', tmp_path / 'a.pdf')
    write_json(tmp_path / 'a.json', names)
    assert (tmp_path / 'a.json').read_bytes().isascii()
