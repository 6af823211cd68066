import csv
import json
import math
import re
import shlex
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models._api import WeightsEnum
from torchvision.transforms import v2

import cifar
import evaluate
import imagenet
import lsoftmax
import measure_margins
import measure_sharpness
import visualize_features
from helpers import call, contents, toy_runs
from models import imagenet as models
from utils import checkpoint, datasets, folders, methods, metrics, run as utils_run
from utils.errors import UserError
from utils.lab import checkpoints
from utils.parts import part_sizes
from utils.run import Run
from utils.script import run_script
from utils.logger import read_log

CLASSES = ['blue', 'green', 'red']  # of 14 training and 4 test images each
# three classes: no top-5
COLUMNS = ['Epoch', 'Learning Rate', 'Train Loss', 'Train Top-1', 'Test Loss', 'Test Top-1', 'Seconds']
COMMON = '-j 0 --image-size 32 --manualSeed 3'
SMALL = f'{COMMON} --lr 0.05 -a shufflenet_v2_x0_5 --train-batch 14 --epochs 1'  # three steps an epoch
TINY = f'{COMMON} --lr 0.1 -a tiny --train-batch 14 --epochs 1'
# Six steps an epoch. Dropout draws from PyTorch's own random state, the noise on the weights from that of the
# optimizer.
EXACT = f'{COMMON} --train-batch 8 --epochs 2 --deterministic'
RUNS = {'tiny': f'{EXACT} --lr 0.1 -a tiny --method smoothout --mixup 0.4 --ema 0.9 --lr-schedule cosine',
        'mobilenet': f'{EXACT} --lr 0.02 -a mobilenet_v3_small --method lsoftmax --beta 50 --random-erase 0.5'}

cifar_runs = toy_runs(run='-a lenet')


def write_images(root, parts=('train', 'val'), classes=CLASSES, **numbers):
    """Noise around a colour, 40 by 48 pixels or the other way round, every other image a JPEG."""
    generator = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for index in range(numbers.get(part, {'train': 14, 'val': 4}[part])):
                pixels = generator.integers(0, 160, (40, 48, 3)) + 60 * (np.arange(3) == 2 - label % 3)
                pixels = pixels.astype(np.uint8).transpose(*((1, 0, 2) if index % 3 else (0, 1, 2)))
                Image.fromarray(pixels).save(root / part / name / f'{index:02}.{"jpg" if index % 2 else "png"}')
    return root


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


