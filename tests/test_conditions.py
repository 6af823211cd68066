import json
import os
import pathlib
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cifar
from helpers import refused
from utils import conditions, datasets
from utils.batches import Split, mean_and_std
from utils.errors import UserError

GOLDENS = np.load(pathlib.Path(__file__).parent / 'goldens/imbalance.npz')
CPU = torch.device('cpu')
ALL = '--val-split 0.2 --imbalance exp --imbalance-factor 0.3 --train-fraction 0.5 --label-noise 0.4'


def labelled(labels):
    """Images of one pixel: their place, in two bytes, and their class."""
    place = np.arange(len(labels))
    pixels = np.stack([place // 256, place % 256, labels], axis=1).astype(np.uint8)
    names = [f'class{c}' for c in range(max(labels) + 1)]
    return Split(torch.from_numpy(pixels)[:, None, None], torch.from_numpy(labels), names)


def split_of(counts):
    """So many images of each class, in random order."""
    return labelled(np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)))


def places(split):
    pixels = split.images[:, 0, 0].long()
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()


def classes_of_images(split):
    return split.images[:, 0, 0, 2].tolist()


def counts_by_loop(labels, classes):
    return [sum(label == c for label in labels) for c in range(classes)]


def is_part_of(part, split):
    """Each image at most once, in the order of `split`, with the label that it has there."""
    where = places(part)
    labels = split.labels[where].tolist()
    return where == sorted(set(where)) and part.labels.tolist() == labels == classes_of_images(part)


def arguments(flags):
    parser = cifar.make_parser()
    args = parser.parse_args(flags.split())
    conditions.check_arguments(args, parser)
    return args


def call(monkeypatch, flags):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split()])
    cifar.main()


counts = st.lists(st.integers(2, 25), min_size=1, max_size=6)
fractions = st.one_of(st.sampled_from([0.001, 0.1, 0.25, 0.5, 0.9]), st.floats(0.001, 0.9))


# The validation split

@settings(deadline=None, max_examples=60)
@given(counts=counts, fraction=fractions, seed=st.integers(0, 3))
def test_the_validation_split_is_stratified_disjoint_complete_and_loses_no_class(counts, fraction, seed):
    split = split_of(counts)
    train, val = conditions.split_validation(split, fraction, seed)
    assert is_part_of(train, split) and is_part_of(val, split) and train.classes == val.classes == split.classes
    assert sorted(places(train) + places(val)) == list(range(len(split.labels)))
    for count, left, aside in zip(counts, train.class_counts(), val.class_counts()):
        assert left >= 1 and aside >= 1 and left + aside == count
        assert abs(aside - count * fraction) <= 0.5 or aside in (1, count - 1)


def test_the_validation_split_is_fixed_by_the_seed():
    split = split_of([20, 30])
    first, again, other = (places(conditions.split_validation(split, 0.5, seed)[1]) for seed in (0, 0, 1))
    assert first == again != other


def test_a_class_of_one_image_cannot_be_split():
    with pytest.raises(UserError) as error:
        conditions.split_validation(split_of([5, 4, 1]), 0.1, seed=0)
    assert '--val-split 0.1' in str(error.value) and 'class2 has 1 of 10' in str(error.value)


# Imbalance

