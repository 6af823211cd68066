"""Which files of a folder of images are read, and the processes that read them."""
import csv
import os
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import cifar
import imagenet
from helpers import call
from test_data import write_folder
from utils import batches, datasets, folders, image_files, memory
from utils.errors import UserError
from utils.script import run_script


def image(path, seed=0, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Two classes of two images each, for training and for the test."""
    for part in ('train', 'val', 'test'):
        for number, name in enumerate(('cat/0', 'cat/1', 'dog/0', 'dog/1')):
            image(tmp_path / part / f'{name}.png', number)
    return tmp_path


def names(root, part='train'):
    paths, labels, classes = image_files.list_images(str(root), part, ('train', 'val'))
    return {os.path.relpath(path, root / part): classes[label] for path, label in zip(paths, labels, strict=True)}


WHOLE = {'cat/0.png': 'cat', 'cat/1.png': 'cat', 'dog/0.png': 'dog', 'dog/1.png': 'dog'}


def refused(root):
    with pytest.raises(UserError) as error:
        folders.read_folders(str(root))
    assert '\n' not in str(error.value)
    return str(error.value).replace(str(root), 'ROOT')


# What is listed

def test_every_format_that_can_be_read_is_and_what_is_left_out_is_named(root, capsys):
    kinds = [kind for kind in ('gif', 'jfif', 'JPG', 'jp2', 'avif', 'webp', 'tiff', 'bmp', 'ppm', 'tga')
             if f'.{kind.lower()}' in image_files.readable_extensions()]
    assert len(kinds) >= 8
    for kind in kinds:
        image(root / f'train/cat/more.{kind}')
    for name in ('a.heic', 'b.heic', 'c.txt', 'd', 'e.pdf', 'f.h5', 'g.mp4'):
        (root / 'train/cat' / name).write_text('')
    image(root / 'train/stray.png')
    assert names(root) == {**WHOLE, **{f'cat/more.{kind}': 'cat' for kind in kinds}}
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f'{root}/train: 8 files left out: 2 .heic ({root}/train/cat/')
    assert '1 outside of the class folders' in line and 'and 2 more' in line
    loaded = datasets.load('folder', str(root), 'train')
    assert len(loaded.labels) == 4 + len(kinds)


def test_nothing_is_said_where_nothing_is_left_out(root, capsys):
    assert names(root) == WHOLE and capsys.readouterr().out == ''


def test_folders_that_programs_leave_behind_are_no_classes(root):
    for name in ('.ipynb_checkpoints', '__MACOSX', '@eaDir', 'dog/.ipynb_checkpoints', 'dog/__MACOSX'):
        image(root / f'train/{name}/0.png')
    image(root / 'train/dog/._0.png')
    assert names(root) == WHOLE


@pytest.mark.parametrize('link, target', [
    ('cat/itself', '.'), ('cat/itself', 'itself'), ('cat/upwards', '..'), ('cat/upwards', '../../..'), ('cat/far', '/'),
    ('cat/2.png', '1.png'), ('cat/2.png', 'ROOT/train/cat/0.png'), ('cat/below/a', '../below'),
    ('cat/below', '../cat')])
def test_a_link_adds_no_image_to_its_class(link, target, root, capsys):
    (root / 'train' / link).parent.mkdir(exist_ok=True)
    (root / 'train' / link).symlink_to(target.replace('ROOT', str(root)))
    assert names(root) == WHOLE and '1 file left out' in capsys.readouterr().out


def test_links_in_circles_between_folders_of_a_class(root):
    for one, other in ('ab', 'ba'):
        image(root / f'train/cat/{one}/{one}.png')
        (root / f'train/cat/{one}/to-{other}').symlink_to(f'../{other}')
    assert names(root) == {**WHOLE, 'cat/a/a.png': 'cat', 'cat/b/b.png': 'cat'}


def test_a_hard_link_is_the_same_file(root):
    os.link(root / 'train/cat/0.png', root / 'train/cat/2.png')
    assert names(root) == WHOLE
    os.link(root / 'train/cat/0.png', root / 'train/dog/2.png')
    assert refused(root) == ('ROOT/train/cat/0.png and ROOT/train/dog/2.png are the same file, in two classes; remove '
                             'one of them')


@pytest.mark.parametrize('link, target, first, second', [
    ('dog/2.png', '../cat/1.png', 'cat/1.png', 'dog/2.png'), ('dog/cats', '../cat', 'cat/0.png', 'dog/cats/0.png'),
    ('cow', 'cat', 'cat/0.png', 'cow/0.png')])
def test_one_file_in_two_classes_is_refused(link, target, first, second, root):
    (root / 'train' / link).symlink_to(target)
    assert refused(root).startswith(f'ROOT/train/{first} and ROOT/train/{second} are the same file, in two classes')
    with pytest.raises(UserError, match='are the same file, in two classes'):
        datasets.describe('folder', str(root))


def test_folders_of_links_elsewhere_are_read(root, tmp_path_factory):
    pool = tmp_path_factory.mktemp('pool')
    image(pool / 'owls/0.png', 7)
    image(pool / '9.png', 9)
    (root / 'train/owl').symlink_to(pool / 'owls')
    (root / 'train/cat/9.png').symlink_to(pool / '9.png')
    assert names(root) == {**WHOLE, 'owl/0.png': 'owl', 'cat/9.png': 'cat'}


def test_links_that_lead_nowhere_are_damaged_images_and_pipes_are_none(root, capsys):
    (root / 'train/cat/2.png').symlink_to('nowhere.png')
    os.mkfifo(root / 'train/cat/3.png')
    assert names(root) == {**WHOLE, 'cat/2.png': 'cat'} and '1 no file' in capsys.readouterr().out


def test_the_order_is_that_of_torchvision(root):
    from torchvision.datasets import ImageFolder
    for name in ('cat/b/z.png', 'cat/B/a.png', 'cat/a/2.png', 'cat/a/10.png', 'dog/a.b/1.png', 'dog/a/1.png',
                 'élan/ß.png'):
        image(root / 'train' / name)
    paths, labels, classes = image_files.list_images(str(root), 'train', ('train', 'val'))
    reference = ImageFolder(root / 'train')
    assert list(zip(paths, labels)) == reference.samples and classes == reference.classes


# A classifier needs two classes

@pytest.mark.parametrize('script, part', [(imagenet, 'val'), (cifar, 'test')])
def test_a_single_class_and_a_folder_level_too_many(script, part, tmp_path, monkeypatch):
    flags = f'-c {tmp_path}/run --train-batch 2' + ' --dataset folder' * (script is cifar)
    for name in ('cat', 'dog'):
        image(tmp_path / f'set/train/images/{name}/0.png')
        image(tmp_path / f'set/{part}/images/{name}/0.png')
    with pytest.raises(UserError, match='has a single class folder, images, with the folders cat, dog in it; if these '
                                        f'are the classes, move them up, to {tmp_path}/set/train'):
        call(monkeypatch, script, f'{flags} --data {tmp_path}/set')
    for folder in (f'{tmp_path}/set/train/images', f'{tmp_path}/set/{part}/images'):
        image(f'{folder}/0.png')
    with pytest.raises(UserError, match='a single class folder, images; a classifier needs at least two'):
        call(monkeypatch, script, f'{flags} --data {tmp_path}/set')
    assert not (tmp_path / 'run').exists()


# Sizes

def test_an_image_far_longer_than_wide_takes_no_gigabytes_and_its_middle_is_what_it_was():
    transform = folders.evaluation_transform(8, 9)
    plain = v2.Compose(transform.transforms[1:])
    for size in ((30000, 1), (1, 30000)):
        seen = []
        spied = v2.Compose([*transform.transforms[:1], lambda image: seen.append(image.size) or image,
                            *transform.transforms[1:]])
        assert spied(Image.new('RGB', size)).shape == (3, 8, 8) and max(seen[0]) <= 20 * min(size)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 600, 3), dtype=np.uint8)
    for long in (pixels, pixels.transpose(1, 0, 2)):
        long = Image.fromarray(np.ascontiguousarray(long))
        assert (transform(long).int() - plain(long).int()).abs().max() <= 1
    usual = Image.fromarray(pixels[:, :100])
    assert torch.equal(transform(usual), plain(usual))


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(root, monkeypatch):
    monkeypatch.setattr(image_files, 'open_image', lambda path: pytest.fail('an image was read'))
    with pytest.raises(UserError, match=r'8 images of 1000000x1000000 pixels take 2.235e\+04 GB of memory, and .* GB '
                                        'are free; give a smaller --image-size'):
        call(monkeypatch, cifar, f'--dataset folder --data {root} --image-size 1000000 --train-batch 2 -c {root}/run')
    assert not (root / 'run').exists()


def test_free_memory_is_that_of_the_control_group_too(monkeypatch):
    files = {'/proc/meminfo': 'MemTotal: 900 kB\nMemAvailable: 500 kB\n', '/sys/fs/cgroup/memory.max': '400000\n',
             '/sys/fs/cgroup/memory.current': '300000\n', '/sys/fs/cgroup/memory.stat': 'anon 5\ninactive_file 1000\n'}
    monkeypatch.setattr(memory, '_read', lambda path: files.get(path, ''))
    assert memory.free() == 101000
    files['/sys/fs/cgroup/memory.max'] = 'max\n'
    assert memory.free() == 512000
    files.clear()
    assert memory.free() == float('inf')


# What cannot be read

def plain_batches(folder):
    """Images as they are, one in a batch, read in this process."""
    return folders.ImageBatches(folder, [0] * 3, [1] * 3, 1, 'cpu', v2.PILToTensor(), workers=0)


def test_an_image_that_was_mended_or_removed_is_not_skipped_any_longer(root, capsys, tmp_path):
    def report():
        part = plain_batches(folders.read_folder(str(root), 'train'))
        list(part)
        folders.report_skipped({'train': part}, tmp_path / 'skipped.txt')
        return capsys.readouterr().out

    odd = ['cat/a\nb.png', 'cat/a\tb.png', 'cat/\udce9.png']
    for name in odd:
        (root / 'train' / name).write_text('no image')
    assert report().startswith('skipped 3 images') and report().count('\n') == 1
    with open(tmp_path / 'skipped.txt', encoding='utf-8', errors='surrogateescape', newline='') as file:
        listed = [path for path, _ in csv.reader(file, delimiter='\t')]
    assert listed == sorted(str(root / 'train' / name) for name in odd)
    image(root / 'train/cat/fine.png')
    os.replace(root / 'train/cat/fine.png', root / 'train' / odd[0])
    os.remove(root / 'train' / odd[1])
    assert report().startswith('skipped 1 image that cannot be read') and len(names(root)) == 6
    os.remove(root / 'train' / odd[2])
    assert report() == '' and (tmp_path / 'skipped.txt').read_text() == ''


def test_a_resumed_epoch_keeps_what_it_did_not_try_again(root, tmp_path, capsys):
    (root / 'train/cat/0.png').write_text('no image')
    part = plain_batches(folders.read_folder(str(root), 'train'))
    list(part.shuffled(0, 0))
    folders.report_skipped({'train': part}, tmp_path / 'skipped.txt')
    resumed = plain_batches(part.folder)
    list(resumed.shuffled(0, 0, 4))
    capsys.readouterr()
    folders.report_skipped({'train': resumed}, tmp_path / 'skipped.txt')
    assert 'skipped 1 image' in capsys.readouterr().out


def test_palettes_with_transparency_and_large_images_are_read_without_a_word(tmp_path, monkeypatch):
    write_folder(tmp_path, number=1, size=(8, 8))
    colours = Image.new('RGB', (8, 8), (200, 40, 90))
    colours.quantize(4).save(tmp_path / 'train/cat/1.png', transparency=bytes([9, 255, 9, 255]))
    with Image.open(tmp_path / 'train/cat/1.png') as palette, warnings.catch_warnings():
        warnings.simplefilter('error')
        image_files.as_rgb(palette)
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40)
        split = datasets.load('folder', str(tmp_path), 'train', 8)
    assert split.images[1, 0, 0].tolist() == [200, 40, 90]


# The processes that read

class Items(torch.utils.data.Dataset):
    values = [torch.arange(40000), torch.arange(40000.0).reshape(200, 200).T, torch.zeros(0, 3, 8, 8),
              torch.rand(3, 5), torch.tensor(7), torch.ones(20000, dtype=torch.bool)]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index].clone(), str(index)


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_tensors_come_as_they_are_and_not_through_shared_memory(workers):
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # of more workers than processors too
        items = list(batches.read_ahead(Items(), workers))
    for (tensor, name), (index, value) in zip(items, enumerate(Items.values), strict=True):
        assert name == str(index) and torch.equal(tensor, value) and tensor.dtype == value.dtype
        assert not tensor.is_shared()
        tensor.add_(tensor)  # can be written to


def test_where_there_are_too_many_open_files_tensors_come_as_bytes(monkeypatch):
    def full(name):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(os, 'memfd_create', full, raising=False)
    (tensor, _), *_ = batches.read_ahead(Items(), 1)
    assert torch.equal(tensor, Items.values[0])


def test_where_no_process_can_be_started_this_one_reads(monkeypatch, capsys):
    def start(self):
        raise OSError(28, 'No space left on device')

    batches._say_without_readers.cache_clear()
    monkeypatch.setattr('multiprocessing.context.ForkProcess.start', start)
    for _ in range(2):
        assert [name for _, name in batches.read_ahead(Items(), 2)] == list('012345')
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('no process can be started to read images ([Errno 28] No space left on device)')


class Deadly(Items):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed_ends_the_run_with_a_sentence(monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *args: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as error:
        run_script(lambda: list(batches.read_ahead(Deadly(), 1)))
    assert re.fullmatch(r'error: a process that reads images was killed \(DataLoader worker .*\), as happens where '
                        'memory runs out; try fewer of them, a smaller -j, or a smaller batch', error.value.code)


def test_a_reader_that_is_killed_in_training_says_how_to_resume(root, monkeypatch):
    parent = os.getpid()
    monkeypatch.setattr(folders, 'open_image', lambda path: os.kill(os.getpid(), signal.SIGKILL)
                        if os.getpid() != parent else pytest.fail('read here'))
    with pytest.raises(UserError, match='was killed .*; the finished epochs are kept, resume with: python imagenet.py '
                                        f'--resume {root}/run/checkpoint.pth.tar'):
        call(monkeypatch, imagenet, f'--data {root} -a resnet18 --image-size 32 --train-batch 2 -j 1 -c {root}/run')


def test_names_of_any_bytes_in_any_locale_end_no_run(tmp_path):
    """One short run in a locale of ASCII alone; then its checkpoint in UTF-8, which must know the same classes."""
    folders_of = [b'caf\xe9', 'été'.encode(), '猫'.encode(), b'$x^$ $', b'_a', b'new\nline', b'tab\there']
    root = os.fsencode(tmp_path) + b'/$d_$ \xe9'
    for part in (b'train', b'test'):
        for number, name in enumerate(folders_of):
            image(os.fsdecode(os.path.join(root, part, name, b'0.png')), number)
    command = [sys.executable, '-W', 'error', 'cifar.py', '--dataset', 'folder', '--data', root, '-a', 'lenet',
               '--epochs', '1', '--train-batch', '7', '-c', root + b'/run $^$']
    locale = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    for words, settings in ((command, locale), ([sys.executable, 'evaluate.py', root + b'/run $^$/checkpoint.pth.tar'],
                                                {'PYTHONUTF8': '1'})):
        done = subprocess.run(words, env={**os.environ, 'OMP_NUM_THREADS': '1', **settings}, capture_output=True,
                              cwd=os.path.dirname(cifar.__file__))
        assert (done.returncode, done.stderr) == (0, b''), done.stderr.decode(errors='replace')
    with open(root + b'/run $^$/confusion.csv', 'rb') as file:
        header = file.read().split(b'\r\n')[0]
    assert all(name in header for name in folders_of[:5])
    assert os.path.exists(root + b'/run $^$/result.json')