class Tiny(nn.Sequential):
    """What torchvision's networks have, dropout too, but little of it. It learns the colours."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, 2,
                                                  bias=False), nn.BatchNorm2d(8, momentum=0.5), nn.ReLU(inplace=True)
        self.pool, self.flatten, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)


def made_quick(patch, draws=False):
    """--arch tiny, and no curves."""
    construct = models._construct
    patch.setattr(models, 'MODELS', [*models.MODELS, 'tiny'])
    patch.setattr(models, '_construct', lambda arch, **options: Tiny(**options) if arch == 'tiny'
                  else construct(arch, **options))
    if not draws:
        patch.setattr('utils.run.plot_log', lambda *args: None)
        patch.setattr(metrics, 'write_confusion', lambda *args: None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    made_quick(monkeypatch)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope='module')
def runs(root, tmp_path_factory):
    """The folder of the runs that RUNS lists, undisturbed, and of 'plain', with its curves."""
    folder = tmp_path_factory.mktemp('runs')
    for name, flags in {'plain': SMALL, **RUNS}.items():
        with pytest.MonkeyPatch.context() as patch:
            made_quick(patch, draws=name == 'plain')
            call(patch, imagenet, f'{flags} -d {root} -c {folder}/{name}')
    torch.use_deterministic_algorithms(False)
    return folder


def load(folder, name='checkpoint.pth.tar'):
    return torch.load(f'{folder}/{name}', weights_only=True)


def result(folder):
    return json.loads((folder / 'result.json').read_text())


def by_hand_on(state_dict, arch, root, preprocess=None):
    """Mean cross-entropy and percent right of torchvision's network with these weights on root/val, image by image in
    double precision.
    """
    network = Tiny(3) if arch == 'tiny' else torchvision.models.get_model(arch, num_classes=3)
    network.load_state_dict({name.replace('backbone.', '').replace('head.', 'fc.'): value for name, value
                             in state_dict.items()})
    network.double().eval()
    crop = v2.Compose([v2.Resize(37), v2.CenterCrop(32)])  # 8/7 of 32
    losses, right, confusion = [], [], torch.zeros(3, 3, dtype=torch.int64)
    for label, name in enumerate(CLASSES):
        for path in sorted((root / 'val' / name).iterdir()):
            image = Image.open(path).convert('RGB')
            if preprocess:
                inputs = preprocess(image).double()
            else:
                pixels = np.asarray(crop(image), dtype=np.float64) / 255
                inputs = torch.from_numpy((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)
            with torch.no_grad():
                logits = network(inputs[None])[0]
            losses.append(-logits.log_softmax(0)[label].item())
            right.append(logits.argmax().item() == label)
            confusion[label, logits.argmax()] += 1
    return types.SimpleNamespace(loss=sum(losses) / len(losses), top1=100 * sum(right) / len(right),
                                 confusion=confusion, images=len(right))


def assert_result(numbers, by_hand):
    assert numbers['test loss'] == pytest.approx(by_hand.loss,
                                                 rel=1e-4) and numbers['test top-1'] == pytest.approx(by_hand.top1)
    assert numbers['test images'] == by_hand.images


@pytest.fixture
def losses(monkeypatch):
    """What the criterion was given and gave in training: a list of (outputs, targets, loss), without that of the
    rehearsal.
    """
    recorded, build = [], methods.build_criterion

    def recording(args, model, class_counts=None):
        criterion = build(args, model, class_counts)

        def record(outputs, targets):
            loss = criterion(outputs, targets)
            recorded.append((outputs, targets, loss.item()))
            return loss

        return record

    def training_begins(run):
        recorded.clear()
        return enter(run)

    enter = Run.__enter__
    monkeypatch.setattr(methods, 'build_criterion', recording)
    monkeypatch.setattr(Run, '__enter__', training_begins)
    return recorded


def smoothed_cross_entropy(logits, shares, smoothing):
    """In a plain loop; shares: of the classes, for each image."""
    total = 0.0
    for row, share in zip(logits.detach().double().tolist(), shares.double().tolist()):
        normaliser = math.log(sum(math.exp(logit) for logit in row))
        for logit, part in zip(row, share):
            total -= ((1 - smoothing) * part + smoothing / len(row)) * (logit - normaliser)
    return total / len(logits)


# What a run writes

def test_a_run_writes_what_it_promises(runs, root):
    folder = runs / 'plain'
    assert set(contents(folder)) == {'log.txt', 'log.png', 'log.pdf', 'checkpoint.pth.tar', 'model_best.pth.tar',
                                     'args.json',
                                     'result.json', 'confusion.csv', 'confusion.png'}
    assert all(contents(folder).values())
    log, numbers, args = read_log(folder / 'log.txt'), result(folder), json.loads((folder / 'args.json').read_text())
    assert list(log) == COLUMNS and log['Epoch'] == [1] and log['Learning Rate'] == [0.05]
    assert numbers['epoch'] == 1 and numbers['chosen by'] == 'last epoch'
    assert numbers['test loss'] == pytest.approx(log['Test Loss'][0], rel=1e-5)
    assert args['training images by class'] == [14] * 3
    assert args['as given']['train_batch'] == 14 and args['data'] == str(root)
    assert args['network'] == {'arch': 'shufflenet_v2_x0_5', 'num_classes': 3} and args['processes'] == 1
    state = load(folder)
    assert state['script'] == 'imagenet.py' and state['classes'] == CLASSES and (state['epoch'],
                                                                                 state['step']) == (1, 0)


@pytest.mark.parametrize('name', ['plain', 'tiny'])
def test_the_result_is_that_of_a_plain_loop_over_the_images(name, runs, root):
    state, numbers = load(runs / name), result(runs / name)
    arch = state['network']['arch']
    weights = {key.removeprefix('module.'): value for key, value in state['ema'].items() if key != 'n_averaged'} \
        if name == 'tiny' else state['state_dict']
    by_hand = by_hand_on(weights, arch, root)
    assert_result(numbers, by_hand)
    recall = (100 * by_hand.confusion.diag() / by_hand.confusion.sum(1)).tolist()
    assert numbers['test class accuracy'] == pytest.approx(recall)
    assert numbers['test balanced accuracy'] == pytest.approx(sum(recall) / 3)
    if name == 'tiny':  # whose averaged weights are others than the last ones
        assert numbers['test loss'] != pytest.approx(by_hand_on(state['state_dict'], arch, root).loss, rel=1e-4)
    else:
        with open(runs / 'plain/confusion.csv', newline='') as file:
            (_, *header), *rows = csv.reader(file)
        assert header == CLASSES and [list(map(int, row)) for _, *row in rows] == by_hand.confusion.tolist()


@pytest.mark.parametrize('name', ['plain', 'tiny'])
def test_evaluate_reads_a_checkpoint_and_the_test_images_and_writes_nothing(name, runs, root, monkeypatch, tmp_path,
                                                                            capsys):
    before, numbers = contents(runs / name), result(runs / name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / 'val', tmp_path / 'only/val')
    for flags in ('', '-d only --test-batch 5'):
        call(monkeypatch, imagenet, f'-e --resume {runs}/{name}/checkpoint.pth.tar {flags}')
        assert (f'{runs}/{name}/checkpoint.pth.tar, of epoch {numbers["epoch"]} | test loss {numbers["test loss"]:.4f} '
                f'top-1 {numbers["test top-1"]:.2f}%') in capsys.readouterr().out
    assert contents(runs / name) == before and sorted(path.name for path in tmp_path.iterdir()) == ['only']


# torchvision's weights

@pytest.fixture
def pretrained(monkeypatch):
    """torchvision's network of three classes that a download of the weights of shufflenet_v2_x0_5 would give."""
    torch.manual_seed(5)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.randn(8, 3, 64, 64))  # with statistics that let images differ
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setitem(weights.meta, 'categories', ['x', 'y', 'z'])
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *args, **options: network.state_dict())
    return network


