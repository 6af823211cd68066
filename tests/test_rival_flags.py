"""Regularisers that are flags: mixing, mirroring, flooding, dropout, adversarial images, averages of weights, and two
ways to test.
"""
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cifar
import evaluate
from helpers import broken_off, call, refused, unrecorded
from models import cifar as models
from utils import checkpoint, conditions, datasets, distributed, eval as evaluation, folders, methods
from utils.batches import Batches, Split
from utils.parts import Parts
from utils.pixels import Pixels
from utils.run import validate

GOLDEN = np.load(pathlib.Path(__file__).parent / 'goldens/rivals.npz')
SHORT = '-d digits --depth 8 --lr-schedule onecycle --train-batch 16 --manualSeed 3'


def images_of(count, classes=4, side=8):
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=generator),
                 torch.arange(count) % classes, [str(label) for label in range(classes)])


class Steps:
    """Steps of cifar.py in double precision on random images, two an epoch, without a folder."""

    def __init__(self, flags, arch='lenet'):
        parser = cifar.make_parser()
        self.args = parser.parse_args(f'--train-batch 8 --manualSeed 1 --lr 0.05 --epochs 2 --lr-schedule cosine '
                                      f'{flags}'.split())
        methods.check_arguments(self.args, parser)
        validate(self.args, None, None, parser, torch.nn.Linear(1, 1))
        torch.manual_seed(0)
        options = {'depth': 8} if arch == 'resnet' else {}
        self.model = models.build(arch, 4, methods.build_head(self.args), **options).double()
        self.batches = Batches(images_of(16, side=32), [100.0] * 3, [60.0] * 3, 8, 'cpu')
        for name in ('mean', 'std'):
            setattr(self.batches, name, getattr(self.batches, name).double())
        self.optimizer = methods.build_optimizer(self.args, self.model, 2)
        self.criterion = methods.build_criterion(self.args, self.model, [4] * 4)
        self.run = unrecorded(self.args, self.model, self.optimizer, self.batches)

    def train(self, epochs=1):
        for epoch in range(epochs):
            self.measured = cifar.train(self.run, self.criterion, self.optimizer, epoch, self.args)
        return [p.detach().clone() for p in self.model.parameters()]


def first_batch(steps):
    return next(iter(steps.batches.shuffled(1, 0)))


# Mixing and mirroring

@pytest.mark.parametrize('alphas', [(1.0, 0), (0, 1.0), (0.4, 1.0)])
@pytest.mark.parametrize('processes, transform', [(2, None), (3, None), (3, lambda image: image)])
def test_processes_mix_the_partners_that_one_mixes(alphas, processes, transform, monkeypatch):
    def shuffled():
        split, mix = images_of(20), folders.mixing(*alphas, 4)
        batches = Batches(split, [100.0] * 3, [60.0] * 3, 6, 'cpu', padding=1, flip=True, cutout=2, mix=mix,
                          transform=transform, workers=1)
        return list(batches.shuffled(5, 1)), list(batches.shuffled(5, 1, first=2))

    whole, later = shuffled()
    assert [len(targets) for _, targets in whole] == [6, 6, 6, 2] and len(later) == 2
    assert all(torch.equal(a, b) for one, other in zip(whole[2:], later) for a, b in zip(one, other))
    monkeypatch.setattr(distributed, 'world_size', lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, 'rank', lambda: rank)
        parts.append(shuffled()[0])
    for index, (images, targets) in enumerate(whole):
        assert torch.equal(torch.cat([part[index][0] for part in parts]), images), index
        assert torch.equal(torch.cat([part[index][1] for part in parts]), targets), index
        assert targets.shape == (len(images), 4) and torch.allclose(targets.sum(dim=1), torch.ones(len(images)))


