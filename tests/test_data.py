import gzip
import hashlib
import os
import pickle
import shutil
import struct
import tarfile
import urllib.request

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils import datasets, published
from utils.batches import Batches, Split, crop_and_flip, mean_and_std
from utils.errors import UserError


def random_split(number=50, classes=5, size=32):
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (number, size, size, 3), generator=generator).to(torch.uint8),
                      torch.arange(number) % classes, [str(name) for name in range(classes)])


# Batches

@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), batch=st.integers(0, 3), height=st.integers(1, 7), width=st.integers(1, 7),
       padding=st.integers(0, 4))
def test_crop_and_flip_pixel_by_pixel(seed, batch, height, width, padding):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, height, width, 3), generator=generator).to(torch.uint8)
    offset = torch.randint(2 * padding + 1, (batch, 2), generator=generator)
    mirror = torch.rand(batch, generator=generator) < 0.5
    result = crop_and_flip(images, padding, offset, mirror)
    assert result.shape == images.shape and result.dtype == torch.uint8
    for i in range(batch):
        for row in range(height):
            for column in range(width):
                source_row = row + offset[i, 0].item() - padding
                source_column = (width - 1 - column if mirror[i] else column) + offset[i, 1].item() - padding
                inside = 0 <= source_row < height and 0 <= source_column < width
                expected = images[i, source_row, source_column].tolist() if inside else [0, 0, 0]
                assert result[i, row, column].tolist() == expected


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), batch=st.integers(0, 3), height=st.integers(1, 7), width=st.integers(1, 7),
       padding=st.integers(0, 6))
def test_a_reflecting_crop_pixel_by_pixel(seed, batch, height, width, padding):
    padding = min(padding, height - 1, width - 1)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (batch, height, width, 3), generator=generator).to(torch.uint8)
    offset = torch.randint(2 * padding + 1, (batch, 2), generator=generator)
    mirror = torch.rand(batch, generator=generator) < 0.5
    result = crop_and_flip(images, padding, offset, mirror, 'reflect')
    assert result.shape == images.shape and result.dtype == torch.uint8

    def inside(position, side):
        while not 0 <= position < side:
            position = -position if position < 0 else 2 * (side - 1) - position
        return position

    for i in range(batch):
        for row in range(height):
            for column in range(width):
                source_row = row + offset[i, 0].item() - padding
                source_column = (width - 1 - column if mirror[i] else column) + offset[i, 1].item() - padding
                expected = images[i, inside(source_row, height), inside(source_column, width)].tolist()
                assert result[i, row, column].tolist() == expected


