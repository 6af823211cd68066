import concurrent.futures
import io
import math
import os
import pickle
import types

import pytest
import torch

from utils import checkpoint, device, output
from utils.flags import Parser, bounded
from utils.bar import ProgressLine
from utils.errors import UserError
from utils.eval import Meter, cross_entropy, logits_of
from utils.files import alone, read_json, replacing, write_json
from utils.logger import Logger, plot_log, read_log, read_rows


# Arguments

def parser():
    result = Parser(prog='x.py')
    result.add_argument('--train-batch', type=bounded(int, 1), default=128)
    result.add_argument('--manualSeed', dest='seed', type=bounded(int, 0))
    result.add_argument('--lr', type=bounded(float, 0), default=0.1)
    result.add_argument('--nesterov', action='store_true')
    result.add_argument('--arch', default='resnet')
    return result


@pytest.mark.parametrize('words', ['--train-batch 5', '--train_batch 5', '--train_batch=5', '--Train-Batch 5',
                                   '--trainbatch=5'])
def test_spelling_variants(words):
    args = parser().parse_args(words.split())
    assert args.train_batch == 5 and args.given == {'train_batch'}


def test_given_is_what_the_command_line_set_even_to_the_default():
    args = parser().parse_args('--lr 0.1 --nesterov --manual_seed 3'.split())
    assert args.given == {'lr', 'nesterov', 'seed'}
    assert args.train_batch == 128 and args.arch == 'resnet' and args.seed == 3
    assert parser().parse_args([]).given == set()


def test_inherited_values_stand_between_the_declared_and_the_given():
    args = parser().parse_args(['--lr', '0.2'], defaults={'lr': 0.3, 'arch': 'vgg16', 'unknown': 1})
    assert (args.lr, args.arch, args.train_batch) == (0.2, 'vgg16', 128) and not hasattr(args, 'unknown')


def test_inherited_values_must_be_among_the_choices(capsys):
    choosy = parser()
    choosy.add_argument('--method', nargs='+', choices=('dma', 'amp'), default=[])
    assert choosy.parse_args([], defaults={'method': ['amp']}).method == ['amp']
    with pytest.raises(SystemExit):
        choosy.parse_args([], defaults={'method': ['amp', 'gone']})
    assert '--method gone of the checkpoint is not known here' in capsys.readouterr().err


@pytest.mark.parametrize('words, sentence', [
    ('--lr -0.1', 'must be a number of at least 0, was given -0.1'), ('--lr nan', 'was given nan'),
    ('--lr inf', 'was given inf'),
    ('--lr abc', 'was given abc'), ('--train-batch 0', 'must be a whole number of at least 1'),
    ('--train-batch 1.5', '1.5'),
    ('--unknown 3', '--unknown'), ('--ar vgg', '--ar'),
])
def test_errors_are_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(words.split())
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in printed and printed.count('\n') == 1


# Meter

@pytest.mark.parametrize('classes', [2, 5, 10])
def test_meter_against_a_loop_over_images(classes):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(size, classes, generator=generator), torch.randint(classes, (size,), generator=generator))
               for size in (7, 7, 3)]
    meter, losses, first, fifth = Meter(3, classes, 'cpu'), [], 0, 0
    for logits, targets in batches:
        meter.update((logits, 'something else'), targets, cross_entropy(logits, targets))
        for row, target in zip(logits.double(), targets.tolist()):
            losses.append(-row[target].item() + math.log(sum(math.exp(value) for value in row.tolist())))
            rank = sum(value > row[target].item() for value in row.tolist())
            first, fifth = first + (rank < 1), fifth + (rank < 5)
    read = meter.read()
    assert read['Loss'] == pytest.approx(sum(losses) / 17, rel=1e-6)
    assert read['Top-1'] == pytest.approx(100 * first / 17)
    assert ('Top-5' in read) == (classes > 5) and read.get('Top-5', 100 * fifth / 17) == pytest.approx(100 * fifth / 17)