def test_processes_mix_the_partners_of_files_that_one_mixes(monkeypatch, tmp_path):
    from PIL import Image
    generator = np.random.default_rng(0)
    for label in 'ab':
        (tmp_path / 'train' / label).mkdir(parents=True)
        for number in range(7):
            Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(
                tmp_path / 'train' / label / f'{number}.png')
    (tmp_path / 'train/a/short.png').write_bytes((tmp_path / 'train/a/0.png').read_bytes()[:60])
    paths = sorted((tmp_path / 'train').rglob('*.png'))
    labels = torch.tensor(['ab'.index(path.parent.name) for path in paths])
    folder = folders.Folder([str(path) for path in paths], labels, ['a', 'b'])

    def shuffled():
        batches = folders.ImageBatches(folder, [0.0] * 3, [1.0] * 3, 6, 'cpu', folders.training_transform(8), 0,
                                       folders.mixing(1.0, 1.0, 2))
        return [list(batches.shuffled(5, epoch)) for epoch in range(4)]

    whole, parts = shuffled(), []
    monkeypatch.setattr(distributed, 'world_size', lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, 'rank', lambda: rank)
        parts.append(shuffled())
    for epoch, batches in enumerate(whole):
        for index, (images, targets) in enumerate(batches):
            assert torch.equal(torch.cat([part[epoch][index][0] for part in parts]), images), (epoch, index)
            assert torch.equal(torch.cat([part[epoch][index][1] for part in parts]), targets), (epoch, index)


def test_mixup_by_hand():
    """Each image with the one before it in the batch, by one share for the whole batch."""
    split = images_of(12)
    plain, mixed = (Batches(split, [0.0] * 3, [1.0] * 3, 6, 'cpu', mix=mix)
                    for mix in (None, folders.mixing(1.0, 0, 4)))
    shares = []
    for (images, labels), (found, targets) in zip(plain.shuffled(3, 0), mixed.shuffled(3, 0)):
        share = next(targets[i, labels[i]].item() for i in range(6) if labels[i] != labels[i - 1])
        shares.append(share)
        for i in range(6):
            torch.testing.assert_close(found[i], share * images[i] + (1 - share) * images[i - 1], rtol=1e-4, atol=1e-2)
            expected = torch.zeros(4)
            expected[labels[i]] += share
            expected[labels[i - 1]] += 1 - share
            torch.testing.assert_close(targets[i], expected)
    assert shares[0] != shares[1]


@pytest.mark.parametrize('kind', ['memory', 'files'])
def test_alternating_mirrors_each_image_in_every_second_epoch(kind):
    split = images_of(40)
    names = {tuple(image.flatten().tolist()): number for number, image in enumerate(split.images)}
    names |= {tuple(image.flip(1).flatten().tolist()): -1 - number for number, image in enumerate(split.images)}

    class Files:  # what ImageBatches reads from
        labels, classes, class_counts = split.labels, split.classes, split.class_counts

        def image(self, index):
            from PIL import Image
            return Image.fromarray(split.images[index].numpy())

    def epoch(number, seed=1):
        if kind == 'memory':
            batches = Batches(split, [0.0] * 3, [1.0] * 3, 16, 'cpu', flip='alternating')
        else:
            batches = folders.ImageBatches(Files(), [0.0] * 3, [1.0] * 3, 16, 'cpu', folders.small_image_transform(), 0,
                                           alternate=True)
        images = torch.cat([images for images, _ in batches.shuffled(seed, number)])
        return {names[tuple(image.permute(1, 2, 0).flatten().int().tolist())] for image in images}

    first, second, third = epoch(0), epoch(1), epoch(2)
    assert first == third and second == {-1 - number for number in first} and len(first) == 40
    assert 8 < sum(number < 0 for number in first) < 32 and epoch(0, seed=2) != first


# Flooding

