import json
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import AutoAugmentPolicy

import cifar
import evaluate
from models import cifar as models
from models.base import ImageClassifier, global_average_pool
from utils import datasets
from utils.batches import Batches, Split, auto_augment, cut_out, mean_and_std
from utils.folders import small_image_transform

CPU = torch.device('cpu')
MEAN, STD = [120.0, 100.0, 80.0], [60.0, 50.0, 40.0]


def random_split(number=12, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (number, size, size, 3), generator=generator).to(torch.uint8)
    # each image is a class of its own
    return Split(images, torch.arange(number), [str(name) for name in range(number)])


def make(split=None, batch_size=4, **options):
    return Batches(split or random_split(), MEAN, STD, batch_size, 'cpu', **options)


def normalised(images):
    return ((images.float() - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def assert_same(batches, others):
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


# Transforms, at the top of the file because worker processes may have to find them by name

def as_it_is(image):
    return image


def three_draws(image):
    """A float image whose channels say what Python's, NumPy's and PyTorch's generators gave."""
    return torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])[:, None,
                                                                                      None].expand(3, *image.size[::-1])


def pixels_as_floats(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def all_ones(image):
    assert image.mode == 'RGB'
    return torch.ones(3, 32, 32)


def all_twos(image):
    return torch.full((3, 32, 32), 2.0)


# Cutout

@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), batch=st.integers(0, 3), height=st.integers(1, 7), width=st.integers(1, 7),
       size=st.integers(1, 9))
