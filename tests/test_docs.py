"""What the documents tell people to type works."""
import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch

import cifar
import imagenet
from utils import methods
from utils.lab import checkpoints
from utils.logger import read_log

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / 'README.md', ROOT / 'TRAINING.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXT = '\n'.join(document.read_text() for document in DOCUMENTS)
COMMANDS = sorted({re.split(r'\s{2,}#|`| \|', command.replace('\\\n', ' '))[0].strip()
                   for command in re.findall(r'python cifar\.py((?:[^\n`\\]|\\\n)*)', TEXT)})


IMAGENET = sorted({re.split(r'\s{2,}#|`| \|', command.replace('\\\n', ' '))[0].strip(' "&')
                   for command in re.findall(r'(?:python|torchrun[^`]*?) imagenet\.py( -(?:[^\n`\\]|\\\n)*)', TEXT)})


@pytest.mark.parametrize('command', [command for command in COMMANDS if 'resume' not in command and 'help' not
                                     in command])
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *shlex.split(command)])
    cifar.parse_arguments()


@pytest.mark.parametrize('command', IMAGENET)
def test_every_command_of_imagenet_is_understood(command, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['imagenet.py', *shlex.split(command)])
    imagenet.parse_arguments()


LAB = re.findall(r'^ +python ((?:evaluate|visualize_features|visualize_sharpness|measure_sharpness|measure_margins)'
                 r'\.py [^\n#]*?)(?:\s{2,}.*)?$', TEXT.replace('\\\n', ' '), re.MULTILINE)


@pytest.mark.parametrize('command', LAB)
def test_every_command_that_looks_at_checkpoints_is_understood(command, monkeypatch):
    script, *flags = shlex.split(command)
    run = types.SimpleNamespace(path='x', args=types.SimpleNamespace(val_split=0.1))
    monkeypatch.setattr(checkpoints, 'open_checkpoint', lambda path, args, parser: run)
    monkeypatch.setattr(sys, 'argv', [script, *flags])
    importlib.import_module(script.removesuffix('.py')).parse_arguments()


def test_the_commands_were_found():
    assert len(LAB) >= 7 and len(IMAGENET) >= 14
    assert len(COMMANDS) > 20 and any('--method dma' in command for command in COMMANDS)


def test_the_readmes_own_method_trains_beside_dma(monkeypatch, tmp_path):
    code = re.search(r'```python\n(# confidence\.py\n.*?)```', TEXT, re.DOTALL).group(1)
    module = types.ModuleType('confidence')
    exec(code, module.__dict__)
    monkeypatch.setitem(methods.METHODS, 'confidence', module)
    losses = []
    for coef in (0, 5):
        flags = '-d digits --depth 8 --epochs 1 --manualSeed 0 --method dma confidence --dma-coef 0.5 '
        flags += '--train-fraction 0.3 --train-batch 32 '
        flags += f'--confidence-coef {coef}'
        monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split(), '-c', f'{tmp_path}/{coef}'])
        cifar.main()
        losses += read_log(f'{tmp_path}/{coef}/log.txt')['Train Loss']
    assert losses[1] < losses[0] - 5  # minus five times an entropy of about log(10)


def test_the_methods_benchmark_runs():
    command = [sys.executable, 'benchmarks/methods.py',
               *'--depth 8 --batch 8 --steps 4 --rounds 1 --classes 1000'.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # A step on a busy machine may take more than ten times as long as the one before it.
    rows = re.findall(r'^--method .* \d+\.\d+  \(rounds', result.stdout, re.MULTILINE)
    assert len(rows) == 10 and ', ratio ' in result.stdout


def test_the_benchmark_runs():
    command = [sys.executable, 'benchmarks/train_step.py',
               *'--depth 8 --batch 16 --steps 2 --rounds 1 --workers 1'.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r'epoch of cifar\.py / bare loop: \d+\.\d+', result.stdout) and 'pipeline, bf16: ' in result.stdout


def test_the_sharpness_benchmark_runs():
    command = [sys.executable, 'benchmarks/sharpness.py',
               *'--depth 8 --images 16 --batch 8 --points 2 --rounds 1'.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    pattern = r'points per second over a bare evaluation: \d+\.\d+ .*\ngradients per second over a bare pass: \d+\.\d+'
    assert re.search(pattern, result.stdout)


def test_the_margins_benchmark_runs():
    command = [sys.executable, 'benchmarks/margins.py', *'--images 16 --batch 8 --rounds 1'.split()]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r'^\S.*: \d+\.\d+  \(rounds', result.stdout, re.MULTILINE)) == 4


# Files of a run, archives of data sets, and placeholders: named in the documents, not in the repository.
ELSEWHERE = re.compile(r'DIR\b|FILE\b|RUN/|HOST|REPOSITORY|data/|checkpoints/|.*MNIST/raw/|.*\*|module:|log\.'
                       r'|confusion\.|args\.json|result\.json|skipped\.txt|.*\.pth\.tar|.*\.mat|.*\.tar\.gz'
                       r'|output\.txt|train\.sbatch|curves\.png')
QUOTED = sorted({quoted for document in DOCUMENTS for quoted in re.findall(r'`([^`\n]+)`', document.read_text())})
SOURCE = '\n'.join(path.read_text() for path in ROOT.rglob('*.py')
                   if not {'.venv', 'checkpoints', 'data'} & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize('path', [q for q in QUOTED if re.fullmatch(r'[\w./-]+\.(py|sh|md|txt|png|json)|[\w./-]+/', q)])
def test_every_path_in_the_documents_exists(path):
    folders = (ROOT, ROOT / 'utils', ROOT / 'utils/lab', ROOT / 'models', ROOT / 'scripts')
    assert ELSEWHERE.match(path) or any((folder / path).exists() for folder in folders)


@pytest.mark.parametrize('name', [q for q in QUOTED if re.fullmatch(r'[A-Za-z_][\w.]*\([^)]*\)', q)])
def test_every_function_in_the_documents_exists(name):
    last = name.split('(')[0].rsplit('.', 1)[-1]
    assert re.search(rf'(def|class) {last}\b', SOURCE) or hasattr(torch.nn.Module, last) or hasattr(torch.Tensor, last)


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r'\]\((?!https?:)([^)#\s]+)', document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_no_line_is_longer_than_120_characters():
    folders = ('utils', 'models', 'tests', 'benchmarks', 'scripts')
    files = [*ROOT.glob('*.py'), *(path for folder in folders for path in (ROOT / folder).rglob('*')
                                   if path.suffix in ('.py', '.sh'))]
    long = [f'{path.relative_to(ROOT)}:{index}' for path in files
            for index, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, long[:20]


def test_a_wrapped_network_does_not_need_torchvision():
    code = 'import sys, models.wrapped, cifar; sys.exit("torchvision" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