def test_normalisation_is_exact_and_in_channels_last():
    split = random_split()
    mean, std = mean_and_std(split.images)
    values = split.images.double().reshape(-1, 3)
    assert mean == pytest.approx(values.mean(dim=0).tolist(), rel=1e-12)
    assert std == pytest.approx(values.std(dim=0, correction=0).tolist(), rel=1e-12)
    batches = Batches(split, mean, std, 20, 'cpu')
    images = torch.cat([inputs for inputs, _ in batches])
    assert images[:20].is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    expected = (split.images.double() - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(images.double(), expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5


def test_a_batch_depends_on_seed_epoch_and_index_alone():
    batches = Batches(random_split(), [120.0] * 3, [60.0] * 3, 16, 'cpu', padding=4, flip=True)
    epoch = list(batches.shuffled(seed=1, epoch=3))
    torch.manual_seed(99)
    list(batches.shuffled(seed=1, epoch=2))
    again = list(batches.shuffled(seed=1, epoch=3))
    assert len(epoch) == len(batches) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(epoch, again))
    for seed, number in ((1, 4), (2, 3), (3, 1)):
        assert not torch.equal(next(iter(batches.shuffled(seed, number)))[0], epoch[0][0])


def test_an_epoch_shows_every_image_once_and_moves_it_in_all_ways():
    split = random_split(number=400, classes=400, size=8)
    plain = Batches(split, [0.0] * 3, [1.0] * 3, 64, 'cpu')
    images, labels = (torch.cat(parts) for parts in zip(*plain.shuffled(0, 0)))
    assert sorted(labels.tolist()) == list(range(400)) and labels.tolist() != list(range(400))
    assert torch.equal(images.permute(0, 2, 3, 1).to(torch.uint8), split.images[labels])

    moved = Batches(split, [0.0] * 3, [1.0] * 3, 64, 'cpu', padding=4, flip=True)
    seen = set()
    for inputs, labels in moved.shuffled(0, 0):
        for image, label in zip(inputs.permute(0, 2, 3, 1).to(torch.uint8), labels):
            original = split.images[label]
            seen.update((row, column, mirror) for row in range(9) for column in range(9) for mirror in (False, True)
                        if torch.equal(image[None], crop_and_flip(original[None], 4, torch.tensor([[row, column]]),
                                                                       torch.tensor([mirror]))))
    assert {key[0] for key in seen} == {key[1] for key in seen} == set(range(9)) and {key[2] for key
                                                                                      in seen} == {False, True}


def test_one_image_and_a_short_last_batch():
    batches = Batches(random_split(number=1), [0.0] * 3, [1.0] * 3, 16, 'cpu', padding=4, flip=True)
    (inputs, labels), = batches.shuffled(0, 0)
    assert inputs.shape == (1, 3, 32, 32) and labels.tolist() == [0]
    sizes = [len(labels) for _, labels in Batches(random_split(50), [0.0] * 3, [1.0] * 3, 16, 'cpu').shuffled(0, 0)]
    assert sizes == [16, 16, 16, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_batch_is_the_same_on_every_device():
    on_cpu, on_gpu = (Batches(random_split(), [120.0] * 3, [60.0] * 3, 16, device, padding=4, flip=True)
                      for device in ('cpu', 'cuda'))
    for (images, labels), (other_images, other_labels) in zip(on_cpu.shuffled(0, 0), on_gpu.shuffled(0, 0)):
        torch.testing.assert_close(images, other_images.cpu())
        assert torch.equal(labels, other_labels.cpu())


# Sets

def test_digits():
    train, test = (datasets.load('digits', None, part) for part in ('train', 'test'))
    assert train.images.shape == (1437, 32, 32, 3) and test.images.shape == (360, 32, 32, 3)
    assert len(train.labels) == datasets.DATASETS['digits'].train_size
    assert train.images.dtype == torch.uint8 and train.images.max() == 255 and train.labels.dtype == torch.int64
    assert (train.images[..., 0] == train.images[..., 2]).all()
    assert torch.bincount(test.labels).min() >= 34
    assert {tuple(image.flatten().tolist()) for image in train.images}.isdisjoint(
        tuple(image.flatten().tolist()) for image in test.images)


def write_folder(root, classes=('cat', 'dog'), number=3, size=(32, 32), extension='png', mode='RGB'):
    generator = np.random.default_rng(0)
    for part in ('train', 'test'):
        for label, name in enumerate(classes):
            os.makedirs(root / part / name)
            for index in range(number):
                shape = size[::-1] + ((3,) if mode == 'RGB' else ())
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels, mode).save(root / part / name / f'{index}.{extension}')


def test_folder(tmp_path):
    write_folder(tmp_path)
    known = datasets.describe('folder', str(tmp_path))
    assert (known.num_classes, known.train_size) == (2, 6)
    split = datasets.load('folder', str(tmp_path), 'train')
    assert split.classes == ['cat', 'dog'] and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(split.images[4].numpy(), np.asarray(Image.open(tmp_path / 'train/dog/1.png')))


@pytest.mark.parametrize('size, mode, extension',
                         [((64, 64), 'RGB', 'jpg'), ((80, 100), 'RGB', 'png'), ((28, 28), 'L', 'png')])
def test_folder_of_other_sizes_and_grey_images(tmp_path, size, mode, extension):
    write_folder(tmp_path, size=size, mode=mode, extension=extension)
    assert datasets.load('folder', str(tmp_path), 'test', image_size=64).images.shape == (6, 64, 64, 3)


def test_folder_that_is_not_sound_is_named(tmp_path):
    def fails(*words):
        with pytest.raises(UserError) as error:
            datasets.describe('folder', str(tmp_path))
            datasets.load('folder', str(tmp_path), 'train')
        assert all(word in str(error.value) for word in words) and '\n' not in str(error.value), error.value

    fails(f'no folder {tmp_path}/train')
    write_folder(tmp_path)
    (tmp_path / 'train/cat/1.png').write_bytes((tmp_path / 'train/cat/1.png').read_bytes()[:200])
    fails('train/cat/1.png cannot be read as an image')
    (tmp_path / 'train/cat/1.png').write_text('hello')
    fails('train/cat/1.png cannot be read as an image')
    os.remove(tmp_path / 'train/cat/1.png')
    os.mkdir(tmp_path / 'train/emu')
    fails('emu')
    os.rename(tmp_path / 'train/emu/../cat', tmp_path / 'train/emu/cat')
    os.rename(tmp_path / 'train/emu/cat', tmp_path / 'train/cow')
    os.rmdir(tmp_path / 'train/emu')
    fails('only one of them has: cat, cow')


def test_labels_out_of_range_are_named():
    split = random_split()
    split.labels[7] = 5
    with pytest.raises(UserError, match=r'image 7 has label 5, outside 0 to 4'):
        datasets._checked(split, 'set')
    with pytest.raises(UserError, match='at least one'):
        datasets._checked(Split(split.images[:0], split.labels[:0], split.classes), 'set')


# torchvision's sets, in files of the real format

def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


class BrokenDownload:
    """An answer to a request whose connection breaks after the first bytes."""
    length = 1000

    def __init__(self, request, *args, **kwargs):
        self.url, self.sent = request.full_url, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, size=-1):
        if self.sent:
            raise ConnectionResetError('connection reset')
        self.sent = True
        return b'half of it'


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(urllib.request, 'urlopen', BrokenDownload)


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch, offline):
    """data/cifar-10-python.tar.gz as published, but with 4 images a file; torchvision is told the new MD5 sums."""
    source, root = tmp_path / 'cifar-10-batches-py', tmp_path / 'data'
    source.mkdir()
    root.mkdir()
    generator, lists = np.random.default_rng(0), {'train_list': [], 'test_list': []}
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        rows = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (source / name).write_bytes(pickle.dumps({'data': rows, 'labels': [0, 1, 8, 9]}))
        lists['test_list' if name == 'test_batch' else 'train_list'].append([name, md5(source / name)])
    (source / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class {i}' for i in range(10)]}))
    with tarfile.open(root / 'cifar-10-python.tar.gz', 'w:gz') as archive:
        archive.add(source, source.name)
    for name, value in lists.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'meta',
                        {'filename': 'batches.meta', 'key': 'label_names', 'md5': md5(source / 'batches.meta')})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'tgz_md5', md5(root / 'cifar-10-python.tar.gz'))
    return root, source


