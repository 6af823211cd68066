"""`python -OO`, which leaves docstrings and asserts out: every script says its help, trains and measures."""
import ast
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
# Several scripts in one process, as importing torch takes most of the time.
SCRIPTS = '''
import pathlib, runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    sys.argv = shlex.split(line)
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        print('exit', end.code or 0, line)
'''


def run(commands):
    return subprocess.run([sys.executable, '-OO', '-c', SCRIPTS], input='\n'.join(commands), cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for part in ('train', 'val'):
        for name in ('cat', 'dog'):
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = generator.integers(256, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f'{index}.png')
    return root


def test_help_training_and_measuring(photographs, tmp_path):
    scripts = [path.name for path in ROOT.glob('*.py') if 'Parser(prog' in path.read_text()]
    short = '--epochs 1 --train-batch 100 --train-fraction 0.1 -d digits --arch lenet'
    first, second = tmp_path / 'first', tmp_path / 'second'
    result = run([
        *(f'{script} --help' for script in scripts),
        f'cifar.py {short} --method dma amp -c {first}',
        f'cifar.py {short} --method lsoftmax large_margin smoothout --cross-entropy-weight 1 -c {second}',
        f'evaluate.py {first}/checkpoint.pth.tar --images 50',
        f'measure_sharpness.py {first}/checkpoint.pth.tar --noise --draws 1 --images 50',
        f'measure_margins.py {first}/checkpoint.pth.tar --all --images 50',
        f'visualize_features.py {first}/checkpoint.pth.tar --images 50',
        f'visualize_sharpness.py {first}/checkpoint.pth.tar {first}/model_best.pth.tar --images 20 --out {tmp_path}',
        f'compare.py {first} {second}',
        f'imagenet.py -d {photographs} -a mobilenet_v3_small --train-batch 4 --epochs 1 -j 1 -c {tmp_path}/photographs',
        f'cifar.py -d digits --train-batch 5000 -c {tmp_path}/refused', 'cifar.py --arch lenet --depth 8'])
    *_, large, odd = result.stdout.splitlines()
    printed = result.stdout + result.stderr
    assert result.returncode == 0 and result.stdout.count('\nexit') == len(scripts) + 2, printed
    assert len(scripts) >= 6 and result.stdout.count('exit 0') == result.stdout.count('usage:') == len(scripts)
    assert 'larger than the training set' in large and odd.startswith('exit 2') and '--depth' in result.stderr
    for folder in (first, second, tmp_path / 'photographs'):
        assert (folder / 'result.json').exists()


def test_no_code_depends_on_docstrings_or_asserts():
    for path in (*ROOT.glob('*.py'), *ROOT.glob('utils/**/*.py'), *ROOT.glob('models/**/*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), f'{path}:{node.lineno} asserts'
            assert getattr(node, 'id', getattr(node, 'attr', None)) != '__doc__', f'{path}:{node.lineno} reads __doc__'