@pytest.mark.parametrize('flags', ['', '--mini-batch 4', '--clip-norm 0.1', '--method dma --coef 0.3'])
def test_below_the_flood_the_step_goes_up(flags):
    dry = Steps(flags)
    images, targets = first_batch(dry)
    loss = dry.criterion(dry.model(images, targets), targets).item()
    before = [p.detach().clone() for p in dry.model.parameters()]
    steps = {}
    for level in (None, loss / 2, loss * 2):
        steps[level] = Steps(f'{flags} --momentum 0 --wd 0' + (f' --flood {level}' if level else ''))
        parts = Parts(steps[level].run.network, steps[level].optimizer, steps[level].args)
        batch = next(iter(steps[level].run.steps(0)))[1]
        steps[level].optimizer.zero_grad()
        for part, labels, weight in parts.of(batch):
            outputs = steps[level].model(part, labels)
            value = steps[level].criterion(outputs, labels)
            (weight * value).backward()
            parts.keep(outputs, value)
        parts.flood(steps[level].args.flood)
        assert parts.loss.item() == pytest.approx(loss)  # what is logged is the loss itself
    for plain, above, below, start in zip(*(each.model.parameters() for each in steps.values()), before):
        assert torch.equal(plain.grad, above.grad) and torch.equal(plain.grad, -below.grad)
        assert torch.equal(plain, start)


def test_flooding_is_of_the_mean_over_the_whole_batch_and_zero_exactly_at_it():
    """Not the mean of |loss - level| over ghost batches, which is another function."""
    steps = Steps('--mini-batch 4')
    parts = Parts(steps.run.network, steps.optimizer, steps.args)
    parts.trained_losses, parts.local_images, parts.batch_size = [torch.tensor(1.0), torch.tensor(0.5)], 8, 8
    for level, sign in ((1.0, 1), (1.5, 0), (2.0, -1)):
        for p in steps.model.parameters():
            p.grad = torch.ones_like(p)
        parts.flood(level)
        assert all((p.grad == sign).all() for p in steps.model.parameters())


def test_golden_of_flooding():
    g = {name: torch.tensor(GOLDEN[f'flooding/{name}']) for name in ('batch_loss', 'batch_grad', 'levels', 'grad')}
    weights = torch.nn.Linear(1, g['batch_grad'].shape[1], bias=False).double()
    parser = cifar.make_parser()
    parts = Parts(weights, None, parser.parse_args([]))
    parts.local_images = parts.batch_size = 8
    for level, expected in zip(g['levels'].tolist(), g['grad']):
        for loss, gradient, wanted in zip(g['batch_loss'], g['batch_grad'], expected):
            parts.trained_losses, weights.weight.grad = [loss], gradient[:, None].clone()
            parts.flood(level)
            assert torch.equal(weights.weight.grad[:, 0], wanted)


# Adversarial images

@pytest.mark.parametrize('epsilon', GOLDEN['fgsm/epsilons'].tolist())
def test_golden_of_fgsm(epsilon):
    """Features between 0 and 1, here as the pixels of an image of one row."""
    x, gradient = (torch.tensor(GOLDEN[f'fgsm/{name}'])[:, None, None].expand(-1, 3, 1, -1) for name in ('x', 'gx'))
    key = next(key for key in GOLDEN.files if key.startswith(f'fgsm/eps{epsilon:g}/') and key.endswith('01/x_adv'))
    moved = Pixels(torch.zeros(3), torch.full((3,), 255.0)).uphill(x, gradient, epsilon)
    np.testing.assert_allclose(moved[:, 0, 0], GOLDEN[key], rtol=0, atol=1e-9)


def test_the_flood_is_of_the_loss_of_both_passes():
    steps = Steps('--adversarial 0.3')
    parts = Parts(steps.run.network, steps.optimizer, steps.args, steps.run.pixels)
    batch, losses = next(iter(steps.run.steps(0)))[1], []
    for images, targets, weight in parts.of(batch):
        outputs = steps.model(images, targets)
        losses.append(steps.criterion(outputs, targets))
        (weight * losses[-1]).backward()
        parts.keep(outputs, losses[-1])
    clean, moved = (loss.item() for loss in losses)
    gradients = [p.grad.clone() for p in steps.model.parameters()]
    parts.flood((clean + (clean + moved) / 2) / 2)  # above the first pass, below the mean of both
    assert clean < moved and parts.loss.item() == pytest.approx(clean)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(steps.model.parameters(), gradients))