def test_evaluating_torchvisions_weights(pretrained, root, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, imagenet, f'-e --pretrained -a shufflenet_v2_x0_5 -j 0 -d {root}')
    by_hand = by_hand_on({name.replace('fc', 'head'): value for name, value in pretrained.state_dict().items()},
                         'shufflenet_v2_x0_5',
                             root, torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms())
    printed = re.search(r'\ntorchvision \| test loss (\S+) top-1 (\S+)%\n', capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(by_hand.loss, rel=1e-4,
                                              abs=1e-4) and float(printed[2]) == pytest.approx(by_hand.top1, abs=0.01)
    assert not list(tmp_path.iterdir())


def test_training_begins_with_torchvisions_weights_and_its_normalisation(pretrained, root, monkeypatch, tmp_path):
    # others: a new head
    monkeypatch.setitem(torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.meta, 'categories', ['x', 'y'])
    pretrained.fc = nn.Linear(1024, 2)
    flags = f'{SMALL} --pretrained --lr 0 -d {root} -c {tmp_path}/run --resume auto'
    call(monkeypatch, imagenet, flags)
    state = load(tmp_path / 'run')
    assert torch.equal(state['state_dict']['backbone.conv1.0.weight'], pretrained.conv1[0].weight)
    assert state['state_dict']['head.weight'].shape == (3, 1024)
    assert state['mean'] == pytest.approx([123.675, 116.28,
                                           103.53]) and state['std'] == pytest.approx([58.395, 57.12, 57.375])
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *args, **options: pytest.fail('download'))
    call(monkeypatch, imagenet, flags)  # the same command once more goes on from the checkpoint


def test_torchvisions_weights_of_other_classes_are_not_tested(root, monkeypatch, tmp_path):
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *args, **options: pytest.fail('download'))
    sentence = ("--evaluate --pretrained tests torchvision's weights of resnet18, which know 1000 classes, but "
                f'{root} has 3')
    with pytest.raises(UserError, match=f'^{re.escape(sentence)}$'):
        call(monkeypatch, imagenet, f'-e --pretrained -d {root} -j 0')


# Methods and losses

@pytest.mark.parametrize('flags', ['dma --coef 0.5', 'lsoftmax --margin 2 --beta 50 --beta-schedule decay',
                                   'amp --epsilon 0.1', 'smoothout',
                                   'large_margin --large-margin-layers input backbone.stage3 --coef 0.1 '
                                   '--cross-entropy-weight 1 --clip-norm 5',
                                   'dma amp --epsilon 0.1'])
def test_every_method_trains(flags, runs, root, monkeypatch, tmp_path):
    seen, forward = [], lsoftmax.LSoftmaxLinear.forward
    monkeypatch.setattr(lsoftmax.LSoftmaxLinear, 'forward', lambda self, x, targets=None:
                        seen.append((self.training, targets)) or forward(self, x, targets))
    split = '--train-batch 7 --batch-multiplier 2' if 'lsoftmax' in flags else ''
    call(monkeypatch, imagenet, f'{SMALL} -d {root} -c {tmp_path} {split} --method {flags}')
    state, plain = load(tmp_path)['state_dict'], load(runs / 'plain')['state_dict']
    assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(state['backbone.conv1.0.weight'], plain['backbone.conv1.0.weight'])
    if 'lsoftmax' in flags:
        assert state['head.beta'].item() == pytest.approx(50 * 0.99 ** 3)  # three steps of two parts
        shown = [targets for in_training, targets in seen if in_training][1:]  # without the rehearsal
        assert [len(targets) for targets in shown] == [7] * 6 and torch.cat(shown).bincount().tolist() == [14] * 3
        assert all(targets is None for in_training, targets in seen if not in_training)