def test_meter_knows_the_first_bad_batch():
    meter, logits, targets = Meter(4, 2, 'cpu'), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for value in (1.0, math.inf):
        assert meter.first_bad_batch() is None
        meter.update(logits, targets, torch.tensor(value))
    meter.update(logits, targets, torch.tensor(math.nan))
    assert meter.first_bad_batch() == (1, math.inf)


def test_logits_and_cross_entropy():
    logits = torch.randn(3, 4)
    assert logits_of(logits) is logits and logits_of((logits, None)) is logits
    assert cross_entropy(logits.bfloat16(), torch.tensor([0, 1, 2])).dtype == torch.float32


# Progress line

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_times_eta_and_the_meter_and_goes_away():
    file, meter = Terminal(), Meter(4, 10, 'cpu')
    with ProgressLine('train 1/2', 4, file=file) as bar:
        for _ in range(4):
            meter.update(torch.eye(10)[:2], torch.tensor([0, 5]), torch.tensor(1.5))
            bar.read = -math.inf  # as if long ago
            assert bar.advance(meter, data_seconds=0.25)
    shown = file.getvalue()
    for part in ('train 1/2', '2/4', 'data 0.250s', 'batch ', 'ETA 0:00:0', 'loss 1.5', 'top-1 50', 'top-5'):
        assert part in shown
    assert '\n' not in shown and shown.endswith('\r\033[K\033[?25h')


def test_the_bar_is_silent_without_a_terminal():
    file, meter = io.StringIO(), Meter(4, 10, 'cpu')
    meter.update(torch.eye(10)[:2], torch.tensor([0, 5]), torch.tensor(1.5))
    with ProgressLine('train', 4, file=file) as bar:
        bar.advance(meter)
    assert file.getvalue() == ''


def test_the_bar_does_not_read_the_meter_at_every_batch():
    class Unreadable:
        def __str__(self):
            raise AssertionError('read')

    with ProgressLine('train', 100, file=Terminal()) as bar:
        bar.interval = 1000
        assert not any(bar.advance(Unreadable()) for _ in range(100))


def test_a_percent_sign_in_title_or_meter_is_shown_as_it_is():
    file = Terminal()
    with ProgressLine('50% of it', 2, unit='draw', file=file) as bar:
        bar.interval = 0
        assert bar.advance('top-1 12.5% so far %(index)d')
    assert '50% of it' in file.getvalue() and '1/2 | draw 0.0' in file.getvalue()
    assert 'top-1 12.5% so far %(index)d' in file.getvalue()


# Log

def test_log_is_appended_after_resuming_without_a_second_header(tmp_path):
    path, columns = str(tmp_path / 'log.txt'), ['Epoch', 'Train Loss', 'Seconds']
    log = Logger(path, columns)
    for epoch in (1, 2, 3):
        log.append([epoch, epoch / 7, 1.0])
    with open(path, 'a') as file:
        file.write('4\t0.5')  # a process killed while it wrote
    log = Logger(path, columns, read_rows(path, columns, epochs=2))
    log.append([3, 1e-9, 2.0])
    rows = '1\t0.142857\t1\n2\t0.285714\t1\n3\t1e-09\t2\n'
    assert (tmp_path / 'log.txt').read_text() == 'Epoch\tTrain Loss\tSeconds\n' + rows
    assert read_log(path) == {'Epoch': [1, 2, 3], 'Train Loss': [0.142857, 0.285714, 1e-9], 'Seconds': [1, 1, 2]}
    assert read_rows(str(tmp_path / 'none'), columns, 3) == read_rows(None, columns, 3) == []
    with pytest.raises(UserError, match='columns'):
        read_rows(path, ['Epoch', 'Other'], 3)
    for content in (b'\xff\xfe', b'', b'Epoch\tTrain Loss\tSeconds\n1\tabc\t1\n'):
        (tmp_path / 'log.txt').write_bytes(content)
        with pytest.raises(UserError, match='move it away'):
            read_rows(path, columns, 3)