@pytest.mark.parametrize('name, classes', [('cifar10', 10), ('cifar100', 100)])
@pytest.mark.parametrize('kind', ['exp', 'step'])
def test_the_sizes_are_those_of_the_original_code(name, classes, kind):
    for factor, expected in zip(GOLDENS['factors'].tolist(), GOLDENS[f'{name}/{kind}/counts'].tolist(), strict=True):
        assert conditions.imbalanced_sizes(kind, factor, classes, int(GOLDENS['n_train'])) == expected
        if factor == 1:
            assert expected == GOLDENS[f'{name}/none/counts'].tolist()


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('factor', [0.1, 0.02, 0.01])
def test_the_images_that_stay_are_those_of_the_original_code(seed, factor):
    labels, golden = GOLDENS['select/labels'], f'select/rand{seed}_f{factor}'
    split = labelled(labels)
    expected = GOLDENS[f'{golden}/indices'].tolist()
    limited = np.minimum(conditions.imbalanced_sizes('exp', factor, 10, 400), np.bincount(labels)).tolist()
    assert limited == GOLDENS[f'{golden}/counts'].tolist()
    assert conditions.choose(split, limited, np.random.RandomState(seed)).tolist() == sorted(expected)
    if min(limited) > 0:
        thinned = conditions.imbalanced(split, 'exp', factor, seed)
        assert places(thinned) == sorted(expected) and is_part_of(thinned, split)
        assert sorted(thinned.labels.tolist()) == sorted(GOLDENS[f'{golden}/targets'].tolist())
    else:
        with pytest.raises(UserError):
            conditions.imbalanced(split, 'exp', factor, seed)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(['exp', 'step']), factor=st.floats(0.01, 1), classes=st.integers(1, 12),
       each=st.integers(1, 500))
@example(kind='step', factor=0.1, classes=7, each=30)
@example(kind='exp', factor=0.1, classes=1, each=30)
def test_there_is_a_size_for_every_class_and_no_class_is_larger_than_the_one_before(kind, factor, classes, each):
    sizes = conditions.imbalanced_sizes(kind, factor, classes, classes * each)
    assert len(sizes) == classes and sizes == sorted(sizes, reverse=True) and all(type(size) is int for size in sizes)
    if kind == 'step':
        assert sizes == [each] * (classes // 2) + [int(each * factor)] * (classes - classes // 2)
    elif classes > 1:
        assert sizes[0] == each and abs(sizes[-1] - each * factor) <= 1


def test_step_with_an_odd_number_of_classes_loses_none():
    split = split_of([20] * 5)
    thinned = conditions.imbalanced(split, 'step', 0.1, seed=0)
    assert thinned.class_counts() == [20, 20, 2, 2,
                                      2] and thinned.classes == split.classes and is_part_of(thinned, split)


@pytest.mark.parametrize('kind, name', [('exp', 'class3'), ('step', 'class2')])
def test_a_factor_that_leaves_a_class_empty_is_refused_by_name(kind, name):
    with pytest.raises(UserError) as error:
        conditions.imbalanced(split_of([20] * 4), kind, 0.049, seed=0)
    assert f'--imbalance-factor 0.049 leaves class {name} without an image' in str(error.value)
    assert '20 each' in str(error.value)
    smallest = conditions.imbalanced(split_of([20] * 4), kind, 0.0501, seed=0).class_counts()
    assert smallest[-1] == 1


def test_a_class_that_is_smaller_than_asked_keeps_all_and_labels_stay_with_their_images():
    split = split_of([40, 3, 40, 37])  # 30 each if they were balanced
    for seed in range(5):
        thinned = conditions.imbalanced(split, 'exp', 0.5, seed)
        assert thinned.class_counts() == [30, 3, 18, 15] and is_part_of(thinned, split)


def test_the_imbalance_seed_alone_says_which_images_stay():
    split = split_of([50] * 4)

    def kept(flags):
        return places(conditions.apply(arguments(f'--imbalance step --imbalance-factor 0.2 {flags}'), split)[0])

    first = kept('--manualSeed 0')
    assert first == kept('--manualSeed 7') == kept('--manualSeed 7 --imbalance-seed 0')
    other = kept('--manualSeed 0 --imbalance-seed 1')
    assert other != first and len(other) == len(first) == 120
    assert [place for place in first if split.labels[place] < 2] == [place for place in other
                                                                     if split.labels[place] < 2]


# A part of each class

@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(1, 25), min_size=1, max_size=6), fraction=st.floats(0.001, 1),
       seed=st.integers(0, 3))
def test_a_fraction_is_stratified_and_at_least_one_image_of_each_class(counts, fraction, seed):
    split = split_of(counts)
    part = conditions.fraction_of(split, fraction, seed)
    assert is_part_of(part, split) and part.classes == split.classes
    for count, left in zip(counts, part.class_counts()):
        assert left == 1 and count * fraction < 1 or abs(left - count * fraction) <= 0.5
    assert places(conditions.fraction_of(split, fraction, seed)) == places(part)