def test_cifar10_from_the_archive_in_data(cifar_archive):
    root, source = cifar_archive
    split = datasets.load('cifar10', str(root), 'train')
    assert split.images.shape == (20, 32, 32, 3) and split.labels.tolist() == [0, 1, 8,
                                                                               9] * 5 and len(split.classes) == 10
    row = pickle.loads((source / 'data_batch_1').read_bytes())['data'][1]
    assert np.array_equal(split.images[1].numpy(), row.reshape(3, 32, 32).transpose(1, 2, 0))
    assert sorted(os.listdir(root)) == ['cifar-10-batches-py', 'cifar-10-python.tar.gz']
    os.remove(root / 'cifar-10-python.tar.gz')
    assert len(datasets.load('cifar10', str(root), 'test').images) == 4  # unpacked once is enough


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def refused(name, root, part='train'):
    """What is said of a set that is not taken, in one line; nothing below `root` changes."""
    before = files_of(root)
    with pytest.raises(UserError) as error:
        datasets.load(name, str(root), part)
    assert files_of(root) == before and not list(root.glob('.unfinished-*')) and '\n' not in str(error.value)
    return str(error.value).replace(str(root), 'ROOT')


def pack(root, source, kind='w:gz', folder='cifar-10-batches-py', leave_out=None):
    with tarfile.open(root / 'cifar-10-python.tar.gz', kind) as archive:
        for path in sorted(source.iterdir()):
            if path.name != leave_out:
                archive.add(path, f'{folder}/{path.name}')


def test_the_images_of_cifar10_can_be_told_from_others(cifar_archive):
    train, test = (datasets.load('cifar10', str(cifar_archive[0]), part) for part in ('train', 'test'))
    assert datasets.fingerprint(train) != datasets.fingerprint(test)