def test_curves_are_drawn(tmp_path):
    log = Logger(str(tmp_path / 'log.txt'), ['Epoch', 'Train Loss', 'Test Loss', 'Train Top-1', 'Test Top-1'])
    for epoch in (1, 2, 3):
        log.append([epoch, 1.0, 2.0, 30.0, 20.0])
    plot_log(log.path, str(tmp_path / 'log.png'), str(tmp_path / 'log.pdf'))
    assert (tmp_path / 'log.png').read_bytes()[:4] == b'\x89PNG' and (tmp_path / 'log.pdf').read_bytes()[:4] == b'%PDF'


# Files and checkpoints

def test_replacing_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / 'a.json'
    write_json(str(path), [1])
    with pytest.raises(RuntimeError):
        with replacing(str(path)) as temporary:
            with open(temporary, 'w') as file:
                file.write('half')
            raise RuntimeError
    with pytest.raises(TypeError):
        write_json(str(path), object())
    assert path.read_text() == '[\n  1\n]\n' and os.listdir(tmp_path) == ['a.json']


def test_nothing_is_lost_of_what_several_add_to_a_file_at_once(tmp_path):
    """The locks are of open files, so that threads stand for processes."""
    path = tmp_path / 'held.json'
    write_json(path, [])

    def add(number):
        with alone(path):
            write_json(path, [*read_json(path), number])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(100)))
    assert sorted(read_json(path)) == list(range(100)) and os.listdir(tmp_path) == ['held.json']
    with pytest.raises(ZeroDivisionError), alone(path):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ['held.json']


@pytest.mark.parametrize('text', ['', '{', '[' * 100000, '\udcff'])
def test_what_is_not_json_is_named_however_it_is_damaged(text, tmp_path):
    (tmp_path / 'a.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match='^a.json is not JSON$'):
        read_json(str(tmp_path / 'a.json'))


def state():
    return {'epoch': 1, 'network': {'arch': 'resnet', 'depth': 20, 'num_classes': 10},
            'state_dict': torch.nn.Linear(2, 2).state_dict(), 'optimizer': {'state': {}, 'param_groups': []},
            'random_state': checkpoint.random_state(), 'mean': [1.0] * 3, 'std': [1.0] * 3,
            'classes': list('abcdefghij'), 'best': {'top1': 0.0, 'epoch': 1}, 'args': {}}


class Evil:
    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize('damage', ['missing', 'empty', 'text', 'wrong types', 'cut short', 'cut to its head',
                                    'other dict', 'a tensor', 'code',
                                    'a folder'])
def test_what_is_not_a_checkpoint_is_refused_in_one_sentence_and_left_alone(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'checkpoint.pth.tar'
    checkpoint.save(str(path), state())
    whole = path.read_bytes()
    if damage in ('missing', 'a folder'):
        path.unlink()
        if damage == 'a folder':
            path.mkdir()
    elif damage == 'other dict':
        torch.save({'state_dict': {}}, path)
    elif damage == 'wrong types':
        torch.save({**state(), 'args': None}, path)
    elif damage == 'a tensor':
        torch.save(torch.zeros(2), path)
    elif damage == 'code':
        torch.save({**state(), 'args': Evil()}, path)
    else:
        path.write_bytes({'empty': b'', 'text': b'hello\n' * 100, 'cut short': whole[:-50],
                          'cut to its head': whole[:300]}[damage])
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError) as error:
        checkpoint.read(str(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)
    assert (path.read_bytes() if path.is_file() else None) == before and not (tmp_path / 'executed').exists()


def test_code_really_would_have_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / 'executed').exists()


def test_weights_of_another_network_are_refused():
    held, model = state(), torch.nn.Linear(2, 2)
    checkpoint.load_model(model, held, held['network'], 'x')
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), held['state_dict'].values()))
    with pytest.raises(UserError, match='x holds depth 20, num_classes 10, but depth 56, num_classes 100 was asked '
                                        'for'):
        checkpoint.load_model(model, held, {'arch': 'resnet', 'depth': 56, 'num_classes': 100}, 'x')
    with pytest.raises(UserError, match='weights in x do not fit this network'):
        checkpoint.load_model(torch.nn.Linear(3, 2), held, held['network'], 'x')