def test_a_fraction_is_fixed_by_the_seed_and_every_image_has_a_chance():
    split = split_of([12, 30])
    drawn = [tuple(places(conditions.fraction_of(split, 0.25, seed))) for seed in range(60)]
    assert len(set(drawn)) == 60 and {place for part in drawn for place in part} == set(range(42))
    assert places(conditions.fraction_of(split, 1, seed=0)) == list(range(42))


# Label noise

@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(1, 25), min_size=2, max_size=6), fraction=st.floats(0.001, 1),
       seed=st.integers(0, 3))
@example(counts=[3, 5], fraction=1.0, seed=0)
def test_label_noise_changes_exactly_its_share_of_the_labels(counts, fraction, seed):
    split = split_of(counts)
    before = split.labels.clone()
    if not round(fraction * len(before)):
        with pytest.raises(UserError, match=f'--label-noise {fraction} is of {len(before)} images less than one'):
            conditions.with_label_noise(split, fraction, seed)
        return
    noisy = conditions.with_label_noise(split, fraction, seed)
    wrong = sum(label != original for label, original in zip(noisy.labels.tolist(), before.tolist()))
    assert wrong == round(fraction * len(before)) and all(0 <= label < len(counts) for label in noisy.labels.tolist())
    assert noisy.images is split.images and noisy.labels.dtype == torch.int64
    assert torch.equal(split.labels, before)
    assert torch.equal(conditions.with_label_noise(split, fraction, seed).labels, noisy.labels)


def test_another_seed_gives_other_wrong_labels():
    split = split_of([30, 30])
    wrong = {tuple((conditions.with_label_noise(split, 0.5, seed).labels != split.labels).tolist()) for seed
             in range(10)}
    assert len(wrong) == 10


def test_every_other_class_is_reached_about_equally_and_from_every_class():
    sizes = [2000, 4000, 6000, 8000]
    split = split_of(sizes)
    noisy = conditions.with_label_noise(split, 0.6, seed=0)
    reached = [[0] * 4 for _ in range(4)]
    for original, label in zip(split.labels.tolist(), noisy.labels.tolist()):
        reached[original][label] += 1
    for original, size in enumerate(sizes):
        for label in range(4):
            share = 0.4 if label == original else 0.2
            deviation = (size * share * (1 - share)) ** 0.5
            assert abs(reached[original][label] - share * size) < 5 * deviation


def test_noise_in_all_labels_leaves_none_right():
    split = split_of([10, 1, 20])
    noisy = conditions.with_label_noise(split, 1.0, seed=0)
    assert (noisy.labels != split.labels).all() and set(noisy.labels.tolist()) == {0, 1, 2}
    both = split_of([4, 5])
    assert torch.equal(conditions.with_label_noise(both, 1.0, seed=0).labels, 1 - both.labels)


def test_one_class_has_no_wrong_label():
    with pytest.raises(UserError, match='--label-noise 0.5 needs another class'):
        conditions.with_label_noise(split_of([10]), 0.5, seed=0)


# All of them

def test_nothing_selected_is_the_same_split():
    split = split_of([5, 6])
    assert conditions.apply(arguments('--manualSeed 0'), split) == (split, None)
    train, val = conditions.apply(arguments('--manualSeed 0'), split)
    assert train is split and val is None


def test_the_validation_images_are_taken_first_and_stay_balanced_and_well_labelled():
    split = split_of([60] * 5)
    _, plain = conditions.apply(arguments('--val-split 0.2 --manualSeed 4'), split)
    train, val = conditions.apply(arguments(f'{ALL} --manualSeed 4'), split)
    assert places(val) == places(plain) and val.class_counts() == [12] * 5 and is_part_of(val, split)
    assert not set(places(train)) & set(places(val))


