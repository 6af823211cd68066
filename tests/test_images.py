import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from utils import distributed, folders
from utils.batches import AUTO_AUGMENTS, seed_everything
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create')

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


def pixels(number, height=8, width=8):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_part(root, part, classes=('cat', 'dog'), number=2):
    for label, name in enumerate(classes):
        os.makedirs(root / part / name)
        for index in range(number):
            Image.fromarray(pixels(label * number + index)).save(root / part / name / f'{index}.png')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Twelve images of 8 by 8 pixels in six classes; image i is pixels(i)."""
    root = tmp_path_factory.mktemp('images')
    write_part(root, 'train', classes='abcdef')
    return folders.read_folder(str(root), 'train')


def make(folder, batch_size=6, transform=None, mean=MEAN, std=STD, workers=0, **options):
    transform = transform or folders.evaluation_transform(8, 8)
    return folders.ImageBatches(folder, mean, std, batch_size, 'cpu', transform, workers, **options)


def raw(folder, **options):
    """Batches in units of 0..255."""
    return make(folder, mean=[0.0] * 3, std=[1.0] * 3, **options)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])


def in_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, 'rank', lambda: rank)
    monkeypatch.setattr(distributed, 'world_size', lambda: world_size)


def three_draws(image):
    """An image whose channels are one colour each: what was drawn from torch, random and NumPy."""
    draws = [torch.randint(256, ()).item(), random.randrange(256), np.random.randint(256)]
    return torch.tensor(draws, dtype=torch.uint8)[:, None, None].repeat(1, 2, 2)


# The folders

def test_folders_are_listed_in_the_order_of_their_names(tmp_path):
    write_part(tmp_path, 'train', classes=('dog', 'cat'))
    write_part(tmp_path, 'val', classes=('cat', 'dog'), number=1)
    (tmp_path / 'train/cat/notes.txt').write_text('not listed')
    found = folders.read_folders(str(tmp_path))
    train = found['train']
    assert list(found) == ['train', 'val'] and train.classes == ['cat', 'dog'] and train.labels.tolist() == [0, 0, 1, 1]
    assert train.labels.dtype == torch.int64
    assert train.paths == [str(tmp_path / 'train' / name) for name
                           in ('cat/0.png', 'cat/1.png', 'dog/0.png', 'dog/1.png')]
    assert train.class_counts() == [2, 2] and len(found['val'].paths) == 2
    part = train.subset(torch.tensor([3, 0, 2]))
    assert part.paths == [train.paths[3], train.paths[0], train.paths[2]] and part.labels.tolist() == [1, 0, 1]
    assert part.class_counts() == [1, 2] and part.classes == train.classes


def test_folders_that_are_not_sound_are_named(tmp_path):
    def fails(sentence):
        with pytest.raises(UserError) as error:
            folders.read_folders(str(tmp_path / 'set'))
        assert str(error.value) == sentence.replace('ROOT', str(tmp_path / 'set'))

    layout = 'images are expected at DIR/train/CLASS/*.jpg|png and DIR/val/CLASS/*.jpg|png, but there is no folder '
    fails(layout + 'ROOT/train')
    (tmp_path / 'set/train').mkdir(parents=True)
    fails('ROOT/train has no class folders; its images are expected at ROOT/train/CLASS/*.jpg|png')
    write_part(tmp_path / 'set', 'train', [str(number) for number in range(10, 17)], number=1)
    fails(layout + 'ROOT/val')
    write_part(tmp_path / 'set', 'val', ['10', 'emu'], number=1)
    fails('ROOT/train and ROOT/val must have the same class folders, but only one of them has: 11, 12, 13, 14, 15 and '
          '2 more')
    shutil.rmtree(tmp_path / 'set/val/emu')
    for name in range(13, 17):
        shutil.rmtree(tmp_path / f'set/train/{name}')
    fails('ROOT/train and ROOT/val must have the same class folders, but only one of them has: 11, 12')
    os.remove(tmp_path / 'set/train/11/0.png')
    fails('ROOT/train: every class folder must have an image (jpg, png, ...), but there is none in 11')


# Transforms

def test_evaluation_scales_the_shorter_side_and_cuts_out_the_centre():
    image = Image.fromarray(pixels(0, height=9, width=14))
    assert torch.equal(folders.evaluation_transform(4, 9)(image),  # needs no scaling
                       torch.from_numpy(pixels(0, height=9, width=14))[2:6, 5:9].permute(2, 0, 1))
    large = Image.fromarray(np.kron(pixels(0, 3, 5), np.ones((8, 8, 1), np.uint8)))
    for interpolation, resample in (('bilinear', Image.Resampling.BILINEAR), ('bicubic', Image.Resampling.BICUBIC)):
        expected = np.asarray(large.resize((20, 12), resample))[2:10, 6:14].transpose(2, 0, 1)
        assert np.array_equal(folders.evaluation_transform(8, 12, interpolation)(large).numpy(), expected)


@pytest.mark.parametrize('auto_augment', [None, *AUTO_AUGMENTS])
def test_training_gives_images_of_one_size_and_seldom_the_same(auto_augment):
    transform, seen = folders.training_transform(12, auto_augment), []
    for number in range(4):
        seed_everything((0, 0), number)
        seen.append(transform(Image.fromarray(pixels(0, 20 + 9 * number, 30))))
        assert seen[-1].shape == (3, 12, 12) and seen[-1].dtype == torch.uint8 and type(seen[-1]) is torch.Tensor
        seed_everything((0, 0), number)
        plain = folders.training_transform(12)(Image.fromarray(pixels(0, 20 + 9 * number, 30)))
        seen[-1] = (seen[-1], torch.equal(seen[-1], plain))
    assert len({image.numpy().tobytes() for image, _ in seen}) == 4
    assert all(same for _, same in seen) == (auto_augment is None)


def test_training_mirrors_half_of_the_images():
    transform, mirrored = folders.training_transform(8), []
    ramp = Image.fromarray(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    for number in range(200):
        seed_everything((0, 0), number)
        image = transform(ramp)[0, 0].int()
        mirrored.append((image[0] > image[-1]).item())
    assert 70 <= sum(mirrored) <= 130


def test_random_erasing_leaves_a_rectangle_of_the_mean_colour():
    black, colour, erased = Image.new('RGB', (16, 16)), torch.tensor([124, 116, 104]), 0
    transform = folders.training_transform(16, random_erase=0.5)
    for number in range(100):
        seed_everything((0, 0), number)
        hole = transform(black).permute(1, 2, 0).eq(colour).all(dim=2)
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert torch.equal(hole, rows[:, None] & columns)
        erased += hole.any().item()
    assert 30 <= erased <= 70


# Batches

def test_in_order_pixels_are_normalised_exactly_and_in_channels_last(folder):
    batches = make(folder, batch_size=5)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches))
    assert targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and targets.dtype == torch.int64
    assert inputs.shape == (12, 3, 8, 8) and inputs.dtype == torch.float32
    for index in range(12):
        for channel in range(3):
            expected = (pixels(index)[:, :, channel].astype(np.float64) - MEAN[channel]) / STD[channel]
            np.testing.assert_allclose(inputs[index, channel].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each, _ in batches)
    assert len(batches) == 3 and [len(each) for _, each in batches] == [5, 5, 2]
    assert [batches.images_in(number) for number in range(3)] == [5, 5, 2]
    assert (batches.num_classes, batches.class_counts, batches.labels.tolist()) == (6, [2] * 6, targets.tolist())
    assert batches.mean.tolist() == MEAN and batches.std.tolist() == STD and batches.skipped == {}


def test_an_epoch_shows_every_image_once_with_its_label(folder):
    numbers = {pixels(index).tobytes(): index for index in range(12)}
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        inputs, targets = (torch.cat(parts) for parts in zip(*raw(folder, batch_size=5).shuffled(seed, epoch)))
        order = [numbers[image.permute(1, 2, 0).to(torch.uint8).numpy().tobytes()] for image in inputs]
        assert sorted(order) == list(range(12)) and targets.tolist() == [index // 2 for index in order]
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def test_what_is_drawn_depends_on_seed_epoch_and_position_alone(folder):
    def draws(seed=1, epoch=3, **options):
        batches = raw(folder, transform=three_draws, **options)
        return torch.cat([inputs[:, :, 0, 0] for inputs, _ in batches.shuffled(seed, epoch)])

    first = draws()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    draws(epoch=2)
    for workers, batch_size in ((0, 6), (0, 5), (1, 5), (2, 5)):
        assert torch.equal(draws(workers=workers, batch_size=batch_size), first)
    for channel in range(3):
        assert len(set(first[:, channel].tolist())) > 6
    for other in (draws(epoch=4), draws(seed=2), draws(seed=3, epoch=1)):
        assert ((other != first).sum(dim=0) > 6).all()


def test_batches_from_the_middle_of_an_epoch_are_those_of_the_whole(folder):
    batches = make(folder, batch_size=4, transform=folders.training_transform(8, 'trivialaugment'),
                   mix=folders.mixing(1, 1, 6))
    whole = list(batches.shuffled(1, 2))
    for first in range(4):
        assert_same(batches.shuffled(1, 2, first), whole[first:])


@pytest.mark.parametrize('batch_size', [6, 12, 18])
def test_the_shares_of_all_processes_are_the_batch_of_one(batch_size, folder, monkeypatch):
    folder = folder.subset(torch.arange(11))
    batches = make(folder, batch_size, folders.training_transform(8, 'imagenet'))
    whole = list(batches.shuffled(1, 2))
    assert [len(targets) for _, targets in whole] == [batches.images_in(number) for number in range(len(whole))]
    for processes in (1, 2, 3):
        shares = []
        for rank in range(processes):
            in_process(monkeypatch, rank, processes)
            shares.append(list(batches.shuffled(1, 2)))
        assert len(shares[0]) == len(batches)
        assert_same([[torch.cat(parts) for parts in zip(*batch)] for batch in zip(*shares, strict=True)], whole)
        assert_same(batches.shuffled(1, 2, first=1), shares[-1][1:])


@pytest.mark.parametrize('mix', [None, folders.mixing(0.2, 1, 6)])
def test_an_empty_share_has_no_images_of_the_right_size(mix, folder, monkeypatch):
    in_process(monkeypatch, 2, 3)
    (inputs, targets), = make(folder.subset([0, 3, 7]), 6, folders.training_transform(10), mix=mix).shuffled(0, 0)
    assert inputs.shape == (0, 3, 10, 10) and inputs.dtype == torch.float32
    assert targets.shape == ((0, 6) if mix else (0,)) and targets.dtype == (torch.float32 if mix else torch.int64)


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_in_evaluation_all_processes_together_see_each_image_once(processes, folder, monkeypatch):
    first_pixels = {index: pixels(index)[0, 0].tolist() for index in range(12)}
    for number in range(1, 13):
        for batch_size in (1, 3, 4, 13):
            batches, seen = raw(folder.subset(torch.arange(number)), batch_size=batch_size), []
            for rank in range(processes):
                in_process(monkeypatch, rank, processes)
                mine = [inputs[:, :, 0, 0].tolist() for inputs, _ in batches]
                assert len(mine) == len(range(rank, len(batches), processes))
                seen += [pixel for batch in mine for pixel in batch]
            assert sorted(seen) == sorted(first_pixels[index] for index in range(number))


def test_the_random_state_of_the_program_is_left_alone_and_not_drawn_from(folder):
    def state():
        return random.random(), np.random.random(), torch.rand(()).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = state()
    for workers in (0, 1):
        batches = make(folder, transform=folders.training_transform(8, 'augmix'), workers=workers)
        seed()
        list(batches)
        next(batches.shuffled(0, 0))  # and not to the end
        assert state() == expected


# What cannot be read

@pytest.fixture
def damaged(tmp_path):
    """Six classes of one image; of b, d and e it is a JPEG cut short, no image and one of 16 bits a channel."""
    write_part(tmp_path, 'train', classes='abcdef', number=1)
    folder = folders.read_folder(str(tmp_path), 'train')
    Image.fromarray(pixels(1, 64, 64)).save(tmp_path / 'whole.jpg')
    with open(folder.paths[1], 'wb') as file:
        file.write((tmp_path / 'whole.jpg').read_bytes()[:2000])
    with open(folder.paths[3], 'w') as file:
        file.write('hello')
    Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(folder.paths[4])
    return folder


@pytest.mark.parametrize('workers', [0, 1])
def test_files_that_cannot_be_read_are_left_out_and_noted(workers, damaged):
    batches = raw(damaged, batch_size=4, workers=workers)
    (first, targets), (second, others) = batches
    assert targets.tolist() == [0, 2] and others.tolist() == [5]
    for image, number in zip(torch.cat([first, second]), (0, 2, 5), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(number))
    assert list(batches.skipped) == [damaged.paths[number] for number in (1, 3, 4)]
    for reason, words in zip(batches.skipped.values(), ('truncated', 'cannot identify image', 'more than 8 bits'),
                             strict=True):
        assert words in reason and '\n' not in reason


def test_a_file_that_is_missing_and_a_batch_of_nothing_else(damaged):
    os.remove(damaged.paths[1])
    batches = make(damaged.subset([1]), mix=folders.mixing(0.2, 0, 6))
    (inputs, targets), = batches.shuffled(0, 0)
    assert inputs.shape == (0, 3, 8, 8) and targets.shape == (0,
                                                              6) and 'No such file' in batches.skipped[damaged.paths[1]]


def test_what_is_drawn_for_the_others_does_not_change(damaged):
    def draws(folder):
        return torch.cat([inputs[:, :, 0, 0] for inputs, _ in raw(folder, transform=three_draws).shuffled(0, 0)])

    few = draws(damaged)
    for index in (1, 3, 4):
        Image.fromarray(pixels(index)).save(damaged.paths[index])
    many = draws(damaged).tolist()
    assert len(few) == 3 and len(many) == 6 and [row for row in many if row in few.tolist()] == few.tolist()


@pytest.mark.parametrize('workers', [0, 1])
def test_strict_refuses_them(workers, damaged):
    with pytest.raises(UserError) as error:
        list(make(damaged, workers=workers, strict=True))
    assert str(error.value).startswith(f'{damaged.paths[1]} cannot be read as an image (')
    assert str(error.value).endswith('); mend or remove it, or leave --strict away to skip '
                                     'it') and '\n' not in str(error.value)
    assert len(list(make(damaged.subset([0, 2, 5]), strict=True))) == 1


def test_grey_cmyk_and_palette_images_and_odd_exif_data_are_read_without_a_word(tmp_path):
    (tmp_path / 'train/a').mkdir(parents=True)
    colours = Image.fromarray(np.full((8, 8, 3), [200, 40, 90], np.uint8))
    colours.convert('L').save(tmp_path / 'train/a/0.png')
    colours.convert('CMYK').save(tmp_path / 'train/a/1.jpg', quality=100)
    colours.quantize(4).save(tmp_path / 'train/a/2.png', transparency=bytes([9, 255, 9, 255]))
    # cut short
    colours.save(tmp_path / 'train/a/3.jpg', quality=100, exif=b'Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0')
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation, which is ignored
    Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, 0).repeat(8, 1)).save(tmp_path / 'train/a/4.jpg',
                                                                                         exif=turned)
    batches = raw(folders.read_folder(str(tmp_path), 'train'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        (inputs, _), = batches
    assert batches.skipped == {} and inputs.shape == (5, 3, 8, 8)
    grey = round(0.299 * 200 + 0.587 * 40 + 0.114 * 90)
    for image, colour in zip(inputs, ([grey] * 3, [200, 40, 90], [200, 40, 90], [200, 40, 90])):
        assert (image - torch.tensor(colour)[:, None, None]).abs().max() <= 2
    assert (inputs[4, :, 0] < 20).all() and (inputs[4, :, -1] > 235).all()


# MixUp and CutMix

def test_no_mixing():
    assert folders.mixing(0, 0.0, 6) is folders.mixing(None, None, 6) is None


def mixed_and_plain(folder, mix, epoch=0, workers=0):
    """For each batch: mixed images and targets, plain images and labels."""
    one_of_each = folder.subset(range(0, 12, 2))  # so that no two images of a batch have the same label
    batches = [raw(one_of_each, batch_size=4, mix=each, workers=workers).shuffled(0, epoch) for each in (mix, None)]
    return [(*mixed, *plain) for mixed, plain in zip(*batches, strict=True)]


def test_mixup_image_by_image(folder):
    for inputs, targets, plain, labels in mixed_and_plain(folder, folders.mixing(1.0, 0, 6), workers=1):
        lam = targets[0, labels[0]].item()
        assert 0.01 < lam < 0.99
        for index in range(len(labels)):
            expected = lam * plain[index].double() + (1 - lam) * plain[index - 1].double()
            torch.testing.assert_close(inputs[index].double(), expected, rtol=1e-6, atol=1e-4)
            expected = torch.zeros(6, dtype=torch.float64)
            expected[labels[index]] += lam
            expected[labels[index - 1]] += 1 - lam
            torch.testing.assert_close(targets[index].double(), expected, rtol=1e-6, atol=1e-6)
        assert (inputs.round() - inputs).abs().max() > 0.1  # not rounded


def test_cutmix_pixel_by_pixel(folder):
    for epoch in range(3):
        for inputs, targets, plain, labels in mixed_and_plain(folder, folders.mixing(None, 1.0, 6), epoch):
            for index in range(len(labels)):
                own = (inputs[index] == plain[index]).all(dim=0)
                other = (inputs[index] == plain[index - 1]).all(dim=0)
                assert (own ^ other).all()
                assert targets[index, labels[index]].item() == pytest.approx(own.double().mean().item(), abs=1e-6)
                rows, columns = other.any(dim=1), other.any(dim=0)
                assert torch.equal(other, rows[:, None] & columns)


def test_both_take_turns_and_depend_on_seed_epoch_and_batch_alone(folder):
    mix, kinds, shares = folders.mixing(0.4, 1.0, 6), set(), []
    for epoch in range(6):
        for inputs, targets, plain, _ in mixed_and_plain(folder, mix, epoch):
            torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)))
            assert targets.dtype == torch.float32 and (targets >= 0).all()
            kinds.add(((inputs == plain) | (inputs == plain.roll(1, 0))).all().item())
            shares.append(round(targets.max().item(), 6))
    assert kinds == {False, True} and len(set(shares)) > 6
    for first, again in zip(mixed_and_plain(folder, mix, workers=0), mixed_and_plain(folder, mix, workers=1),
                            strict=True):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_one_image_is_mixed_with_itself(folder):
    one = folder.subset([4])
    (inputs, targets), = raw(one, mix=folders.mixing(0.2, 0, 6)).shuffled(0, 0)
    np.testing.assert_allclose(inputs[0].permute(1, 2, 0).numpy(), pixels(4), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]))
