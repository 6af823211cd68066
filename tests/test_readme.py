"""Adding a method and a model as README describes leaves the tests green: tried on a copy of the repository."""
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def fence(first_line):
    """The code block of README that begins with this comment."""
    return re.search(rf'```python\n({re.escape(first_line)}.*?)```', README, re.DOTALL).group(1)


@pytest.fixture(scope='module')
def extended(tmp_path_factory):
    """A copy of the repository with README's own examples added."""
    copy = tmp_path_factory.mktemp('copy') / 'repository'
    unused = ('.git', '.venv', 'checkpoints', 'data', '.pytest_cache', '.hypothesis', '__pycache__')
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unused))
    (copy / 'confidence.py').write_text(fence('# confidence.py'))
    listed = copy / 'utils/methods.py'
    listed.write_text(listed.read_text().replace("\n) + (", "\n    'confidence',\n) + (", 1))  # after the reader's own
    (copy / 'models/cifar/tiny.py').write_text(fence('# models/cifar/tiny.py'))
    models = copy / 'models/cifar/__init__.py'
    models.write_text(models.read_text().replace("MODELS = {\n", "MODELS = {\n    'tiny': Tiny,\n").replace(
        'from models.cifar.vgg', 'from models.cifar.tiny import Tiny\nfrom models.cifar.vgg'))
    return copy


def run(folder, *command):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ''}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=500)


def test_the_tests_of_lists_stay_green(extended):
    files = [f'tests/test_{name}.py' for name in ('together', 'models', 'contract')]
    result = run(extended, '-m', 'pytest', '-q', '-p', 'no:xdist', '-k', 'tiny or confidence or table or harmless',
                 *files)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r'(\d+) passed', result.stdout).group(1)) >= 12


def test_the_new_method_and_model_train(extended):
    flags = '-d digits --arch tiny --method dma confidence --train-fraction 0.2 --epochs 1 --manualSeed 1 -c x'
    result = run(extended, 'cifar.py', *flags.split())
    assert result.returncode == 0 and 'arch tiny' in result.stdout, result.stderr