def test_first_imbalance_then_a_fraction_then_noise():
    split = split_of([60] * 5)
    kept, _ = conditions.apply(arguments('--val-split 0.2 --imbalance exp --imbalance-factor 0.3 --manualSeed '
                                         '4'), split)
    sizes = conditions.imbalanced_sizes('exp', 0.3, 5, 240)
    assert kept.class_counts() == sizes and is_part_of(kept, split)
    train, _ = conditions.apply(arguments(f'{ALL} --manualSeed 4'), split)
    assert set(places(train)) < set(places(kept))
    assert counts_by_loop(classes_of_images(train), 5) == [round(size * 0.5) for size in sizes]
    wrong = sum(label != original for label, original in zip(train.labels.tolist(), classes_of_images(train)))
    assert wrong == round(0.4 * len(train.labels))


def test_the_random_state_of_the_program_is_left_alone():
    def random_state():
        _, words, *position = np.random.get_state()
        return random.getstate(), words.tolist(), position, torch.get_rng_state().tolist()

    split, args = split_of([60] * 5), arguments(f'{ALL} --manualSeed 4')
    first, _ = conditions.apply(args, split)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random_state()
    train, _ = conditions.apply(args, split)
    assert random_state() == before
    assert places(train) == places(first) and torch.equal(train.labels, first.labels)  # nor is it drawn from


def test_the_test_set_is_neither_thinned_nor_mislabelled(capsys):
    state, args = {}, arguments(f'-d digits --train-batch 64 {ALL} --manualSeed 4')
    batches = cifar.load_batches(args, state, CPU, {})
    whole, test = (datasets.load('digits', None, part) for part in ('train', 'test'))
    assert torch.equal(batches['test'].images, test.images) and torch.equal(batches['test'].labels, test.labels)
    train, val = conditions.apply(args, whole)
    assert torch.equal(batches['train'].images, train.images) and torch.equal(batches['train'].labels, train.labels)
    assert torch.equal(batches['val'].images, val.images)
    assert val.class_counts() == [round(0.2 * count) for count in whole.class_counts()]
    assert (state['mean'], state['std'], state['classes']) == (*mean_and_std(whole.images), whole.classes)
    printed, by_class = capsys.readouterr().out, ' '.join(map(str, train.class_counts()))
    assert f'{len(train.labels)} training images, by class: {by_class} | {len(val.labels)} for validation' in printed


@pytest.mark.parametrize('flags, reason', [
    ('--val-split 0.1', '--val-split 0.1'), ('--imbalance exp --train-fraction 0.2',
                                             '--imbalance exp and --train-fraction 0.2'),
])
def test_a_batch_larger_than_what_is_left_is_refused_with_the_reason(flags, reason):
    with pytest.raises(UserError) as error:
        cifar.load_batches(arguments(f'-d digits --train-batch 1400 --manualSeed 4 {flags}'), {}, CPU, {})
    assert '--train-batch 1400' in str(error.value) and f'that {reason} leaves' in str(error.value)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """That of a run with every condition, after one epoch."""
    folder = tmp_path_factory.mktemp('conditions')
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
        call(monkeypatch, f'-d digits -a mlp --epochs 1 --imbalance-seed 3 --manualSeed 4 {ALL} -c {folder}')
    return folder / 'checkpoint.pth.tar'


def test_a_whole_run_trains_on_what_the_conditions_leave(checkpoint):
    args = json.loads((checkpoint.parent / 'args.json').read_text())
    train, _ = conditions.apply(arguments(f'{ALL} --manualSeed 4 --imbalance-seed 3'),
                                datasets.load('digits', None, 'train'))
    assert args['training images by class'] == train.class_counts()
    result = json.loads((checkpoint.parent / 'result.json').read_text())
    assert result['chosen by'] == 'validation' and len(result['test class accuracy']) == 10


# Flags

