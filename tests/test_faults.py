"""Bad luck, bad files: damage is noticed, wrong values are a sentence, a full disk loses nothing, runs do not mix."""
import copy
import json
import os
import pathlib
import random
import resource
import shlex
import signal
import subprocess
import sys

import pytest
import torch

import cifar
import evaluate
import imagenet
from helpers import call, few_digits
from utils import checkpoint, datasets, memory, output
from utils.errors import UserError
from utils.script import run_script

ROOT = pathlib.Path(__file__).parent.parent
SHORT = '-d digits --arch lenet --train-batch 16 --lr 0.02 --manualSeed 2'


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    few_digits(monkeypatch, 64, 40)
    monkeypatch.setattr('utils.run.plot_log', lambda *args: None)
    monkeypatch.setattr('utils.metrics.write_confusion', lambda *args: None)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """The checkpoint of a run with much in it, in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        few_digits(patch, 64, 40)
        patch.setattr('utils.run.plot_log', lambda *args: None)
        saved, save = [], checkpoint.save

        def keep(path, state):
            save(path, state)
            if state['epoch'] == 1 and state['step'] == 3:
                saved.append(copy.deepcopy(state))
                raise KeyboardInterrupt

        patch.setattr(checkpoint, 'save', keep)
        with pytest.raises(KeyboardInterrupt):
            call(patch, cifar, f'{SHORT} --method lsoftmax amp --ema 0.9 --epochs 2 --checkpoint-every 3 -c {folder}')
    return folder / 'checkpoint.pth.tar', saved[0]


# Damage

def leaves(value):
    if isinstance(value, (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in leaves(part)] + [len(value)]
    return [value]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b for a, b in zip(first, second))


def test_a_flipped_bit_is_noticed_or_changes_nothing(interrupted, tmp_path):
    """Only what no reader uses, such as padding, may differ in silence."""
    whole, expected, damaged = interrupted[0].read_bytes(), leaves(checkpoint.read(str(interrupted[0]))), 0
    generator = random.Random(0)
    for _ in range(60):
        bit, path = generator.randrange(8 * len(whole)), tmp_path / 'flipped'
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert equal(leaves(checkpoint.read(str(path))), expected), bit
        except UserError as error:
            assert 'damaged' in str(error) or 'not a checkpoint' in str(error)
            damaged += 1
    assert damaged > 50


def places(value, path=()):
    """Every place in a checkpoint, of tensors and numbers in one dict or list only the first."""
    yield path
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    alike = len(parts) > 6 and path not in ((), ('args',))
    for name, part in parts[:2] if alike else parts:
        yield from places(part, (*path, name))


def with_value(state, path, value):
    if not path:
        return value
    state = copy.copy(state)
    state[path[0]] = with_value(state[path[0]] if len(path) > 1 else None, path[1:], value)
    return state


WRONG = {'none': None, 'word': 'x', 'negative': -3.5,
         'tensor': torch.zeros(7, dtype=torch.int32)}


@pytest.mark.parametrize('kind', WRONG)
def test_a_wrong_value_anywhere_in_a_checkpoint_is_a_sentence(kind, interrupted, monkeypatch, tmp_path, capsys):
    """Each place in turn: resuming refuses it in one line, or does not mind."""
    path, state = interrupted
    for name in ('save', 'check_written'):  # trains, but writes no checkpoint
        monkeypatch.setattr(checkpoint, name, lambda *args: None)
    refused = 0
    for place in places(state):
        damaged = tmp_path / 'checkpoint.pth.tar'
        torch.save(with_value(state, place, WRONG[kind]), damaged)
        try:
            call(monkeypatch, cifar, f'--resume {damaged} --epochs 2 -c {tmp_path}/out --overwrite')
        except UserError as error:
            assert '\n' not in str(error), place
            refused += 1
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count('\n') == 1, place
            refused += 1
        except Exception as error:
            raise AssertionError(f'{place} as {WRONG[kind]}') from error
        capsys.readouterr()
    assert refused > 50


def test_the_log_comes_from_the_checkpoint_whatever_log_txt_holds(monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} --epochs 2 -c {tmp_path}')
    log = tmp_path / 'log.txt'
    header, *rows = log.read_text().splitlines()
    for damaged in ('', header, f'{header}\n{rows[1]}\n{rows[1]}\n', f'{header}\n# note\n\n{rows[0]}\n', '\0\xff'):
        log.write_text(damaged)
        call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar')
        again = log.read_text().splitlines()
        assert [line.split('\t')[:-1] for line in again] == [line.split('\t')[:-1] for line in (header, *rows)]


# Two runs, one folder

def start(flags, cwd, **options):
    return subprocess.Popen([sys.executable, ROOT / 'cifar.py', *shlex.split(flags)], text=True, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **options)


def test_two_runs_in_one_folder_do_not_mix(tmp_path):
    """Of runs that start at once one trains and the others get a sentence; the folder is that of one seed."""
    flags = '-d digits --arch lenet --epochs 2 --train-fraction 0.1 --train-batch 32 -c run'
    runs = [start(f'{flags} --manualSeed {seed} {how}', tmp_path) for seed, how in
            ((1, '--overwrite'), (2, '--overwrite'), (3, '--resume auto'))]
    ends = [(run.communicate(timeout=300)[1], run.returncode) for run in runs]
    assert sorted(status for _, status in ends) == [0, 1, 1], ends
    refused = [error for error, status in ends if status]
    assert all(error.count('\n') == 1 and 'another run' in error for error in refused), refused
    seed = 1 + [status for _, status in ends].index(0)
    args = json.loads((tmp_path / 'run/args.json').read_text())
    state = checkpoint.read(str(tmp_path / 'run/checkpoint.pth.tar'))
    assert args['seed'] == state['args']['seed'] == seed and len(state['log']) == 3
    assert (tmp_path / 'run/result.json').exists()


def test_the_lock_is_free_when_its_process_was_killed(tmp_path):
    args = 'types.SimpleNamespace(checkpoint="run", resume=None, overwrite=False, found={})'
    holder = subprocess.Popen([sys.executable, '-c', f'import os, time, types; from utils import output; '
                               f'output.claim({args}); os.fork() or time.sleep(60); print("x", flush=True); '
                               'time.sleep(60)'], cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)})
    holder.stdout.readline()  # its child, as a process that reads images, is there
    own = type('Args', (), {'checkpoint': str(tmp_path / 'run'), 'resume': None, 'overwrite': False, 'found': {}})
    with pytest.raises(UserError, match='another run is writing'):
        output.claim(own)
    holder.kill()
    holder.wait()
    output.claim(own)  # although the child lives
    output.release(own.checkpoint)
    os.killpg(holder.pid, signal.SIGKILL)
    assert os.listdir(tmp_path / 'run') == []


# A full disk

@pytest.mark.parametrize('file', ['checkpoint.pth.tar', 'args.json', 'log.txt', 'result.json'])
def test_a_full_disk_names_the_file_and_loses_nothing(file, monkeypatch, tmp_path):
    """The system refuses to write beyond a size, as it does on a full disk, from the second epoch on."""
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}')
    before = checkpoint.read(str(tmp_path / 'checkpoint.pth.tar'))
    opened, limits = open, resource.getrlimit(resource.RLIMIT_FSIZE)

    def small(path, mode='r', *rest, **options):
        if str(path).endswith(file) and 'r' not in mode:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return opened(path, mode, *rest, **options)

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            patch.setattr('builtins.open', small)
            call(patch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    sentence = str(error.value)
    assert sentence.startswith(f'{tmp_path}/{file} could not be written (File too large)') and '\n' not in sentence
    held = checkpoint.read(str(tmp_path / 'checkpoint.pth.tar'))
    assert held['epoch'] in (1, 2) and held['log'][1] == before['log'][1]
    assert not [name for name in os.listdir(tmp_path) if name.startswith('.unfinished')]
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')  # where there is room again
    assert checkpoint.read(str(tmp_path / 'checkpoint.pth.tar'))['epoch'] == 2 and (tmp_path / 'result.json').exists()


# What a run was trained with

def changes(folder):
    return json.loads((folder / 'args.json').read_text())['changes']


@pytest.mark.parametrize('flags, expected', [
    ('--method dma --epochs 3 --schedule 1', ['after epoch 2: method none -> dma']),
    ('--lr 0.01 --epochs 4', ['after epoch 2: another learning rate']),
    ('--train-batch 8 --weight-decay 0 --epochs 3', ['after epoch 2: train-batch 16 -> 8, weight-decay 0.0005 -> 0.0']),
    ('--epochs 3 --schedule 2', ['after epoch 2: another learning rate']),  # the second epoch had a tenth of it
    ('--epochs 3 --schedule 1', []), ('--epochs 3 --method dma --dma-coef 0', ['after epoch 2: method none -> dma']),
    ('', []), ('--test-batch 7 --epochs 3 --schedule 1 2', []),
])
def test_what_changes_in_the_middle_of_training_is_kept(flags, expected, monkeypatch, tmp_path):
    call(monkeypatch, cifar, f'{SHORT} --epochs 2 -c {tmp_path}')
    assert changes(tmp_path) == []
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar {flags}')
    assert changes(tmp_path) == expected
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar')
    assert changes(tmp_path) == expected


# The images of a run

@pytest.mark.parametrize('drawn', ['--val-split 0.2', '--train-fraction 0.5', '--label-noise 0.2',
                                   '--imbalance exp --imbalance-factor 0.5'])
def test_other_training_images_are_refused_where_images_are_drawn_from_them(drawn, monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 {drawn} -c {tmp_path}')
    few_digits(monkeypatch, 63, 40)
    with pytest.raises(UserError, match=f'the train images are not those of .*of 64, now .*of 63.*{drawn[:11]}'):
        call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')


def test_other_training_images_are_named_and_make_a_mixed_run(monkeypatch, tmp_path, capsys):
    call(monkeypatch, cifar, f'{SHORT} --epochs 1 -c {tmp_path}')
    few_digits(monkeypatch, 63, 40)
    call(monkeypatch, cifar, f'--resume {tmp_path}/checkpoint.pth.tar --epochs 2')
    assert 'the train images are not those of' in capsys.readouterr().out
    assert 'training images' in changes(tmp_path)[0]


# The end of a script

def ended(program, tmp_path, **environment):
    """(exit status, stderr) of a script whose main is `program`."""
    (tmp_path / 'script.py').write_text('import os, signal, sys, time\nimport torch\n'
                                        'from utils.script import run_script\n\ndef main():\n    ' + program +
                                        '\n\nrun_script(main)\n')
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **environment})
    return done.returncode, done.stderr


@pytest.mark.parametrize('program, status, sentence', [
    ('os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)', 130, 'Stopped before there was'),
    ('torch.empty(10 ** 14)', 1, 'error: there is not enough memory'),
    ('open("/dev/full", "w").write("x" * 10 ** 6)', 1, 'error: '),
])
def test_a_script_ends_with_one_sentence(program, status, sentence, tmp_path):
    found, error = ended(program, tmp_path)
    assert found == status and error.count('\n') == 1 and error.startswith(sentence), error


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory.\n2 GiB')])
def test_every_word_for_memory_that_is_not_there_is_known(error, monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *args: None)

    def main():
        raise error

    with pytest.raises(SystemExit, match='error: there is not enough memory [^\n]*$'):
        run_script(main)


def test_a_second_signal_does_not_disturb_what_the_first_one_ends(tmp_path):
    program = ('try:\n        os.kill(os.getpid(), signal.SIGINT)\n    finally:\n        os.kill(os.getpid(), '
               'signal.SIGTERM); time.sleep(0.1); open("ended", "w")')
    assert ended(program, tmp_path) == (130, 'Stopped before there was a result.\n') and (tmp_path / 'ended').exists()


def test_pictures_never_end_a_run(tmp_path):
    """Matplotlib refuses a backend that is not installed, as a notebook leaves one in the environment."""
    run = start(f'{SHORT} --epochs 2 --train-fraction 0.1 -c run', tmp_path,
                env={**os.environ, 'MPLBACKEND': 'module://not_installed'})
    printed, errors = run.communicate(timeout=300)
    assert run.returncode == 0 and printed.count('a picture cannot be drawn') <= 1 and 'Traceback' not in errors
    assert (tmp_path / 'run/result.json').exists()


@pytest.mark.parametrize('flags, sentence', [
    ('-a wrn --widen-factor 3000', 'the weights of --arch wrn with gradients and optimizer state take'),
    ('-a densenet --depth 10 --growthRate 100000', 'the weights of --arch densenet'),
    ('-a wrn --train-batch 50000', 'the activations of 50000 images in --arch wrn take'),
    ('-a wrn --mini-batch 25000 --train-batch 50000', 'the activations of 25000 images'),
])
def test_what_does_not_fit_into_memory_is_refused_before_any_work(flags, sentence, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    with pytest.raises(UserError, match=f'{sentence}.* GB are free'):
        call(monkeypatch, cifar, f'-d cifar10 {flags} -c {tmp_path}/run')
    assert not (tmp_path / 'run').exists()


def test_only_what_grows_with_the_batch_counts_as_activations():
    """A head normalises its class weights, however many images there are."""
    classes, features = 3000, 64
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, features), torch.nn.ReLU())
    weight = torch.nn.Parameter(torch.randn(classes, features))
    kept = memory.Kept(model, 2)
    with kept.hooks:
        (model(torch.randn(2, 3, 2, 2)) @ torch.nn.functional.normalize(weight).t()).logsumexp(1).sum()
    of_images = 4 * 2 * (12 + features + 1 + classes)  # the input, after ReLU, logsumexp and the logits
    assert 4 * 2 * (features + classes) <= kept.bytes <= of_images + 4 * 2 * classes


def test_a_photograph_that_does_not_fit_into_memory_is_refused(monkeypatch, tmp_path):
    from PIL import Image
    for part in ('train', 'val'):
        for name in 'ab':
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new('RGB', (8, 8)).save(tmp_path / part / name / f'{index}.png')
    with pytest.raises(UserError, match='two images of 1000000x1000000 pixels take'):
        call(monkeypatch, imagenet, f'--data {tmp_path} --image-size 1000000 --train-batch 2 -c {tmp_path}/run')


@pytest.mark.parametrize('place, value', [
    (('network', 'depth'), 8), (('network', 'depth'), 'x'), (('network', 'arch'), 'gone'), (('network', 'arch'), 'mlp'),
    (('network', 'num_classes'), 0), (('network', 'x'), 3), (('args', 'depth'), 8), (('args', 'depth'), [1]),
    (('args', 'method'), 'dma'), (('args', 'method'), ['gone']), (('args', 'margin'), -5), (('args', 'dataset'), 3),
    (('args', 'val_split'), 'x'), (('args', 'test_batch'), 0), (('args', 'precision'), 'fp8'), (('classes',), ['a']),
    (('ema', 'n_averaged'), 'x'), (('ema', 'module.x'), torch.zeros(1)), (('state_dict', 'x'), torch.zeros(1)),
    (('mean',), [0.0]), (('std',), [0.0] * 3), (('script',), 'gone.py'),
])
@pytest.mark.parametrize('script', [evaluate, cifar])
def test_a_wrong_value_is_a_sentence_where_a_checkpoint_is_tested(script, place, value, interrupted, monkeypatch,
                                                                  tmp_path, capsys):
    torch.save(with_value(interrupted[1] | {}, place, value), tmp_path / 'damaged')
    flags = f'{tmp_path}/damaged' if script is evaluate else f'--evaluate --resume {tmp_path}/damaged'
    try:
        call(monkeypatch, script, flags)
        assert place[0] in ('args', 'network', 'state_dict')  # what is not used by a test need not be right
    except UserError as error:
        assert '\n' not in str(error)
    except SystemExit as stop:
        assert stop.code == 2 and capsys.readouterr().err.count('\n') == 1