@pytest.mark.parametrize('kind, folder', [('w', './cifar-10-batches-py'), ('w:xz', '../..'), ('w:bz2', '/tmp')])
def test_an_archive_that_was_packed_again_is_taken_and_nothing_lands_outside(kind, folder, cifar_archive, capsys):
    root, source = cifar_archive
    expected = datasets.fingerprint(datasets.load('cifar10', str(root), 'train'))
    shutil.rmtree(root / 'cifar-10-batches-py')
    pack(root, source, kind, folder)
    before = {*files_of(root.parent)}
    assert datasets.fingerprint(datasets.load('cifar10', str(root), 'train')) == expected
    assert capsys.readouterr().out == (f'{root}/cifar-10-python.tar.gz: packed in another way than published; the '
                                       'contents are the published ones\n')
    assert {*files_of(root.parent)} - before == {f'data/cifar-10-batches-py/{path.name}' for path in source.iterdir()}


def test_a_truncated_archive_is_named_and_left_alone(cifar_archive):
    root, _ = cifar_archive
    archive = root / 'cifar-10-python.tar.gz'
    archive.write_bytes(archive.read_bytes()[:-100])
    assert refused('cifar10', root).startswith('ROOT/cifar-10-python.tar.gz is not as cifar10 was published: ')


def test_an_archive_with_a_changed_image_or_without_a_file_is_refused(cifar_archive):
    root, source = cifar_archive
    pack(root, source, leave_out='data_batch_3')
    assert 'cifar-10-python.tar.gz is not as cifar10 was published: it has no data_batch_3; put the original there, ' \
           'or remove it' in refused('cifar10', root)
    content = bytearray((source / 'test_batch').read_bytes())
    content[content.index(b'data') + 1000] ^= 1
    (source / 'test_batch').write_bytes(content)
    pack(root, source)
    assert 'the MD5 sum of test_batch in it is ' in refused('cifar10', root, 'train')


def test_unpacked_files_that_are_damaged_are_refused_or_unpacked_again(cifar_archive):
    root, source = cifar_archive
    expected = datasets.fingerprint(datasets.load('cifar10', str(root), 'train'))
    damaged = root / 'cifar-10-batches-py/data_batch_2'
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert datasets.fingerprint(datasets.load('cifar10', str(root), 'train')) == expected
    assert damaged.read_bytes() == (source / 'data_batch_2').read_bytes()
    os.remove(root / 'cifar-10-python.tar.gz')
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert refused('cifar10', root).startswith('ROOT/cifar-10-batches-py is not as cifar10 was published: the MD5 sum '
                                               'of data_batch_2 in it is ')


def test_where_nothing_can_be_written_the_archive_is_read(cifar_archive, monkeypatch):
    root, _ = cifar_archive

    def refuse(*args, **options):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr('tempfile.mkdtemp', refuse)
    assert len(datasets.load('cifar10', str(root), 'train').images) == 20
    assert os.listdir(root) == ['cifar-10-python.tar.gz']


@pytest.mark.parametrize('name, file', [('cifar10', 'cifar-10-python.tar.gz'), ('cifar100', 'cifar-100-python.tar.gz'),
                                        ('svhn', 'train_32x32.mat'), ('mnist', 'MNIST/raw/train-images-idx3-ubyte.gz'),
                                        ('fashion-mnist', 'FashionMNIST/raw/t10k-labels-idx1-ubyte.gz')])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(name, file, tmp_path, offline):
    with pytest.raises(UserError) as error:
        datasets.load(name, str(tmp_path / 'new'), 'train')
    sentence = str(error.value)
    assert 'connection reset' in sentence and '://' in sentence and str(tmp_path / 'new' / file) in sentence
    assert 'python cifar.py --dataset digits' in sentence and '\n' not in sentence
    assert os.listdir(tmp_path / 'new') == []