@pytest.mark.parametrize('flags', ['', '--mini-batch 4', '--method dma amp --epsilon 0.1', '--method lsoftmax'])
def test_half_of_the_gradient_is_that_of_adversarial_images(flags):
    steps = Steps(f'{flags} --adversarial 8/255')
    images, targets = first_batch(steps)
    batch = next(iter(steps.run.steps(0)))[1]
    parts = Parts(steps.run.network, steps.optimizer, steps.args, steps.run.pixels)
    seen = []
    for part, labels, weight in parts.of(batch):
        outputs = steps.model(part, labels)
        loss = steps.criterion(outputs, labels)
        (weight * loss).backward()
        parts.keep(outputs, loss)
        seen.append((part.detach(), labels, weight))
    found = [p.grad.clone() for p in steps.model.parameters()]
    assert parts.logits.shape == (8, 4) and len(seen) == (4 if 'mini' in flags else 2)

    steps.optimizer.zero_grad()
    size = 4 if 'mini' in flags else 8
    for part, labels in zip(images.split(size), targets.split(size)):
        leaf = part.clone().requires_grad_()
        slope, = torch.autograd.grad(steps.criterion(steps.model(leaf, labels), labels), leaf)
        in_pixels = part * 60 + 100
        moved = ((in_pixels + 8 * slope.sign()).clamp(0, 255) - 100) / 60
        for each in (part, moved):
            (steps.criterion(steps.model(each, labels), labels) * len(labels) / 16).backward()
    for p, gradient in zip(steps.model.parameters(), found):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)
    steps.train(2)
    assert all(p.isfinite().all() for p in steps.model.parameters())


