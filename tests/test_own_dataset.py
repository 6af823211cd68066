"""--dataset module:Class: any torch Dataset of (image, label), in memory or read by workers."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cifar
import evaluate
from helpers import call
from utils import datasets, own_dataset
from utils.batches import Split, mean_and_std
from utils.errors import UserError
from utils.logger import read_log

SOURCE = '''
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


class Stripes(Dataset):
    """Four kinds of images with a bright stripe; `kind` says as what they come."""
    kind, count, classes = 'pil', 48, ['top', 'left', 'middle', 'none']

    def __init__(self, root, train):
        self.count = self.count if train else 16
        self.generator = np.random.default_rng(int(train))
        self.noise = self.generator.integers(0, 60, (self.count, 32, 32, 3), dtype=np.uint8)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label, pixels = index % 4, self.noise[index].copy()
        if label < 3:
            whole = slice(None)
            pixels[[slice(0, 9), whole, slice(12, 20)][label], [whole, slice(0, 9), whole][label]] += 180
        return {'pil': lambda: Image.fromarray(pixels), 'array': lambda: pixels,
                'tensor': lambda: torch.from_numpy(pixels).permute(2, 0, 1),
                'float': lambda: torch.from_numpy(pixels).permute(2, 0, 1) / 255}[self.kind](), torch.tensor(label)


class BySplit(Stripes):
    def __init__(self, split):
        super().__init__(None, split == 'train')


class NeitherTrainNorSplit(Stripes):
    def __init__(self, root):
        super().__init__(root, True)


class Empty(Stripes):
    count = 0

    def __len__(self):
        return 0


class Broken(Stripes):
    def __getitem__(self, index):
        if index == 5:
            raise KeyError('no image 5')
        return super().__getitem__(index)


class Floats(Stripes):
    def __getitem__(self, index):
        return np.full((4, 4), 2.5), 0


class Words(Stripes):
    def __getitem__(self, index):
        return np.zeros((4, 4), dtype=np.uint8), 'cat'


class Bfloat(Stripes):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return torch.from_numpy(np.asarray(image) / 255).bfloat16(), label


class Ids(Stripes):
    classes = None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, 2 ** 40 + label


class Refuses(Stripes):
    def __init__(self, root, train):
        raise OSError(f'nothing in {root}')
'''
FLAGS = '--arch lenet --epochs 2 --train-batch 8 --lr 0.02 --manualSeed 4'


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """The module as a user has it: in the folder where the script is started."""
    (tmp_path / 'stripes.py').write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    yield tmp_path
    sys.modules.pop('stripes', None)


@pytest.mark.parametrize('kind', ['pil', 'array', 'tensor', 'float'])
def test_images_of_every_kind_are_read_alike(kind, stripes, monkeypatch):
    import stripes as module
    monkeypatch.setattr(module.Stripes, 'kind', kind)
    split = datasets.load('stripes:Stripes', 'data', 'train')
    expected = module.Stripes(None, True)
    assert isinstance(split, Split) and split.images.dtype == torch.uint8 and split.classes == expected.classes
    assert split.labels.tolist() == [index % 4 for index in range(48)]
    for index in (0, 7, 47):
        pixels = expected.noise[index].astype(int)
        assert (split.images[index].numpy().astype(int) - pixels).min() >= 0
        monkeypatch.setattr(module.Stripes, 'kind', 'array')
        assert np.array_equal(split.images[index].numpy(), expected[index][0])


def test_sizes_channels_and_classes():
    class Grey:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return np.full((20, 40), 10 * index, dtype=np.uint8), index

    image, label = own_dataset._item(Grey(), 2, 32)
    assert image.size == (32, 32) and label == 2 and set(np.unique(np.asarray(image))) == {20}
    # a tensor has its channels first
    assert own_dataset._as_pil(torch.zeros(3, 5, 3, dtype=torch.uint8)).size == (3, 5)
    assert own_dataset._as_pil(np.zeros((3, 5, 3), dtype=np.uint8)).size == (5, 3)  # an array last


def test_a_whole_run_and_what_looks_at_it(stripes, monkeypatch, capsys):
    call(monkeypatch, cifar, f'--dataset stripes:Stripes {FLAGS} --val-split 0.2 --label-noise 0.1 -c run')
    log = read_log('run/log.txt')
    assert log['Train Loss'][1] < log['Train Loss'][0]
    args = json.load(open('run/args.json'))
    assert args['dataset'] == 'stripes:Stripes' and sum(args['training images by class']) == 40
    capsys.readouterr()
    call(monkeypatch, cifar, '-e --resume run/checkpoint.pth.tar')
    call(monkeypatch, evaluate, 'run/checkpoint.pth.tar --mode train -o out')
    assert capsys.readouterr().out.count('top-1') == 2


def test_without_a_name_the_folder_is_named_after_the_class(stripes, monkeypatch):
    call(monkeypatch, cifar, f'--dataset stripes:BySplit {FLAGS} --epochs 1')
    assert (stripes / 'checkpoints/stripes.BySplit-lenet/result.json').exists()


@pytest.fixture
def lazy(stripes, monkeypatch):
    monkeypatch.setattr(own_dataset, 'IN_MEMORY', 1000)
    return stripes


def test_what_does_not_fit_is_read_by_workers_and_is_the_same_data(lazy, monkeypatch):
    split = datasets.load('stripes:Stripes', 'data', 'train')
    monkeypatch.setattr(own_dataset, 'IN_MEMORY', 2 ** 30)
    whole = datasets.load('stripes:Stripes', 'data', 'train')
    assert isinstance(split, own_dataset.LazySplit) and torch.equal(split.labels, whole.labels)
    assert np.allclose(split.mean_and_std(), mean_and_std(whole.images), rtol=1e-12)
    chosen = split.subset(torch.tensor([7, 1]))
    assert np.array_equal(np.asarray(chosen.image(0)), whole.images[7].numpy()) and chosen.labels.tolist() == [3, 1]
    assert chosen.class_counts() == [0, 1, 0, 1]

    args = cifar.make_parser().parse_args(['-d', 'stripes:Stripes', '--train-batch', '16', '--manualSeed', '1'])
    state = dict(zip(('mean', 'std'), whole.mean_and_std()), classes=whole.classes)
    for part, augment in (('test', False), ('train', True)):
        args.no_augment = not augment
        ours, plain = (cifar.make_batches(args, state, part, one, 'cpu') for one in (split, whole))
        assert len(ours) == len(plain) and ours.class_counts == plain.class_counts
        if not augment:
            for (images, labels), (others, same) in zip(ours, plain, strict=True):
                torch.testing.assert_close(images, others)
                assert torch.equal(labels, same)
        else:
            once, again = (list(ours.shuffled(3, 0)) for _ in range(2))
            assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
            assert [labels.tolist() for _, labels in once] == [labels.tolist() for _, labels in plain.shuffled(3, 0)]


@pytest.mark.parametrize('flags', ['', '--cutout 8 --auto-augment trivialaugment --imbalance exp -j 2'])
def test_a_run_that_reads_with_workers(flags, lazy, monkeypatch):
    call(monkeypatch, cifar, f'--dataset stripes:Stripes {FLAGS} {flags} -c whole')
    call(monkeypatch, cifar, f'--dataset stripes:Stripes {FLAGS} {flags} -j 1 -c again')
    states = [torch.load(f'{name}/checkpoint.pth.tar', weights_only=True)['state_dict'] for name in ('whole', 'again')]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize('name, sentence', [
    ('nowhere:Stripes', "cannot be imported .ModuleNotFoundError: No module named 'nowhere'.; it means Stripes in "
                        "nowhere.py"),
    ('stripes:Nothing', 'cannot be imported .AttributeError'),
    ('stripes:Empty', 'is empty; it needs at least one image'),
    ('stripes:NeitherTrainNorSplit', 'must have a parameter train .* it has root'),
    ('stripes:Broken', "image 5: a pair .* there was KeyError: 'no image 5'"),
    ('stripes:Floats', 'must be uint8, or float from 0 to 1, was given float64 from 2.5 to 2.5'),
    ('stripes:Words', 'the label must be a whole number, was given cat'),
    ('stripes:Ids', '.train. has a label 1099511627779, which makes 1099511627780 classes of 48 images; number'),
    ('stripes:Refuses', 'cannot be made .OSError: nothing in data'),
])
def test_what_is_not_a_data_set_is_refused_in_one_sentence(name, sentence, stripes, monkeypatch):
    with pytest.raises(UserError, match=sentence) as error:
        call(monkeypatch, cifar, f'--dataset {name} {FLAGS} -c run')
    assert '\n' not in str(error.value) and not (stripes / 'run').exists()


def test_images_of_half_precision_are_read_like_those_of_whole(stripes):
    whole, half = (own_dataset.load(f'stripes:{name}', '.', 'train', 32, 0).images for name in ('Stripes', 'Bfloat'))
    assert (whole.int() - half.int()).abs().max() <= 1


def test_names_that_are_no_data_set(monkeypatch, capsys):
    for name in ('cifar11', 'a:b:c', ':x', 'x:'):
        with pytest.raises(SystemExit):
            call(monkeypatch, cifar, f'--dataset {name}')
        assert f"invalid choice: '{name}' (choose from cifar10, " in capsys.readouterr().err


def test_a_pil_image_of_many_bits_is_refused():
    with pytest.raises(ValueError, match='more than 8 bits'):
        own_dataset._as_pil(Image.fromarray(np.zeros((4, 4), dtype=np.int32)))


def test_without_names_the_classes_are_numbers_and_the_training_set_is_read_once(stripes, monkeypatch):
    import stripes as module
    monkeypatch.setattr(module.Stripes, 'classes', None)
    read, make = [], own_dataset._make
    monkeypatch.setattr(own_dataset, '_make', lambda name, root, part: read.append(part) or make(name, root, part))
    call(monkeypatch, cifar, f'--dataset stripes:Stripes {FLAGS} --epochs 1 -c run')
    assert read == ['train', 'test']
    assert torch.load('run/checkpoint.pth.tar', weights_only=True)['classes'] == ['0', '1', '2', '3']


def test_a_single_class_is_refused_by_its_name(stripes, monkeypatch):
    import stripes as module
    make = module.Stripes.__getitem__
    monkeypatch.setattr(module.Stripes, '__getitem__', lambda self, index: (make(self, index)[0], 2))
    with pytest.raises(UserError, match='has images of a single class, middle; a classifier needs at least two'):
        call(monkeypatch, cifar, f'--dataset stripes:Stripes {FLAGS} -c run')