@pytest.fixture
def fashion(tmp_path, monkeypatch, offline):
    """Fashion-MNIST's file names with other contents, 10,000 images to test and 6 to train; their sums are known."""
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    contents = {
        'train-images-idx3-ubyte': struct.pack('>IIII', 2051, 6, 28, 28) + images.tobytes(),
        'train-labels-idx1-ubyte': struct.pack('>II', 2049, 6) + bytes([9, 0, 1, 2, 3, 4]),
        't10k-images-idx3-ubyte': struct.pack('>IIII', 2051, 10000, 28, 28) + bytes(10000 * 28 * 28),
        't10k-labels-idx1-ubyte': struct.pack('>II', 2049, 10000) + bytes(range(10)) * 1000}
    monkeypatch.setitem(published.CONTENTS, 'FashionMNIST', {
        name: hashlib.md5(content).hexdigest() for name, content in contents.items()})
    packed = {f'{name}.gz': gzip.compress(content, 1, mtime=0) for name, content in contents.items()}
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, 'resources', [
        (name, hashlib.md5(content).hexdigest()) for name, content in packed.items()])

    def write(files, folder='data/FashionMNIST/raw'):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
        return tmp_path / 'data'

    return contents, packed, write


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('folder', ['data/FashionMNIST/raw', 'data'])
def test_mnist_and_fashion_mnist(compressed, folder, fashion, capsys):
    contents, packed, write = fashion
    root = write(packed if compressed else contents, folder)
    before = files_of(root)
    split = datasets.load('fashion-mnist', str(root), 'train')
    images = np.frombuffer(contents['train-images-idx3-ubyte'], np.uint8, offset=16).reshape(6, 28, 28)
    assert split.labels.tolist() == [9, 0, 1, 2, 3, 4] and split.images.shape == (6, 32, 32, 3)
    assert np.array_equal(split.images[:, 2:30, 2:30, 1].numpy(), images) and split.images[:, :2].max() == 0
    assert len(datasets.load('fashion-mnist', str(root), 'test').images) == 10000
    assert capsys.readouterr().out == '' and files_of(root) == before


def test_a_damaged_file_beside_a_sound_archive_is_not_read(fashion):
    contents, packed, write = fashion
    root = write(packed | {'train-images-idx3-ubyte': contents['train-images-idx3-ubyte'][:-100]})
    images = datasets.load('fashion-mnist', str(root), 'train').images[:, 2:30, 2:30, 0]
    assert images.numpy().tobytes() == contents['train-images-idx3-ubyte'][16:]


def test_files_that_were_compressed_again_are_taken_with_one_sentence(fashion, capsys):
    contents, _, write = fashion
    root = write({f'{name}.gz': gzip.compress(content, 9) for name, content in contents.items()})
    assert [len(datasets.load('fashion-mnist', str(root), part).labels) for part in ('train', 'test')] == [6, 10000]
    assert capsys.readouterr().out == (f'{root}/FashionMNIST/raw: packed in another way than published; the contents '
                                       'are the published ones\n')


def changed(content, index=1000):
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1:]


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('file, change, reason', [
    ('t10k-images-idx3-ubyte', changed, 'the MD5 sum of its contents is '),
    ('t10k-labels-idx1-ubyte', changed, 'the MD5 sum of its contents is '),
    ('t10k-images-idx3-ubyte', lambda content: content[:-784], 'it holds 7839232 bytes, not 7840016'),
    ('t10k-images-idx3-ubyte', lambda content: content[:7] + b'\x0f' + content[8:-784],
     'its IDX header is 2051 9999 28 28, not 2051 10000 28 28'),
    ('t10k-labels-idx1-ubyte', lambda content: b'text' + content[4:],
     'its IDX header is 1952807028 10000, not 2049 10000'),
    ('t10k-labels-idx1-ubyte', lambda content: b'', 'its IDX header is 0 0, not 2049 10000')])
def test_contents_that_were_not_published_are_refused(compressed, file, change, reason, fashion):
    contents, packed, write = fashion
    wrong = change(contents[file])
    root = write(packed | {f'{file}.gz': gzip.compress(wrong, 1)} if compressed else contents | {file: wrong})
    sentence = refused('fashion-mnist', root, 'test')
    assert sentence.startswith(f'ROOT/FashionMNIST/raw/{file}{".gz" * compressed} is not as fashion-mnist was '
                               f'published: {reason}')
    assert len(datasets.load('fashion-mnist', str(root), 'train').labels) == 6  # whose files are sound


@pytest.mark.parametrize('change', [lambda packed: packed[:-10], lambda packed: changed(packed, 60), lambda packed: b'',
                                    lambda packed: b'<html>'])