def test_a_step_in_pixels_stays_a_colour():
    pixels = Pixels(torch.tensor([100.0, 50, 0]), torch.tensor([50.0, 60, 70]))
    images = torch.tensor([0.0, 250, 255]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    normalised = (images - torch.tensor([100.0, 50, 0]).view(3, 1, 1)) / torch.tensor([50.0, 60, 70]).view(3, 1, 1)
    moved = pixels.uphill(normalised, torch.tensor([-1.0, 1.0, 0.0]).expand(1, 3, 1, 3), 8 / 255)
    back = moved * torch.tensor([50.0, 60, 70]).view(3, 1, 1) + torch.tensor([100.0, 50, 0]).view(3, 1, 1)
    torch.testing.assert_close(back, torch.tensor([0.0, 255, 255]).expand(1, 3, 1, 3), rtol=0, atol=1e-4)


# Dropout, averages, tests

def test_dropout_is_before_the_head_of_every_network():
    for arch in ('lenet', 'resnet', 'vgg11_bn', 'mlp'):
        steps = Steps('--dropout 0.5', arch)
        model = cifar.build(steps.args, {'arch': arch, 'num_classes': 4}) if arch != 'resnet' else cifar.build(
            steps.args, {'arch': arch, 'num_classes': 4, 'depth': 8})
        seen = []
        model.head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
        features = torch.ones(200, model.in_features)
        model.classify(features)
        model.eval().classify(features)
        dropped, kept = (seen[0] == 0).float().mean(), seen[0][seen[0] > 0]
        assert 0.4 < dropped < 0.6 and (kept == 2).all() and torch.equal(seen[1], features), arch


def test_the_mean_of_weights_is_that_of_the_epochs_behind_its_start():
    steps = Steps('--swa 0.5 --epochs 4', 'resnet')
    run, kept = steps.run, []
    for epoch in range(4):
        cifar.train(run, steps.criterion, steps.optimizer, epoch, steps.args)
        kept.append([p.detach().clone() for p in steps.model.parameters()])
        assert run.averaging == (epoch >= 2)
        assert run.to_test is (run.average.module if epoch >= 2 else steps.model)
    for p, first, second in zip(run.average.module.parameters(), kept[2], kept[3]):
        torch.testing.assert_close(p, (first + second) / 2)


def test_statistics_of_the_mean_are_there_where_images_pass_one_by_one():
    steps = Steps('--swa 0 --train-batch 4 --mini-batch 1', 'resnet')
    cifar.train(steps.run, steps.criterion, steps.optimizer, 0, steps.args)
    assert steps.run.average.module.bn1.running_mean.abs().max() > 1e-3


@pytest.mark.parametrize('ghost', ['', '--mini-batch 4'])
def test_statistics_of_the_mean_are_the_mean_over_ghost_batches(ghost, monkeypatch):
    steps = Steps(f'--swa 0 {ghost}', 'resnet')
    for model in (steps.model, steps.run.average.module):
        model.layer2.requires_grad_(False)  # whose statistics stay
    cifar.train(steps.run, steps.criterion, steps.optimizer, 0, steps.args)
    network, seen = steps.run.average.module, []
    found = {name: value.clone() for name, value in network.named_buffers()}
    network.train()
    hook = network.bn1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for images, _ in steps.batches.shuffled(1, 0):
        for part in images.split(4 if ghost else 8):
            network.features(part)
    hook.remove()
    mean = sum(x.mean(dim=(0, 2, 3)) for x in seen) / len(seen)
    variance = sum(x.var(dim=(0, 2, 3), unbiased=True) for x in seen) / len(seen)
    assert len(seen) == (4 if ghost else 2)
    torch.testing.assert_close(found['bn1.running_mean'], mean)
    torch.testing.assert_close(found['bn1.running_var'], variance)
    frozen = steps.model.layer2[0].bn1.running_mean
    assert torch.equal(found['layer2.0.bn1.running_mean'], frozen)


def test_layers_behind_frozen_ones_get_statistics_of_what_they_see():
    steps = Steps('--swa 0', 'resnet')
    for model in (steps.model, steps.run.average.module):
        for frozen in (model.conv1, model.bn1, model.layer1):
            frozen.requires_grad_(False)
        model.bn1.running_mean.fill_(0.3)
    cifar.train(steps.run, steps.criterion, steps.optimizer, 0, steps.args)
    network, seen = steps.run.average.module, []
    norm = network.layer2[0].bn1
    found, momentum = norm.running_mean.clone(), norm.momentum
    network.train()
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().mean(dim=(0, 2, 3))))
    for images, _ in steps.batches.shuffled(1, 0):
        network.features(images)
    torch.testing.assert_close(found, sum(seen) / len(seen))
    assert momentum == steps.model.layer2[0].bn1.momentum and (network.bn1.running_mean == 0.3).all()


def test_of_equal_logits_the_first_counts_everywhere():
    meter, logits = evaluation.Meter(1, 10, 'cpu'), torch.zeros(4, 10)
    meter.update(logits, torch.tensor([0, 0, 8, 9]), torch.tensor(1.0))
    assert meter.read()['Top-1'] == 50 and meter.read()['Top-5'] >= 50


def test_the_mean_of_two_tests_is_not_rounded_to_bf16():
    outputs = iter((torch.tensor([[2.0]]).bfloat16(), torch.tensor([[2.015625]]).bfloat16()))
    assert evaluation.predict(lambda images: next(outputs), torch.zeros(1, 3, 2, 2), 'mirror').item() == 2.0078125


def test_the_mirrored_test_is_the_mean_of_two():
    model, images = models.build('lenet', 4).eval(), torch.randn(3, 3, 32, 32)
    expected = (model(images) + model(images.flip(-1))) / 2
    torch.testing.assert_close(evaluation.predict(model, images, 'mirror'), expected)
    assert torch.equal(evaluation.predict(model, images), model(images))