def test_the_loss_of_googlenet_has_that_of_its_auxiliary_classifiers(losses, root, monkeypatch, tmp_path):
    monkeypatch.setattr('utils.run.Run.report', lambda *args: None)
    call(monkeypatch, imagenet, f'{SMALL} -a googlenet --train-batch 42 -d {root} -c {tmp_path}')
    (outputs, targets, loss), = losses
    shares = torch.eye(3)[targets]
    expected = smoothed_cross_entropy(outputs.outputs, shares, 0)
    for logits in outputs.auxiliary:
        expected += 0.3 * smoothed_cross_entropy(logits, shares, 0)
    assert loss == pytest.approx(expected, rel=1e-4) and len(outputs.auxiliary) == 2
    assert read_log(tmp_path / 'log.txt')['Train Loss'] == [pytest.approx(expected, rel=1e-4)]
    momentum = load(tmp_path)['optimizer']['state'].values()
    assert all(one['momentum_buffer'].any() for one in momentum)  # every layer, also the auxiliary ones, had a gradient


@pytest.mark.parametrize('flags', ['', '--mixup 0.4 --cutmix 1', '--cutmix 1 --method dma'])
def test_smoothed_and_mixed_targets_are_what_the_loss_is_of(flags, losses, root, monkeypatch, tmp_path):
    call(monkeypatch, imagenet, f'{TINY} --label-smoothing 0.1 -d {root} -c {tmp_path} {flags}')
    assert len(losses) == 3
    for outputs, targets, loss in losses:
        logits, angles = outputs if 'dma' in flags else (outputs, None)
        shares = targets if flags else torch.eye(3)[targets]
        assert torch.allclose(shares.sum(1), torch.ones(14)) and shares.shape == (14, 3)
        assert bool(((shares > 0.01) & (shares < 0.99)).any()) == bool(flags)
        expected = smoothed_cross_entropy(logits, shares, 0.1)
        if angles is not None:
            expected += sum(0.5 * 0.5 * math.acos(max(row)) ** 2 for row in angles.double().tolist()) / 14
        assert loss == pytest.approx(expected, rel=1e-4)
    log = read_log(tmp_path / 'log.txt')
    assert log['Train Loss'] == [pytest.approx(sum(loss for *_, loss in losses) / 3, rel=1e-4)]
    right = [logits.argmax(1) == (targets.argmax(1) if flags else targets)
             for outputs, targets, _ in losses for logits in [outputs[0] if 'dma' in flags else outputs]]
    assert log['Train Top-1'] == [pytest.approx(100 * torch.cat(right).double().mean().item(), rel=1e-4)]