def test_a_damaged_archive_is_refused(change, fashion):
    _, packed, write = fashion
    file = 't10k-labels-idx1-ubyte.gz'
    root = write(packed | {file: change(packed[file])})
    assert refused('fashion-mnist', root, 'test').startswith(
        f'ROOT/FashionMNIST/raw/{file} is not as fashion-mnist was published: ')


def test_files_of_another_set_are_named(fashion, monkeypatch):
    contents, _, write = fashion
    monkeypatch.setitem(published.CONTENTS, 'MNIST', published.CONTENTS['FashionMNIST'] | {
        't10k-labels-idx1-ubyte': hashlib.md5(changed(contents['t10k-labels-idx1-ubyte'])).hexdigest()})
    root = write(contents | {'t10k-labels-idx1-ubyte': changed(contents['t10k-labels-idx1-ubyte'])})
    assert 'was published: it is t10k-labels-idx1-ubyte of MNIST; ' in refused('fashion-mnist', root, 'test')


def test_a_set_whose_download_breaks_leaves_what_is_there(fashion):
    _, packed, write = fashion
    root = write({'train-images-idx3-ubyte.gz': packed['train-images-idx3-ubyte.gz']})
    assert 'connection reset' in refused('fashion-mnist', root)


def test_a_download_fetches_what_is_missing(fashion, monkeypatch):
    contents, packed, write = fashion
    root = write({'train-images-idx3-ubyte.gz': packed['train-images-idx3-ubyte.gz']})
    asked = []

    def download(url, folder, file, md5):
        asked.append(file)
        with open(os.path.join(folder, file), 'wb') as target:
            target.write(packed[file])

    monkeypatch.setattr(torchvision.datasets.utils, 'download_url', download)
    assert len(datasets.load('fashion-mnist', str(root), 'train').labels) == 6
    assert len(datasets.load('fashion-mnist', str(root), 'test').labels) == 10000
    assert sorted(asked) == sorted(packed.keys() - {'train-images-idx3-ubyte.gz'})
    assert files_of(root) == {f'FashionMNIST/raw/{name}': content for name, content in packed.items()}
    assert os.listdir(root) == ['FashionMNIST']


def test_svhn(tmp_path, monkeypatch, offline):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy.io.savemat(tmp_path / 'train_32x32.mat', {'X': images, 'y': np.array([[10], [1], [2], [9]], dtype=np.uint8)})
    monkeypatch.setattr(torchvision.datasets.SVHN, 'split_list',
                        {'train': ['http://nowhere', 'train_32x32.mat', md5(tmp_path / 'train_32x32.mat')]})
    split = datasets.load('svhn', str(tmp_path), 'train')
    assert split.labels.tolist() == [0, 1, 2, 9] and len(split.classes) == 10  # the files call the digit 0 "10"
    assert np.array_equal(split.images[3].numpy(), images[..., 3])


def test_svhn_that_was_saved_again_is_told_by_its_numbers(tmp_path, monkeypatch, offline, capsys):
    def save(labels, **options):
        images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        scipy.io.savemat(tmp_path / 'train_32x32.mat', {'X': images, 'y': np.array(labels)[:, None]}, **options)
        return images

    monkeypatch.setitem(published.SVHN_COUNTS, 'train', [1, 2, 0, 0, 0, 0, 0, 0, 0, 1])
    images = save([10, 1, 9, 1], do_compression=True)
    split = datasets.load('svhn', str(tmp_path), 'train')
    assert split.labels.tolist() == [0, 1, 9, 1] and np.array_equal(split.images[2].numpy(), images[..., 2])
    assert capsys.readouterr().out == (f'{tmp_path}/train_32x32.mat: saved in another way than published; it has the '
                                       'published number of each digit\n')
    for labels in ([10, 1, 9], [10, 1, 9, 2]):
        save(labels)
        assert 'ROOT/train_32x32.mat is not as svhn was published: it has uint8 images ' in refused('svhn', tmp_path)
    (tmp_path / 'train_32x32.mat').write_bytes((tmp_path / 'train_32x32.mat').read_bytes()[:5000])
    assert 'it is no Matlab file with X and y' in refused('svhn', tmp_path)