@example(seed=0, batch=3, height=6, width=6, size=2)
@example(seed=0, batch=3, height=6, width=6, size=3)
def test_cut_out_pixel_by_pixel(seed, batch, height, width, size):
    generator = torch.Generator().manual_seed(seed)
    images = 1 + torch.rand(batch, 3, height, width, generator=generator)
    centre = torch.stack([torch.randint(side, (batch,), generator=generator) for side in (height, width)], dim=1)
    before = images.clone().contiguous(memory_format=torch.channels_last)
    result = cut_out(images, size, centre)
    assert result is images
    for i in range(batch):
        first_row, first_column = (centre[i] - size // 2).tolist()
        for row in range(height):
            for column in range(width):
                erased = first_row <= row < first_row + size and first_column <= column < first_column + size
                assert result[i, :, row, column].tolist() == ([0, 0, 0] if erased
                                                              else before[i, :, row, column].tolist())


@pytest.mark.parametrize('size, centre, rows, columns', [
    (4, (0, 0), (0, 2), (0, 2)), (4, (7, 7), (5, 8), (5, 8)), (4, (3, 5), (1, 5), (3, 7)), (3, (0, 7), (0, 2), (6, 8)),
    (3, (4, 4), (3, 6), (3, 6)), (1, (7, 0), (7, 8), (0, 1)), (16, (4, 4), (0, 8), (0, 8)),
])
def test_squares_of_even_and_odd_sizes_at_the_borders(size, centre, rows, columns):
    image = cut_out(torch.ones(1, 3, 8, 8), size, torch.tensor([centre]))
    expected = torch.ones(1, 3, 8, 8)
    expected[:, :, slice(*rows), slice(*columns)] = 0
    assert torch.equal(image, expected)


def test_cutout_erases_one_square_in_each_image_and_everywhere():
    split = random_split(900, size=5)
    split.images[:] = 200  # nothing is 0 when it is normalised
    seen = set()
    for images, _ in make(split, batch_size=100, cutout=1).shuffled(0, 0):
        assert (images == 0).sum(dim=(2, 3)).eq(1).all()
        seen.update(map(tuple, (images[:, 0] == 0).nonzero()[:, 1:].tolist()))
    assert seen == {(row, column) for row in range(5) for column in range(5)}


def test_cutout_leaves_order_and_crops_as_they_are():
    plain, cut = (make(padding=2, flip=True, cutout=size) for size in (0, 3))
    squares = []
    for epoch in (0, 1):
        for (images, labels), (erased, same_labels) in zip(plain.shuffled(1, epoch), cut.shuffled(1, epoch),
                                                           strict=True):
            hole = (erased == 0).all(dim=1, keepdim=True)
            assert torch.equal(labels, same_labels) and torch.equal(images.masked_fill(hole, 0), erased)
            assert 4 <= hole[0].sum() <= 9 and not torch.equal(images, erased)
            squares.append(hole)
    assert not torch.equal(squares[0], squares[3])  # another epoch has other squares
    assert_same(cut, make())  # in order nothing is erased or moved


def test_cutout_depends_on_seed_epoch_and_index_alone():
    batches = make(padding=2, flip=True, cutout=3)
    epoch = list(batches.shuffled(1, 3))
    torch.manual_seed(99)
    list(batches.shuffled(1, 2))
    assert_same(batches.shuffled(1, 3), epoch)


# Transforms of single images

@pytest.mark.parametrize('size', [5, 8])
def test_a_transform_gets_the_cropped_and_mirrored_image_and_the_labels_are_the_same(size):
    split = random_split(size=size)
    plain, transformed = (make(split, padding=2, flip=True, transform=f) for f in (None, as_it_is))
    for epoch in (0, 1):
        assert_same(plain.shuffled(1, epoch), transformed.shuffled(1, epoch))
    assert_same(transformed, plain)
    assert torch.equal(torch.cat([images for images, _ in transformed]), normalised(split.images))


def test_what_is_a_pil_image_is_normalised_and_what_is_a_float_tensor_is_not():
    split = random_split()
    raw = torch.cat([images for images, _ in make(split, transform=pixels_as_floats)])
    assert torch.equal(raw, split.images.permute(0, 3, 1, 2).float()) and raw.dtype == torch.float32
    for images, _ in make(split, transform=pixels_as_floats).shuffled(0, 0):
        assert images.is_contiguous(memory_format=torch.channels_last)
    image = torch.cat([images for images, _ in make(split, transform=as_it_is)])
    assert torch.equal(image, normalised(split.images))


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_what_a_transform_draws_depends_on_seed_epoch_and_index_alone():
    def draws(workers, seed=1, epoch=3):
        batches = make(transform=three_draws, workers=workers).shuffled(seed, epoch)
        return torch.stack([images[:, :, 0, 0] for images, _ in batches])  # batch, image, generator

    first = draws(workers=1)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    draws(workers=1, epoch=2)
    assert torch.equal(draws(workers=1), first) and torch.equal(draws(workers=2),
                                                                first) and torch.equal(draws(workers=5), first)
    for other in (draws(2, epoch=4), draws(2, seed=2), draws(2, seed=3, epoch=1)):
        assert (other != first).all()  # in each generator, each batch, each image
    for generator in range(3):
        assert len(set(first[..., generator].flatten().tolist())) == 12


def test_in_order_a_transform_draws_the_same_every_time():
    batches = make(transform=three_draws, workers=2)
    assert_same(batches, list(batches))


@pytest.mark.parametrize('options', [{}, {'cutout': 3}, {'transform': three_draws, 'workers': 2}])
def test_the_random_state_of_the_program_is_left_alone_and_not_drawn_from(options):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(()).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    batches = make(padding=2, flip=True, **options)
    list(batches)
    list(batches.shuffled(0, 0))
    next(iter(batches.shuffled(0, 1)))  # and not to the end
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


def test_a_transform_of_one_image_and_of_a_short_last_batch():
    assert [len(labels) for _, labels in make(random_split(5), transform=as_it_is, workers=2).shuffled(0, 0)] == [4, 1]
    (images, labels), = make(random_split(1), transform=as_it_is)
    assert images.shape == (1, 3, 8, 8) and labels.tolist() == [0]


@pytest.mark.parametrize('policy', ['cifar10', 'svhn'])
def test_autoaugment_changes_images_but_not_their_order(policy):
    split = random_split(16, size=32)
    plain, augmented, many = (list(make(split, padding=4, transform=f, workers=workers).shuffled(0, 0))
                              for f, workers in ((None, 1), (auto_augment(policy), 1), (auto_augment(policy), 2)))
    assert_same(augmented, many)
    changed = 0
    for (images, labels), (others, same_labels) in zip(plain, augmented, strict=True):
        assert torch.equal(labels, same_labels) and images.shape == others.shape and others.dtype == torch.float32
        changed += (images != others).any(dim=(1, 2, 3)).sum().item()
    assert changed >= 8
    again = list(make(split, padding=4, transform=auto_augment(policy)).shuffled(0, 1))
    assert not any(torch.equal(images, others) for (images, _), (others, _) in zip(augmented, again))


def test_autoaugment_fills_with_grey():
    black, augment, levels = Image.new('RGB', (32, 32)), auto_augment('svhn'), set()
    torch.manual_seed(0)
    for _ in range(20):
        levels.update(np.unique(np.array(augment(black))).tolist())
    assert 128 in levels


def test_digits_have_the_policy_of_svhn_and_all_else_that_of_cifar10():
    policies = {name: known.policy for name, known in datasets.DATASETS.items()}
    assert policies == {'cifar10': 'cifar10', 'cifar100': 'cifar10', 'svhn': 'svhn', 'mnist': 'svhn',
                        'fashion-mnist': 'cifar10',
                        'digits': 'svhn', 'folder': 'cifar10'}
    assert {policy: auto_augment(policy).policy for policy in ('svhn', 'cifar10')} == {
        'svhn': AutoAugmentPolicy.SVHN, 'cifar10': AutoAugmentPolicy.CIFAR10}


# The flags

@pytest.fixture
def few(monkeypatch):
    """Every data set is 40 images of digits, and no curves are drawn. The split that is loaded."""
    load = datasets.load
    split = load('digits', None, 'train').subset(torch.arange(40))
    monkeypatch.setattr(datasets, 'load', lambda name, root, part, *rest: split)
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    return split


def load_batches(flags, transforms=None):
    flags = f'--train-batch 16 --test-batch 16 --val-split 0.2 --workers 2 --manualSeed 0 {flags}'
    args = cifar.make_parser().parse_args(flags.split())
    return cifar.load_batches(args, {}, CPU, transforms or {})


def all_bytes(images):
    return sorted(image.numpy().tobytes() for image in images)


def restored(batches, state_images):
    """Images of an epoch, as bytes again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_and_std(state_images))
    return [(image.double() * std + mean).round().to(torch.uint8).permute(1, 2, 0) for images, _ in batches for image
            in images]


@pytest.mark.parametrize('dataset, flip', [('digits', False), ('cifar10', True)])
def test_by_default_images_are_cropped_and_those_that_may_be_are_mirrored(dataset, flip, few):
    batches = load_batches(f'-d {dataset}')['train']
    assert (batches.padding, batches.flip, batches.cutout, batches.transform) == (4, flip, None, None)
    batches = load_batches('-d cifar10 --hflip none')['train']
    assert (batches.padding, batches.flip) == (4, False)


@pytest.mark.parametrize('flags, padding, mode', [
    ('', 4, 'zero'), ('--crop-padding 2 --crop-mode reflect', 2, 'reflect'), ('--crop-padding 0', 0, 'zero'),
    ('--crop-mode reflect', 4, 'reflect'),
])
def test_the_crop_is_as_the_flags_say_and_only_in_training(flags, padding, mode, few):
    batches = load_batches(f'-d cifar10 {flags}')
    assert (batches['train'].padding, batches['train'].crop_mode) == (padding, mode)
    assert all_bytes(restored(batches['val'], few.images)) == all_bytes(batches['val'].images)


@pytest.mark.parametrize('crop_mode', ['zero', 'reflect'])
def test_a_transform_gets_what_the_crop_makes(crop_mode):
    split = random_split()
    plain, transformed = (make(split, padding=3, flip=True, transform=f, crop_mode=crop_mode) for f in (None, as_it_is))
    assert_same(plain.shuffled(1, 0), transformed.shuffled(1, 0))
    assert_same(transformed, make(split))  # in order nothing is moved
    other = make(split, padding=3, flip=True, crop_mode='zero' if crop_mode == 'reflect' else 'reflect')
    assert not any(torch.equal(images, others) for (images, _), (others, _)
                   in zip(plain.shuffled(1, 0), other.shuffled(1, 0)))


def test_an_image_that_is_read_alone_is_padded_alike():
    black, white = (Image.new('RGB', (8, 8), colour) for colour in ('black', 'white'))
    for seed in range(10):
        torch.manual_seed(seed)
        image = small_image_transform(padding=3, crop_mode='reflect')(white)
        assert image.shape == (3, 8, 8) and image.eq(255).all()
        assert small_image_transform(padding=3)(black).eq(0).all()
    torch.manual_seed(0)
    assert any(small_image_transform(padding=3)(white).eq(0).any() for _ in range(10))


def test_no_augment_gives_the_images_as_they_are(few):
    batches = load_batches('-d cifar10 --no-augment')['train']
    assert all_bytes(restored(batches.shuffled(0, 0), few.images)) == all_bytes(batches.images)
    moved = load_batches('-d cifar10')['train']
    assert all_bytes(restored(moved.shuffled(0, 0), few.images)) != all_bytes(batches.images)


@pytest.mark.parametrize('dataset, policy', [('digits', AutoAugmentPolicy.SVHN), ('mnist', AutoAugmentPolicy.SVHN),
                                             ('cifar10', AutoAugmentPolicy.CIFAR10),
                                             ('cifar100', AutoAugmentPolicy.CIFAR10)])
def test_cutout_and_autoaugment_come_on_top_and_only_in_training(dataset, policy, few):
    batches = load_batches(f'-d {dataset} --cutout 8 --autoaugment')
    train = batches['train']
    assert (train.padding, train.flip, train.cutout, train.workers) == (4, policy == AutoAugmentPolicy.CIFAR10, 8, 2)
    assert train.transform.policy == policy
    for part in ('test', 'val'):
        assert all_bytes(restored(batches[part], few.images)) == all_bytes(batches[part].images)
    for images, _ in train.shuffled(0, 0):
        assert (images == 0).all(dim=1).sum(dim=(1, 2)).ge(16).all()  # a corner of the square at least


def call(monkeypatch, flags, script=cifar):
    monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *flags.split()])
    script.main()


class WithTransforms(ImageClassifier):
    input_transform = {'train': all_ones, 'eval': all_twos}
    seen = []

    def __init__(self, num_classes=10, classifier=nn.Linear):
        super().__init__()
        self.set_head(3, num_classes, classifier)

    def features(self, x):
        self.seen.append((self.training, x.detach().clone()))
        return global_average_pool(x)

    @classmethod
    def read(cls):
        """What was seen since the last call, in training and in testing; each a tensor of all images."""
        train, test = ([images for training, images in cls.seen if training == which] for which in (True, False))
        cls.seen.clear()
        train = [images for images in train if images.any()]  # not the rehearsal's blank ones
        return (torch.cat(train) if train else None), (torch.cat(test) if test else None)


@pytest.fixture
def model(few, monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, 'own', WithTransforms)
    WithTransforms.seen.clear()
    return f'-d digits --arch own --epochs 1 --train-batch 16 --workers 1 --manualSeed 0 -c {tmp_path}/run'


def test_a_models_own_transforms_are_used_in_training_and_testing(model, monkeypatch, tmp_path):
    call(monkeypatch, model)
    train, test = WithTransforms.read()
    assert train.shape == (40, 3, 32, 32) and (train == 1).all()
    assert test.shape == (40, 3, 32, 32) and (test == 2).all()  # after the epoch, which is the result too
    call(monkeypatch, f'-e --resume {tmp_path}/run/checkpoint.pth.tar')
    assert WithTransforms.read()[0] is None
    call(monkeypatch, f'-e --resume {tmp_path}/run/checkpoint.pth.tar')
    assert (WithTransforms.read()[1] == 2).all()
    for mode, value in (('test', 2), ('train', 1)):  # those of training as in training
        call(monkeypatch, f'{tmp_path}/run/checkpoint.pth.tar --mode {mode}', evaluate)
        train, test = WithTransforms.read()
        assert train is None and test.shape == (40, 3, 32, 32) and (test == value).all()


def test_with_only_a_transform_for_training_the_test_is_as_for_any_model(model, few, monkeypatch):
    monkeypatch.setattr(WithTransforms, 'input_transform', {'train': all_ones})
    call(monkeypatch, model)
    train, test = WithTransforms.read()
    assert (train == 1).all() and all_bytes(restored([(test[:40], None)], few.images)) == all_bytes(few.images)


def test_a_transform_for_training_takes_the_place_of_crop_and_mirror_and_one_for_testing_does_not(few):
    batches = load_batches('-d cifar10', {'eval': all_twos})
    assert (batches['train'].padding, batches['train'].flip, batches['train'].transform) == (4, True, None)
    for part in ('test', 'val'):
        assert all((images == 2).all() for images, _ in batches[part])
    batches = load_batches('-d cifar10', {'train': all_ones})
    assert (batches['train'].padding, batches['train'].flip, batches['train'].transform) == (0, False, all_ones)
    assert batches['test'].transform is batches['val'].transform is None


@pytest.mark.parametrize('flags', ['--no-augment', '--cutout 8', '--autoaugment --workers 1'])
def test_flags_about_augmentation_win_over_a_models_transforms(flags, few, model, monkeypatch, tmp_path):
    call(monkeypatch, f'{model.replace("--workers 1", "")} {flags}')
    train, test = WithTransforms.read()
    assert not (train == 1).all(dim=(1, 2, 3)).any()
    assert all_bytes(restored([(test[:40], None)], few.images)) == all_bytes(few.images)
    if flags == '--no-augment':
        assert all_bytes(restored([(train, None)], few.images)) == all_bytes(few.images)
    else:
        assert all_bytes(restored([(train, None)], few.images)) != all_bytes(few.images)
    if flags == '--cutout 8':
        assert (train == 0).all(dim=1).sum(dim=(1, 2)).ge(16).all()
    call(monkeypatch, f'-e --resume {tmp_path}/run/checkpoint.pth.tar')
    call(monkeypatch, f'{tmp_path}/run/checkpoint.pth.tar', evaluate)
    _, again = WithTransforms.read()
    assert torch.equal(again[:40], test[:40]) and torch.equal(again[40:], test[:40])


@pytest.mark.parametrize('flags', ['--no-augment', '--cutout 8', '--crop-padding 2', '--crop-mode reflect'])
def test_workers_are_refused_where_the_models_transforms_are_not_used(flags, model, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, f'{model} {flags}')
    assert '--workers is for' in capsys.readouterr().err


def test_an_augmented_run_resumed_with_other_workers_is_the_run_that_was_not(few, monkeypatch, tmp_path):
    flags = '-d digits --arch lenet --lr 0.01 --gamma 1 --train-batch 16 --manualSeed 0 --autoaugment --cutout 8'
    call(monkeypatch, f'{flags} --epochs 2 --workers 1 -c {tmp_path}/whole')
    call(monkeypatch, f'{flags} --epochs 1 --workers 1 -c {tmp_path}/parts')
    call(monkeypatch, f'--resume {tmp_path}/parts/checkpoint.pth.tar --epochs 2 --workers 2')
    whole, parts = (torch.load(tmp_path / name / 'checkpoint.pth.tar', weights_only=True) for name
                    in ('whole', 'parts'))
    assert whole['epoch'] == parts['epoch'] == 2
    for name, value in whole['state_dict'].items():
        assert torch.equal(value, parts['state_dict'][name]), name
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'parts')]
    assert results[0]['test loss'] == results[1]['test loss']