@pytest.mark.parametrize('flags', [
    '--mixup 0.4 --cutmix 1 --dropout 0.3 --flood 1 --mini-batch 8 --swa 0 --checkpoint-every 2 --val-split 0.2',
    '--adversarial 8/255 --method lsoftmax sam --direction momentum --swa 0.3 --tta mirror'])
def test_interrupted_and_resumed(flags, few_digits, mirrored_digits, monkeypatch, tmp_path):
    flags = f'{SHORT} --epochs 3 {flags}'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=2)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    states = [torch.load(tmp_path / name / 'checkpoint.pth.tar', weights_only=True) for name in ('whole', 'parts')]
    for part in ('state_dict', 'ema'):
        whole, parts = (state[part] or {} for state in states)
        assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())
    results = [json.load(open(tmp_path / name / 'result.json'))['check sums'] for name in ('whole', 'parts')]
    assert results[0] == results[1]


@pytest.mark.parametrize('epochs, start', [(90, 0.7), (180, 0.7), (100, 0.57), (200, 0.29), (4, 0.5), (10, 0.0)])
def test_the_mean_is_of_the_epochs_behind_its_share_of_them(epochs, start):
    """0.7 of 90 epochs are 63, though 0.7 * 90 is 62.99999999999999."""
    steps = Steps(f'--swa {start} --epochs {epochs}', 'mlp')
    run, averaged = steps.run, []
    run.average.update_parameters = lambda model: averaged.append(epoch)
    run.batches['train'].shuffled = lambda *args: iter(())
    for epoch in range(epochs):
        list(run.steps(epoch))
    assert averaged == list(range(round(start * epochs), epochs))