@pytest.mark.parametrize('flags, sentence', [
    ('--imbalance-factor 0.1', '--imbalance-factor is not used without --imbalance'),
    ('--imbalance-seed 1', '--imbalance-seed is not used without --imbalance'),
    ('--imbalance Exp', "invalid choice: 'Exp'"), ('--imbalance none', "invalid choice: 'none'"),
    ('--imbalance exp --imbalance-factor 0', 'above 0 and at most 1'),
    ('--imbalance exp --imbalance-factor 10', 'at most 1'),
    ('--imbalance exp --imbalance-factor nan', 'was given nan'),
    ('--imbalance exp --imbalance-seed -1', 'of at least 0'),
    ('--train-fraction 0', 'above 0'), ('--train-fraction 1.1', 'at most 1'), ('--label-noise 0', 'above 0'),
    ('--label-noise 1.01', 'at most 1'), ('--val-split 0', 'above 0'), ('--val-split 0.95', 'at most 0.9'),
    ('--no-augment --cutout 8', '--no-augment and --cutout exclude each other'),
    ('--no-augment --autoaugment', '--no-augment and --auto-augment exclude each other'),
    ('--cutout 33', '--cutout 33 is larger than the images, which have 32 pixels a side'),
    ('-d folder --data . --image-size 64 --cutout 65', 'images, which have 64 pixels'), ('--cutout 0', 'of at least 1'),
    ('--workers 2', '--workers is for --dataset folder or module:Class, --auto-augment or a model with transforms'),
    ('--workers 2 --cutout 8', '--workers is for'), ('--autoaugment --workers 0', 'of at least 1'),
    ('--base-batch 64', '--base-batch is not used without'), ('--lr-scaling quadratic', "invalid choice: 'quadratic'"),
    ('--lr-step-size 30 --schedule 10', '--schedule and --lr-step-size both'), ('--lr-step-size 0', 'of at least 1'),
    ('--lr-step-size 30 --lr-schedule cosine', '--lr-step-size belongs to --lr-schedule step, not cosine'),
    ('--optimizer Adam --momentum 0.9', '--momentum is not used by --optimizer Adam'),
    ('--optimizer AdamW --momentum 0', '--momentum is not used by --optimizer AdamW'),
    ('--optimizer Adam --nesterov', '--nesterov is for --optimizer SGD, not Adam'),
    ('--optimizer RMSprop --nesterov', '--nesterov is for --optimizer SGD, not RMSprop'),
    ('--optimizer adam', "invalid choice: 'adam'"),
])
def test_flags_that_contradict_or_do_nothing_are_refused(flags, sentence, monkeypatch, tmp_path, capsys):
    assert sentence in refused(monkeypatch, capsys, tmp_path, flags)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('flags', ['--val-split 0.3', '--imbalance step', '--imbalance-factor 0.5',
                                   '--imbalance-seed 0',
                                   '--train-fraction 0.6', '--label-noise 0.1', '--manualSeed 5'])
@pytest.mark.parametrize('folder', ['', '-c fork'])
def test_the_conditions_cannot_change_when_a_run_is_resumed(flags, folder, checkpoint, monkeypatch, tmp_path, capsys):
    sentence = refused(monkeypatch, capsys, tmp_path, f'--resume {checkpoint} --epochs 2 {flags} {folder}')
    assert f'{flags.split()[0]} cannot change when a run is resumed' in sentence
    assert os.listdir(tmp_path) == []


def test_the_rate_of_biases_cannot_get_a_group_of_its_own_when_a_run_is_resumed(checkpoint, monkeypatch, tmp_path,
                                                                                capsys):
    sentence = refused(monkeypatch, capsys, tmp_path, f'--resume {checkpoint} --epochs 2 --bias-lr-factor 64')
    assert '--bias-lr-factor cannot be switched on or off' in sentence and 'has 1, was given 64' in sentence


def test_a_resumed_run_trains_on_the_same_images_and_may_be_told_so_again(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    call(monkeypatch, f'--resume {checkpoint} --epochs 2 --imbalance-seed 3 --manualSeed 4 {ALL} -c {tmp_path}')
    before, after = (json.loads((folder / 'args.json').read_text()) for folder in (checkpoint.parent, tmp_path))
    assert after['training images by class'] == before['training images by class'] and after['epochs'] == 2
    for name in ('val_split', 'imbalance', 'imbalance_factor', 'imbalance_seed', 'train_fraction', 'label_noise'):
        assert after[name] == before[name] is not None, name