def test_the_optimizers_state_is_loaded_but_its_options_are_this_runs():
    weight = torch.nn.Parameter(torch.ones(2))
    old, new = (torch.optim.SGD([weight], lr=0.1, momentum=momentum) for momentum in (0.9, 0.5))
    weight.grad = torch.ones(2)
    old.step()
    checkpoint.load_optimizer(new, {'optimizer': old.state_dict()}, 'x')
    assert new.param_groups[0]['momentum'] == 0.5 and torch.equal(new.state[weight]['momentum_buffer'], torch.ones(2))
    with pytest.raises(UserError, match='optimizer state in x'):
        checkpoint.load_optimizer(torch.optim.SGD([weight, torch.nn.Parameter(torch.ones(1))]),
                                  {'optimizer': old.state_dict()}, 'x')


def test_random_state_is_restored():
    saved = checkpoint.random_state()
    drawn = torch.rand(3)
    checkpoint.set_random_state(saved)
    assert torch.equal(torch.rand(3), drawn)


def run_args(folder, resume=None, overwrite=False):
    return types.SimpleNamespace(checkpoint=str(folder), resume=resume, overwrite=overwrite,
                                 found=output.snapshot(str(folder)))


def test_a_folder_with_a_run_is_not_entered_by_accident(tmp_path):
    folder = tmp_path / 'run'
    output.claim(run_args(folder))
    output.claim(run_args(folder))  # empty is fine
    names = ['args.json', 'checkpoint.pth.tar', 'log.txt', 'model_best.pth.tar', 'notes.md']
    for name in names:
        (folder / name).write_text('x')
    last, best = str(folder / 'checkpoint.pth.tar'), str(folder / 'model_best.pth.tar')
    for resume in (None, best, str(tmp_path / 'other.pth.tar')):
        with pytest.raises(UserError, match='--overwrite'):
            output.claim(run_args(folder, resume))
    for resume, overwrite in ((last, False), (last, True), (best, True), (None, True)):
        output.claim(run_args(folder, resume, overwrite))
    assert sorted(os.listdir(folder)) == names  # looking has changed nothing
    output.enter(run_args(folder, last, True), finished=False)
    assert sorted(os.listdir(folder)) == names
    output.claim(run_args(tmp_path / 'fork', last))
    output.enter(run_args(tmp_path / 'fork', last), finished=False)
    assert sorted(os.listdir(tmp_path / 'fork')) == ['model_best.pth.tar']
    output.enter(run_args(folder, overwrite=True), finished=False)
    assert sorted(os.listdir(folder)) == ['notes.md']  # only what a run writes is replaced


def test_what_another_run_wrote_since_the_command_line_was_read_is_not_overwritten(tmp_path):
    args = run_args(tmp_path, overwrite=True)
    (tmp_path / 'args.json').write_text('{}')
    with pytest.raises(UserError, match='another run has just written'):
        output.claim(args)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be used as a folder'):
        output.claim(run_args(tmp_path / 'file'))


@pytest.fixture
def machine(monkeypatch):
    """A function number: pretend that the machine has so many CUDA devices, hidden as CUDA_VISIBLE_DEVICES says."""
    def has(number):
        def count():
            visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(number))))
            return sum(one.isdigit() and int(one) < number for one in visible.split(','))
        device.use_only.cache_clear()
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        monkeypatch.setattr(torch.cuda, 'device_count', count)
    yield has
    device.use_only.cache_clear()


def test_a_cuda_device_is_used_alone_refused_or_replaced_by_the_cpu(machine, capsys):
    machine(8)
    device.use_only('7')
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '7' and not capsys.readouterr().out
    machine(2)
    with pytest.raises(UserError, match='--gpu-id 7 is no CUDA device of this machine, which has 2, from 0'):
        device.use_only('7')
    assert 'CUDA_VISIBLE_DEVICES' not in os.environ
    machine(0)
    device.use_only('0')
    device.use_only('0')
    assert capsys.readouterr().out == '--gpu-id 0: there is no CUDA device here, so the CPU is used\n'