def test_the_moving_average_is_that_of_a_plain_loop(root, monkeypatch, tmp_path):
    steps, build = [], methods.build_optimizer

    def recording(args, model, *rest, **options):
        optimizer = build(args, model, *rest, **options)
        optimizer.register_step_post_hook(lambda *_: steps.append({name: value.double() for name, value
                                                                   in model.state_dict().items()}))
        return optimizer

    monkeypatch.setattr(methods, 'build_optimizer', recording)
    call(monkeypatch, imagenet, f'{TINY} --epochs 2 --ema 0.8 -d {root} -c {tmp_path}')
    assert len(steps) == 6
    average, state = steps[0], load(tmp_path)
    for weights in steps[1:]:
        average = {name: 0.8 * value + 0.2 * weights[name] for name, value in average.items()}
    for name, expected in average.items():
        if state['state_dict'][name].is_floating_point():
            torch.testing.assert_close(state['ema'][f'module.{name}'].double(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state['state_dict'][name].double(), steps[-1][name], rtol=0, atol=0)
    whole = {name: state['state_dict'][name] if not state['state_dict'][name].is_floating_point() else value.float()
             for name, value in average.items()}
    assert_result(result(tmp_path), by_hand_on(whole, 'tiny', root))


# Broken off and resumed

def stopped(monkeypatch, flags, epoch, step):
    """A run that ends like one that was killed after `step` batches of epoch `epoch`, counted from 0."""
    steps = Run.steps

    def killed(run, number):
        for item in steps(run, number):
            if item[0] == epoch * run.steps_per_epoch + step:
                raise KeyboardInterrupt
            yield item
        if (number, run.steps_per_epoch) == (epoch, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, 'steps', killed)
        call(patch, imagenet, flags)


def leaves(value, path=''):
    """Every tensor, number and string in a checkpoint, by its path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {path: value}
    return {key: leaf for name, part in value for key, leaf in leaves(part, f'{path}/{name}').items()}


def assert_same_run(folder, reference):
    for name in ('checkpoint.pth.tar', 'model_best.pth.tar'):
        ours, theirs = leaves(load(folder, name)), leaves(load(reference, name))
        assert ours.keys() == theirs.keys() and len(ours) > 40
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key], key
    logs = [[line.split('\t')[:-1] for line in (path / 'log.txt').read_text().splitlines()] for path
            in (folder, reference)]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    ours, theirs = result(folder), result(reference)
    untimed = {'seconds': 0, 'seconds per epoch': 0}
    assert {**ours, **untimed} == {**theirs, **untimed}


@pytest.mark.parametrize('name, every, epoch, step, kept', [
    ('tiny', '--checkpoint-every 2', 1, 3, (1, 2)),  # in the middle of the second epoch
    ('tiny', '--checkpoint-every 2', 0, 5, (0, 4)),
    ('tiny', '', 1, 4, (1, 0)),  # between the epochs
    ('mobilenet', '--checkpoint-every 2', 1, 4, (1, 4)),
])
def test_broken_off_and_started_again_by_the_same_command(name, every, epoch, step, kept, runs, root, monkeypatch,
                                                          tmp_path):
    flags = f'{RUNS[name]} -d {root} -c {tmp_path}/run --resume auto {every}'
    stopped(monkeypatch, flags, epoch, step)
    state = load(tmp_path / 'run')
    assert (state['epoch'], state['step']) == kept
    call(monkeypatch, imagenet, flags)
    assert_same_run(tmp_path / 'run', runs / name)


def test_a_checkpoint_of_the_middle_of_an_epoch_needs_the_same_batches(root, monkeypatch, tmp_path):
    flags = f'{TINY} -d {root} --checkpoint-every 1'
    stopped(monkeypatch, f'{flags} -c {tmp_path}/run', 0, 2)
    before = contents(tmp_path / 'run')
    for batch, now in ((8, '6 of 8'), (15, '3 of 15')):  # the second has as many batches, and other images in them
        with pytest.raises(UserError) as error:
            call(monkeypatch, imagenet, f'--resume {tmp_path}/run/checkpoint.pth.tar --train-batch {batch}')
        assert str(error.value).startswith(f'{tmp_path}/run/checkpoint.pth.tar is of the middle of an epoch of 3 '
                                           'batches of 14 images, '
                                           f'and this run has {now}; ')
    assert contents(tmp_path / 'run') == before


def test_auto_on_a_finished_run_tells_the_result_again(runs, root, monkeypatch, tmp_path, capsys):
    shutil.copytree(runs / 'tiny', tmp_path / 'run')
    monkeypatch.setattr(imagenet, 'train', lambda *args: pytest.fail('trained'))
    call(monkeypatch, imagenet, f'{RUNS["tiny"]} -d {root} -c {tmp_path}/run --resume auto')
    numbers = result(runs / 'tiny')
    assert f'\nepoch 2 | test loss {numbers["test loss"]:.4f}' in capsys.readouterr().out
    assert result(tmp_path / 'run') == numbers
    assert contents(tmp_path / 'run')['log.txt'] == contents(runs / 'tiny')['log.txt']
    state, before = load(tmp_path / 'run'), load(runs / 'tiny')
    assert state['epoch'] == 2 and all(torch.equal(value, before['state_dict'][name]) for name, value
                                       in state['state_dict'].items())


@pytest.mark.parametrize('left', [None, [], ['args.json'], ['args.json', 'log.txt']])
def test_auto_where_nothing_was_saved_begins_anew(left, runs, root, monkeypatch, tmp_path):
    flags = f'{RUNS["tiny"]} -d {root} -c {tmp_path}/run --resume auto'
    if left == []:
        (tmp_path / 'run').mkdir()
    elif left:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            def killed(*args):
                raise KeyboardInterrupt

            patch.setattr(*(checkpoint, 'save') if 'log.txt' in left else (utils_run, 'Logger'), killed)
            call(patch, imagenet, flags)
        assert sorted(contents(tmp_path / 'run')) == left
    call(monkeypatch, imagenet, flags)
    assert_same_run(tmp_path / 'run', runs / 'tiny')


def test_auto_does_not_enter_a_folder_of_something_else(root, monkeypatch, tmp_path):
    (tmp_path / 'log.txt').write_text('mine')
    with pytest.raises(UserError, match='is not empty; use --overwrite, or another --checkpoint'):
        call(monkeypatch, imagenet, f'{TINY} -d {root} -c {tmp_path} --resume auto')
    assert contents(tmp_path) == {'log.txt': b'mine'}


# Images that cannot be read

@pytest.fixture
def damaged(root, tmp_path):
    """A copy of the images of which one for training and two for the test are no images any longer."""
    shutil.copytree(root, tmp_path / 'images')
    paths = [tmp_path / 'images' / name for name in ('train/green/05.jpg', 'val/blue/01.jpg', 'val/red/02.png')]
    for path in paths:
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path / 'images', paths


def test_images_that_cannot_be_read_are_skipped_counted_and_listed(damaged, monkeypatch, tmp_path, capsys):
    folder, paths = damaged
    call(monkeypatch, imagenet, f'{TINY} -d {folder} -c {tmp_path}/run')
    assert f'skipped 3 images that cannot be read: {paths[0]} (' in (printed := capsys.readouterr().out)
    assert ') and others\n' in printed
    listed = [line.split('\t') for line in (tmp_path / 'run/skipped.txt').read_text().splitlines()]
    assert [path for path, _ in listed] == [str(path) for path in paths] and all(reason for _, reason in listed)
    assert result(tmp_path / 'run')['test images'] == 10
    for path in paths[1:]:
        path.unlink()
    state = load(tmp_path / 'run')['state_dict']
    assert_result(result(tmp_path / 'run'), by_hand_on(state, 'tiny', folder))
    paths[1].write_text('no image')
    call(monkeypatch, imagenet, f'-e --resume {tmp_path}/run/checkpoint.pth.tar')
    assert f'skipped 1 image that cannot be read: {paths[1]} (' in capsys.readouterr().out


def status_and_sentence(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, 'argv', ['imagenet.py', *shlex.split(flags)])
    monkeypatch.setattr(signal, 'signal', lambda *args: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as error:
        run_script(imagenet.main)
    return (1, error.value.code) if isinstance(error.value.code, str) else (error.value.code, capsys.readouterr().err)


def test_strict_refuses_them_and_keeps_what_there_is(runs, damaged, monkeypatch, tmp_path, capsys):
    folder, paths = damaged
    shutil.copytree(runs / 'tiny', tmp_path / 'run')
    before = contents(tmp_path / 'run')
    epochs = f'--resume {tmp_path}/run/checkpoint.pth.tar -d {folder} --strict --epochs 3'
    assert status_and_sentence(monkeypatch, capsys, epochs) == (1, (
        f'error: {paths[0]} cannot be read as an image (Truncated File Read); mend or remove it, or leave --strict '
        'away to skip it'))
    after = contents(tmp_path / 'run')
    for name in ('model_best.pth.tar', 'log.txt'):
        assert after[name] == before[name]
    state, old = load(tmp_path / 'run')['state_dict'], load(runs / 'tiny')['state_dict']
    assert load(tmp_path / 'run')['epoch'] == 2 and all(torch.equal(value, old[name]) for name, value in state.items())
    status, sentence = status_and_sentence(monkeypatch, capsys, f'-e --resume {runs}/plain/checkpoint.pth.tar -d '
                                                                f'{folder} --strict')
    assert status == 1 and sentence.startswith(f'error: {paths[1]} cannot be read as an image')


# What is refused

@pytest.fixture
def refused(root, monkeypatch, capsys, tmp_path):
    """What imagenet.py says of flags: one sentence, before an image is read or a file written."""
    def say(flags, script=imagenet):
        before = sorted(path for path in tmp_path.rglob('*') if path.is_file())
        monkeypatch.setattr(folders, 'open_image', lambda path: pytest.fail('an image was read'))
        monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
        monkeypatch.chdir(tmp_path)
        with pytest.raises((SystemExit, UserError)) as error:
            call(monkeypatch, script, flags.replace('ROOT', str(root)))
        printed = capsys.readouterr().err + (str(error.value) if error.type is UserError else '')
        assert printed.strip().count('\n') == 0 and (error.type is UserError or error.value.code == 2)
        assert sorted(path for path in tmp_path.rglob('*') if path.is_file()) == before
        return printed

    return say


@pytest.mark.parametrize('flags, sentence', [
    ('', '--data DIR is required, with DIR/train/CLASS/* and DIR/val/CLASS/*'),
    ('-d ROOT/train', 'there is no folder'),
    ('-d ROOT', '--train-batch 256 is larger than the training set of 42 images'),
    ('-d ROOT --train-batch 32 --batch-multiplier 2', '--train-batch 32 times --batch-multiplier 2 is larger'),
    ('-d ROOT --train-batch 8 -a squeezenet1_0', "--arch squeezenet1_0 cannot take a method's head"),
    ('-d ROOT --train-batch 8 -a alexnet --image-size 32', '--arch alexnet cannot take images of 32 pixels ('),
    ('-d ROOT --train-batch 8 -a inception_v3 --image-size 64', 'for images of at least 299 pixels, was given 64'),
    ('-d ROOT --train-batch 8 -a vit_b_16 --image-size 50', 'a multiple of 16 pixels, was given 50'),
    ('-d ROOT --cardinality 8', '--cardinality is not used by --arch resnet18'),
    ('-d ROOT --pretrained -a resnext50', 'torchvision has no weights of resnext50'),
    ('-d ROOT --no-augment --auto-augment augmix', '--no-augment and --auto-augment exclude each other'),
    ('-d ROOT --no-augment --random-erase 0.5', '--no-augment and --random-erase exclude each other'),
    ('-d ROOT --train-batch 8 --gpu-id nonsense', '--gpu-id: must be one CUDA device, such as 0 (torchrun uses '
                                                  'several), was given nonsense'),
    (f'-d ROOT {SMALL} --method large_margin --large-margin-layers '
     'nowhere', "there is no layer 'nowhere' in this network"),
    (f'-d ROOT {SMALL} --method large_margin --label-smoothing 0.1',
     '--label-smoothing does nothing without cross-entropy'),
    (f'-d ROOT {SMALL} --train-batch 41', 'BatchNorm cannot train on a single image, and 42 images (less those that '
                                          'cannot '
                                          'be read) in parts of 41 leave one; choose another --train-batch'),
    (f'-d ROOT {SMALL} --mini-batch 1', 'choose another --mini-batch'),
    ('-d ROOT --method lsoftmax --mixup 0.2', '--method lsoftmax and --mixup cannot combine: it needs one class for '
                                              'each image'),
    ('-d ROOT --method large_margin --cutmix 1', '--method large_margin and --cutmix cannot combine'),
    ('-d ROOT --evaluate', '--evaluate needs --resume FILE, the checkpoint to evaluate, or --pretrained'),
    ('-d ROOT --evaluate --pretrained --lr 0.1', '--lr is not used by --evaluate'),
    ('-d ROOT --resume auto --overwrite', '--resume auto and --overwrite exclude each other'),
    ('-d ROOT --resume auto --evaluate', '--resume auto and --evaluate exclude each other'),
    ('-d ROOT --resume nowhere.pth.tar', 'there is no checkpoint nowhere.pth.tar'),
    ('-d ROOT --mixup -1', 'of at least 0'),
    ('-d ROOT --resize 200', '--resize 200 is less than the side of the images, which is 224'),
])
def test_wrong_flags(flags, sentence, refused):
    assert sentence in refused(flags)


def test_folders_that_do_not_fit(refused, root, tmp_path):
    for part, name in (('train', 'cat'), ('train', 'dog'), ('val', 'dog')):
        (tmp_path / 'set' / part / name).mkdir(parents=True)
        (tmp_path / 'set' / part / name / '0.png').touch()
    flags = f'{SMALL} --train-batch 2 -d {tmp_path}/set'
    assert 'must have the same class folders, but only one of them has: cat' in refused(flags)
    (tmp_path / 'set/val/cat').mkdir()
    sentence = f'{tmp_path}/set/val: every class folder must have an image (jpg, png, ...), but there is none in cat'
    assert sentence in refused(flags)
    shutil.rmtree(tmp_path / 'set/val')
    assert f'there is no folder {tmp_path}/set/val' in refused(flags)


@pytest.mark.parametrize('flags, sentence', [
    ('--pretrained', '--pretrained is where a new run begins'), ('-e --lr 0.1', '--lr is not used by --evaluate'),
    ('-e --mixup 0.1', '--mixup is not used by --evaluate'),
    ('-a resnet18', 'holds the architecture shufflenet_v2_x0_5'),
    ('-a resnet18 -e', 'holds the architecture shufflenet_v2_x0_5'), ('--manualSeed 4', '--manualSeed cannot change'),
    ('-d other -e', 'knows the classes blue green red, but other has blue green yellow'),
    ('-d other --train-batch 3', 'knows the classes blue green red, but other has blue green yellow'),
    ('--start-epoch 1', '--start-epoch is where a new run begins'), ('--init x', '--init is where a new run begins'),
])
def test_what_contradicts_the_checkpoint(flags, sentence, refused, runs, tmp_path):
    for name in ('blue', 'green', 'yellow'):
        for part in ('train', 'val'):
            (tmp_path / 'other' / part / name).mkdir(parents=True)
            (tmp_path / 'other' / part / name / '0.png').touch()
    assert sentence in refused(f'--resume {runs}/plain/checkpoint.pth.tar {flags}')


def test_a_checkpoint_of_the_other_script(refused, runs, cifar_runs):
    path = f'{cifar_runs}/run/checkpoint.pth.tar'
    assert refused(f'-d ROOT -e --resume {path}') == f'{path} is a checkpoint of cifar.py, not of imagenet.py'
    path = f'{runs}/plain/checkpoint.pth.tar'
    assert refused(f'-e --resume {path}', cifar) == f'{path} is a checkpoint of imagenet.py, not of cifar.py'


def test_a_single_image_is_no_trouble_where_batch_norm_has_more_values(root, monkeypatch, tmp_path):
    monkeypatch.setattr('utils.run.Run.report', lambda *args: None)
    call(monkeypatch, imagenet, f'{SMALL} --image-size 64 --lr 0.001 --train-batch 41 -d {root} -c {tmp_path}')
    assert read_log(tmp_path / 'log.txt')['Epoch'] == [1]


def test_the_same_command_goes_on_although_it_names_the_first_epoch(root, monkeypatch, tmp_path):
    flags = f'{TINY} -d {root} --start-epoch 1 --epochs 3 --resume auto -c {tmp_path}/run'
    stopped(monkeypatch, flags, 2, 1)
    call(monkeypatch, imagenet, flags)
    assert load(tmp_path / 'run')['epoch'] == 3 and read_log(tmp_path / 'run' / 'log.txt')['Epoch'] == [2, 3]


def test_a_part_without_any_image_that_can_be_read_ends_the_run(root, monkeypatch, tmp_path):
    for part in ('train', 'val'):
        folder = tmp_path / part
        shutil.copytree(root, folder)
        for image in (folder / part).glob('*/*'):
            image.write_bytes(b'not an image')
        with pytest.raises(UserError, match=f'none of the images to {"train" if part == "train" else "test"} on can '
                                            'be read'):
            call(monkeypatch, imagenet, f'{TINY} -d {folder} -c {tmp_path}/run-{part}')


def test_auto_does_not_go_on_with_other_flags(refused, runs, tmp_path):
    shutil.copytree(runs / 'tiny', tmp_path / 'run')
    said = refused(f'{RUNS["tiny"]} -d ROOT --lr 0.2 --resume auto -c {tmp_path}/run')
    assert f'--resume auto would resume the run in {tmp_path}/run, which has --lr 0.1, not 0.2; give another' in said


@pytest.mark.parametrize('images, expected, size, sizes', [
    (8, 8, 4, [4, 4]), (5, 5, 4, [4, 1]), (5, 8, 4, [5]), (9, 12, 4, [4, 5]), (6, 8, 4, [4, 2]), (1, 4, 4, [1]),
    (0, 4, 4, []),
    (3, 4, 1, [1, 2])])
def test_one_image_that_others_leave_alone_goes_with_the_part_before(images, expected, size, sizes):
    assert part_sizes(images, expected, size) == sizes


# What looks at checkpoints

@pytest.mark.parametrize('kept', [4, 0])  # gigabytes: in memory, and read anew in every pass
def test_the_lab_opens_checkpoints(kept, runs, damaged, monkeypatch, tmp_path, capsys):
    folder, paths = damaged
    monkeypatch.setattr(checkpoints, 'KEPT', kept)
    checkpoint_path = f'{runs}/tiny/checkpoint.pth.tar'
    call(monkeypatch, evaluate, f'{checkpoint_path} -o {tmp_path}/out --ss 0 --draws 1')
    printed = capsys.readouterr().out
    whole = result(runs / 'tiny')
    assert f'| test loss {whole["test loss"]:.4f} top-1 {whole["test top-1"]:.2f}%' in printed
    assert f'| loss {whole["test loss"]:.4f} top-1 {whole["test top-1"]:.2f}%' in printed

    call(monkeypatch, evaluate, f'{checkpoint_path} -o {tmp_path}/out --tta mirror --as-run {tmp_path}/mirror')
    assert result(tmp_path / 'mirror')['test images'] == whole['test images']
    assert result(tmp_path / 'mirror')['test loss'] != whole['test loss']

    call(monkeypatch, evaluate, f'{checkpoint_path} -o {tmp_path}/out --data {folder} --test-batch 1')
    printed = capsys.readouterr().out
    assert f'skipped 2 images that cannot be read: {paths[1]} (' in printed and 'nan' not in printed
    for path in paths[1:]:
        path.unlink()
    numbers = by_hand_on(checkpoint.weights_to_test(load(runs / 'tiny')), 'tiny', folder)
    assert f'| test loss {numbers.loss:.4f} top-1 {numbers.top1:.2f}%' in printed

    shutil.copytree(runs / 'tiny', tmp_path / 'larger')
    state = load(runs / 'tiny')
    for change, sentence in (({'image_size': 40}, 'were trained on images of other sizes, so'),
                             ({'data': str(folder)}, f'of .* and {folder}; give the --data to measure both on')):
        torch.save({**state, 'args': {**state['args'], **change}}, tmp_path / 'larger/checkpoint.pth.tar')
        with pytest.raises(UserError, match=sentence):
            call(monkeypatch, measure_margins, f'{checkpoint_path} {tmp_path}/larger/checkpoint.pth.tar --margins')
    call(monkeypatch, measure_margins, f'{checkpoint_path} {tmp_path}/larger/checkpoint.pth.tar --margins '
                                       f'--data {folder} -o {tmp_path}')
    capsys.readouterr()

    call(monkeypatch, measure_sharpness, f'{checkpoint_path} -o {tmp_path}/out --noise --draws 1 --mode train')
    assert re.search(r'42 train images', capsys.readouterr().out)
    call(monkeypatch, measure_margins, f'{checkpoint_path} -o {tmp_path}/out --all --images 5 --pgd-steps 1')
    printed = capsys.readouterr().out
    assert 'left out: --calibration' in printed and '5 test images' in printed and 'nan' not in printed
    for flags in ('--images 10', '--images 5 --histograms --distances'):
        call(monkeypatch, visualize_features, f'{checkpoint_path} -o {tmp_path}/out {flags}')
    assert len(list((tmp_path / 'out').glob('*-*s.pdf'))) == 2
    with pytest.raises(SystemExit):
        call(monkeypatch, evaluate, f'{checkpoint_path} -o {tmp_path}/out -d digits')
    assert '--dataset is not used by' in capsys.readouterr().err