def test_the_mean_of_weights_is_what_a_checkpoint_is_tested_with(few_digits, monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{SHORT} --epochs 3 --swa 0.4 -c {tmp_path}')
    result = json.load(open(tmp_path / 'result.json'))
    capsys.readouterr()
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --evaluate')
    assert f'{result["test loss"]:.4f}' in capsys.readouterr().out
    state = torch.load(tmp_path / 'checkpoint.pth.tar', weights_only=True)
    weights = checkpoint.weights_to_test(state)
    assert state['ema']['n_averaged'] == 2 and not torch.equal(weights['head.weight'], state['state_dict'][
        'head.weight'])


def test_logits_are_adjusted_post_hoc_for_any_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    call(monkeypatch, cifar, f'-d digits -a lenet --epochs 2 --train-batch 32 --imbalance exp --imbalance-factor 0.05 '
                             f'--lr 0.02 --manualSeed 1 -c {tmp_path}')
    path = tmp_path / 'checkpoint.pth.tar'
    capsys.readouterr()
    call(monkeypatch, evaluate, f'{path} --logit-adjust 1')
    printed = capsys.readouterr().out
    call(monkeypatch, evaluate, f'{path} --images 20 -d digits --precision fp32')
    assert f'{path}, of epoch 2 | logit adjust 1 | test loss' in printed
    assert f'{path}, of epoch 2 | dataset digits | images 20 | precision fp32 | test' in capsys.readouterr().out
    assert {file.name for file in tmp_path.glob('checkpoint-*')} == {
        f'checkpoint-test-{how}-confusion.{kind}' for kind in ('csv', 'png')
        for how in ('logit-adjust-1', 'dataset-digits-images-20-precision-fp32')}  # not the network's own

    state = checkpoint.read(str(path))
    model = models.build('lenet', 10)
    model.load_state_dict(state['state_dict'])
    test = datasets.load('digits', None, 'test')
    args = cifar.make_parser().parse_args('--imbalance exp --imbalance-factor 0.05'.split())
    conditions.check_arguments(args, cifar.make_parser())
    counts = conditions.apply(args, datasets.load('digits', None, 'train'))[0].class_counts()
    assert max(counts) > 10 * min(counts)
    images = Batches(test, state['mean'], state['std'], 1000, 'cpu')
    hits, losses = 0, 0.0
    with torch.no_grad():
        for inputs, targets in images:
            for logits, target in zip(model.eval()(inputs), targets):
                moved = [value - np.log(count / sum(counts)) for value, count in zip(logits.tolist(), counts)]
                hits += int(np.argmax(moved)) == target
                losses += F.cross_entropy(torch.tensor(moved)[None], target[None]).item()
    assert f'loss {losses / len(test.labels):.4f} top-1 {100 * hits.item() / len(test.labels):.2f}%' in printed

    shutil.rmtree(tmp_path)
    call(monkeypatch, cifar, f'-d digits -a lenet --epochs 1 --method logit_adjustment -c {tmp_path}')
    with pytest.raises(Exception, match='--logit-adjust would adjust twice'):
        call(monkeypatch, evaluate, f'{path} --logit-adjust 1')


def test_evaluate_tests_as_the_run_did_unless_told_otherwise(few_digits, mirrored_digits, monkeypatch, tmp_path,
                                                             capsys):
    flags = '-d digits -a lenet --epochs 1 --train-batch 32 --lr 0.02 --manualSeed 1'
    call(monkeypatch, cifar, f'{flags} --tta mirror -c {tmp_path}/mirror')
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/plain')
    losses = {}
    for run in ('mirror', 'plain'):
        losses[run] = json.loads((tmp_path / run / 'result.json').read_text())['test loss']
    assert losses['mirror'] != losses['plain']
    for run, flag, expected in (('mirror', '', 'mirror'), ('mirror', '--tta none', 'plain'), ('plain', '', 'plain'),
                                ('plain', '--tta mirror', 'mirror')):
        capsys.readouterr()
        call(monkeypatch, evaluate, f'{tmp_path}/{run}/checkpoint.pth.tar {flag}')
        assert f'test loss {losses[expected]:.4f} ' in capsys.readouterr().out


@pytest.mark.parametrize('flags, sentence', [
    ('-d digits --ema 0.9 --swa 0.5', '--ema and --swa exclude each other'),
    ('-d digits --swa 1', 'of at least 0 and at most 0.999999, was given 1'),
    ('-d digits --adversarial 0', '--adversarial 0 changes no image'),
    ('-d digits --adversarial 8', 'must be a share of the way from black to white, from 0 to 1, such as 8/255'),
    ('-d digits --flood 0', 'must be a number above 0, was given 0'),
    ('-d digits --tta mirror', '--tta mirror is not for --dataset digits, whose mirrored images mean something else'),
    ('-d digits --hflip alternating', '--hflip is not used by --dataset digits'),
    ('-d cifar10 --hflip random --no-augment', '--no-augment and --hflip exclude each other'),
    ('-d digits --method arcface --mixup 1', '--method arcface and --mixup cannot combine'),
    ('-d digits --method hinge --cutmix 1', '--method hinge and --cutmix cannot combine'),
    ('-d digits --method hinge --label-smoothing 0.1', '--label-smoothing does nothing without cross-entropy'),
    ('-d digits --mixup 0.001', 'must be 0, or a number from 0.01 to 10000, was given 0.001'),
    ('-d digits --cutmix 1e5', 'must be 0, or a number from 0.01 to 10000, was given 1e5'),
    ('-d digits --bias-lr-factor 1000 --lr 1e33 --optimizer Adam', 'the learning rate must not become more than'),
    ('-d digits --tta crop', "invalid choice: 'crop'"),
    ('-d digits --dropout 1.5', 'at most 1, was given 1.5'),
])
def test_what_cannot_work_is_refused(flags, sentence, monkeypatch, capsys, tmp_path):
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags)
