"""Decoded images of a folder are kept beside it: the same bits, read again only while nothing has changed."""
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import refused
from utils import datasets, decoded

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for part in ('train', 'test'):
        for name in ('cat', 'dog'):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                pixels = generator.integers(256, size=(40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f'{index}.png')
    return tmp_path


@pytest.fixture
def opened(monkeypatch):
    """The paths of the images that are decoded."""
    paths, open_image = [], datasets.open_image
    monkeypatch.setattr(datasets, 'open_image', lambda path: paths.append(path) or open_image(path))
    return paths


def load(folder, part='train', size=32, cache=True):
    return datasets.load('folder', str(folder), part, size, 2, cache)


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one[2:] == other[2:]


def test_the_second_time_nothing_is_decoded_and_the_bits_are_the_same(folder, opened):
    plain = load(folder, cache=False)
    assert len(opened) == 6 and not (folder / '.decoded').exists()
    first, second = load(folder), load(folder)
    assert len(opened) == 12 and same(first, plain) and same(second, plain)
    assert datasets.fingerprint(second) == datasets.fingerprint(plain)
    assert load(folder, cache=False) and len(opened) == 18


def test_each_part_and_size_has_its_own(folder, opened):
    shapes = [load(folder, part, size).images.shape[1] for part in ('train', 'test') for size in (32, 16)]
    assert shapes == [32, 16] * 2 and len(opened) == 24
    assert [load(folder, part, size).images.shape[1] for part in ('train', 'test') for size in (32, 16)] == shapes
    assert len(opened) == 24 and len(list((folder / '.decoded').iterdir())) == 4


@pytest.mark.parametrize('change', ['pixels', 'time', 'name', 'more', 'fewer', 'pillow'])
def test_what_changes_the_images_has_them_decoded_again(change, folder, opened, monkeypatch):
    load(folder)
    image = folder / 'train/dog/1.png'
    if change == 'pixels':
        Image.new('RGB', (40, 36), 'red').save(image)
    elif change == 'time':
        os.utime(image, ns=(1, 1))
    elif change == 'name':
        image.rename(folder / 'train/dog/7.png')
    elif change == 'more':
        Image.new('RGB', (5, 5), 'red').save(folder / 'train/cat/9.png')
    elif change == 'fewer':
        image.unlink()
    else:
        monkeypatch.setattr(datasets.PIL, '__version__', '0.1')
    before = len(opened)
    assert same(load(folder), load(folder, cache=False)) and len(opened) > before + 5
    before = len(opened)
    assert load(folder) and len(opened) == before
    assert [path.name for path in (folder / '.decoded').iterdir()] == ['train-32.npz']  # the old one is replaced


def test_a_damaged_file_is_noticed(folder, opened):
    plain, path = load(folder), folder / '.decoded/train-32.npz'
    whole = path.read_bytes()
    for damaged in (whole[:1000], b'', *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
                                         for at in range(200, len(whole) - 400, len(whole) // 20))):
        path.write_bytes(damaged)
        before = len(opened)
        assert same(load(folder), plain) and len(opened) == before + 6
        assert path.read_bytes() == whole


def test_a_folder_that_may_not_be_written_to_is_no_obstacle(folder, opened, monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(decoded.os, 'makedirs', refuse)
        assert same(load(folder), load(folder, cache=False)) and not (folder / '.decoded').exists()
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and said.startswith('the decoded images are not kept, as ') and 'Permission' in said
    monkeypatch.setattr(decoded.np, 'savez', refuse)
    assert same(load(folder), load(folder, cache=False)) and not list((folder / '.decoded').iterdir())
    assert 'could not be written (Permission denied)' in capsys.readouterr().out


def test_of_several_runs_at_once_one_decodes(folder, opened):
    found = []
    threads = [threading.Thread(target=lambda: found.append(load(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(same(each, found[0]) for each in found) and len(opened) == 6


def test_a_run_that_was_killed_leaves_no_lock_behind(folder, opened):
    program = ('import os, sys\nfrom utils import decoded\n'
               'decoded.kept(sys.argv[1], "train-32", "x", lambda: os.kill(os.getpid(), 9))')
    done = subprocess.run([sys.executable, '-c', program, str(folder)], cwd=ROOT, timeout=60)
    assert done.returncode == -9 and len(load(folder).images) == 6


def test_no_cache_is_for_folders(monkeypatch, capsys, tmp_path):
    assert '--no-cache is for --dataset folder, not digits' in refused(monkeypatch, capsys, tmp_path,
                                                                       '-d digits --no-cache')
