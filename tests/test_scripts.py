"""The batch scripts: every command is one that cifar.py takes, and runs are skipped, resumed, reported and stopped as
they should be.
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import cifar
import compare

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / 'scripts').glob('*.sh') if path.name != 'run.sh')
RUNS = {'dma_cifar.sh': 24, 'amp_cifar.sh': 72, 'lsoftmax_imbalanced.sh': 16, 'smoothout_large_batch.sh': 8,
        'large_margin_mnist.sh': 24, 'all_methods.sh': 14}  # for each seed

# Stands in for Python: writes down its arguments, and "trains" unless the folder matches $FAILING.
STUB = '''#!/bin/sh
separator=
{ printf '['; for word; do printf '%s"%s"' "$separator" "$word"; separator=', '; done; printf ']\\n'; } >> "$RECORD"
[ "$1" = cifar.py ] || { echo "table of $2"; exit; }
while [ $# -gt 1 ]; do
    case $1 in
        --checkpoint) folder=$2 ;;
        --resume) folder=${2%/*} ;;
    esac
    shift
done
case $folder in
    $FAILING) exit "$STATUS" ;;
    $SLEEPING) trap 'kill $!; exit 143' TERM; trap 'kill $!; exit 130' INT
       sleep 60 > /dev/null & : > "$RECORD.sleeping"; wait ;;
esac
mkdir -p "$folder" && : > "$folder/result.json"
'''


class Stage:
    """Scripts are called with the stub, and with `out` as their OUT."""

    def __init__(self, folder):
        self.stub, self.record, self.out = folder / 'python', folder / 'record', folder / 'out'
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)

    def environment(self, **variables):
        clean = {name: value for name, value in os.environ.items() if name in ('PATH', 'HOME', 'TMPDIR')}
        return {**clean, 'PYTHON': str(self.stub), 'RECORD': str(self.record), 'OUT': str(self.out), 'FAILING': '',
                'SLEEPING': '',
                'STATUS': '1', **variables}

    def call(self, script, *flags, **variables):
        """(exit status and output, the commands of cifar.py that were started)"""
        self.record.write_text('')
        result = subprocess.run([ROOT / 'scripts' / script, *flags], env=self.environment(**variables), cwd='/',
                                text=True,
                                capture_output=True, timeout=120)
        return result, self.commands()

    def commands(self):
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [words[1:] for words in lines if words[0] == 'cifar.py']


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def value(command, flag):
    return command[command.index(flag) + 1]


def understood(command, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *command])
    return cifar.parse_arguments()[0]


def test_there_are_scripts_and_bash_can_read_all_of_them():
    assert set(SCRIPTS) == set(RUNS)
    for script in [*SCRIPTS, 'run.sh']:
        subprocess.run(['bash', '-n', ROOT / 'scripts' / script], check=True)


@pytest.mark.parametrize('variables', [{}, {'DATASET': 'digits', 'EPOCHS': '1'}], ids=['default', 'digits'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_every_command_is_understood_and_has_its_baseline(script, variables, stage, monkeypatch):
    result, commands = stage.call(script, '--precision', 'bf16', **variables)
    assert result.returncode == 0 and not result.stderr and result.stdout.endswith(f'\ntable of {stage.out}\n')
    datasets = len({value(command, '--dataset') for command in commands})
    several = {'dma_cifar.sh': 2, 'amp_cifar.sh': 3}.get(script, 1)
    assert datasets == (1 if variables else several) and len(commands) == 3 * RUNS[script] // several * datasets
    assert len({value(command, '--checkpoint') for command in commands}) == len(commands)
    assert len({json.dumps([word for word in command if word != value(command, '--checkpoint')]) for command
                in commands}) == len(commands)
    seeds = {seed: [command for command in commands if value(command, '--manualSeed') == seed] for seed in '123'}
    assert len({len(own) for own in seeds.values()}) == 1

    flags, settings = compare.Flags(), set()
    for command in seeds['1']:
        args = understood(command, monkeypatch)
        assert args.precision == 'bf16' and command[-5:] == ['--precision', 'bf16', '--checkpoint', args.checkpoint,
                                                             '--overwrite']
        assert args.checkpoint.startswith(f'{stage.out}/') and args.checkpoint.endswith('/seed1')
        settings.add(frozenset(flags.setting({**vars(args), 'as given': args.inherited}).items()))
    assert len(settings) == len(seeds['1'])
    settings = [dict(setting) for setting in settings]
    baselines = {flags.without_methods(setting) for setting in settings if setting['method'] == ()}
    assert baselines == {flags.without_methods(setting) for setting in settings} and len(baselines) < len(settings)


def test_the_default_folder_tells_data_and_epochs_apart(stage):
    expected = {('all_methods.sh', ''): 'digits-15epochs',
                ('all_methods.sh', 'EPOCHS=2 DATASET=mnist'): 'mnist-2epochs',
                ('dma_cifar.sh', 'ARCHS=vgg19_bn'): 'all-164to300epochs',
                ('dma_cifar.sh', 'EPOCHS=9 DATASET=cifar100 ARCHS=vgg19_bn'): 'cifar100-9epochs',
                ('amp_cifar.sh', 'ARCHS=wrn AUGMENT=plain'): 'all-200epochs'}
    for (script, variables), folder in expected.items():
        variables = dict(pair.split('=') for pair in variables.split())
        # so that the stub makes no folder there
        result, commands = stage.call(script, OUT='', SEEDS='1', FAILING='*', **variables)
        assert result.returncode == 1
        assert {value(command, '--checkpoint').rsplit('/', 2)[0] for command
                in commands} == {f'checkpoints/{script[:-3]}/{folder}'}


@pytest.mark.parametrize('epochs, expected', [('164', ['81', '122']), ('328', ['162', '244']), ('2', ['1']), ('1', [])])
def test_milestones_move_with_the_epochs(epochs, expected, stage, monkeypatch):
    _, commands = stage.call('dma_cifar.sh', DATASET='digits', ARCHS='vgg19_bn', SEEDS='1', EPOCHS=epochs)
    args = understood(commands[0], monkeypatch)
    assert args.epochs == int(epochs) and args.schedule == [int(milestone) for milestone in expected]


def test_the_large_batch_with_as_many_steps_is_understood(stage, monkeypatch):
    _, commands = stage.call('smoothout_large_batch.sh', ARCHS='resnet44', BATCHES='long', SEEDS='1')
    assert understood(commands[0], monkeypatch).epochs == 1600


def test_words_from_the_environment_replace_the_lists(stage):
    _, commands = stage.call('lsoftmax_imbalanced.sh', ARCHS='resnet', MARGINS='2 3', BALANCE='step-0.2', SEEDS='7 8')
    assert [value(command, '--checkpoint').removeprefix(f'{stage.out}/') for command in commands] == [
        f'resnet-step-0.2-{loss}/seed{seed}' for seed in (7, 8) for loss in ('crossentropy', 'lsoftmax2', 'lsoftmax3')]
    result, commands = stage.call('smoothout_large_batch.sh', ARCHS='shallow resnet')
    assert result.returncode == 2 and not commands
    assert result.stderr == 'error: ARCHS can be one or several of: shallow resnet44; was given resnet\n'


def test_finished_is_skipped_broken_off_is_resumed_and_debris_is_overwritten(stage):
    names = ['none', 'dma', 'amp', 'dma+amp']
    variables = {'METHODS': ' '.join(names), 'SEEDS': '4'}
    finished, broken, debris, empty = folders = [stage.out / name / 'seed4' for name in names]
    for folder in folders[:3]:
        folder.mkdir(parents=True)
        (folder / 'args.json').write_text('')
    for folder in (finished, broken):
        (folder / 'checkpoint.pth.tar').write_text('')
    (finished / 'result.json').write_text('kept')
    result, commands = stage.call('all_methods.sh', '--workers', '2', **variables)
    assert result.returncode == 0 and (finished / 'result.json').read_text() == 'kept'
    assert [line for line in result.stdout.splitlines() if line] == [
        f'finished: {finished}', f'resumed: {broken}', f'run: {debris}', f'run: {empty}', f'table of {stage.out}']
    assert commands[0] == ['--resume', f'{broken}/checkpoint.pth.tar']
    assert [command[-3:] for command in commands[1:]] == [['--checkpoint', str(folder), '--overwrite'] for folder
                                                          in (debris, empty)]
    result, commands = stage.call('all_methods.sh', **variables)
    assert result.returncode == 0 and not commands and result.stdout.count('finished: ') == 4


@pytest.mark.parametrize('status', ['1', '2', '137'])
def test_a_failing_run_is_listed_and_the_others_run(status, stage):
    result, commands = stage.call('all_methods.sh', METHODS='none dma amp', SEEDS='1 2', FAILING='*/dma/*',
                                  STATUS=status)
    assert result.returncode == 1 and len(commands) == 6 and f'table of {stage.out}' in result.stdout
    failed = [f'{stage.out}/dma/seed{seed} (exit status {status})' for seed in (1, 2)]
    assert result.stderr.splitlines()[:2] == [f'failed: {line}' for line in failed]
    assert result.stderr.endswith('\n'.join(['\nfailed:', *failed, '']))
    result, commands = stage.call('all_methods.sh', METHODS='none dma amp', SEEDS='1 2')
    assert result.returncode == 0 and len(commands) == 2


@pytest.mark.parametrize('status', ['130', '143'])
def test_a_stopped_run_ends_the_script(status, stage):
    result, commands = stage.call('all_methods.sh', METHODS='none dma amp', SEEDS='1', FAILING='*/dma/*', STATUS=status)
    assert result.returncode == int(status) and len(commands) == 2 and 'table' not in result.stdout


@pytest.mark.parametrize('signum, whole_group', [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_the_run_and_the_script(signum, whole_group, stage):
    """SIGTERM as `kill` sends it, to the script alone; SIGINT as Ctrl-C does, to all that was started from the
    terminal.
    """
    script = subprocess.Popen([ROOT / 'scripts/all_methods.sh'],
                              env=stage.environment(SLEEPING='*/dma/*', METHODS='none dma amp'),
                              stdout=subprocess.PIPE, text=True, start_new_session=True,
                              # What begins in the background ignores SIGINT, and bash can then not heed it: so may
                              # these tests.
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(stage.out.parent / 'record.sleeping', script)
    (os.killpg if whole_group else os.kill)(script.pid, signum)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 128 + signum and 'table' not in output
    assert len(stage.commands()) == 2 and not (stage.out / 'dma/seed1/result.json').exists()


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f'{path} did not appear'
        time.sleep(0.01)


def test_a_real_script_that_is_killed_in_its_second_run_goes_on_to_its_table(tmp_path):
    environment = {**os.environ, 'OUT': str(tmp_path), 'METHODS': 'none dma', 'SEEDS': '1', 'EPOCHS': '1',
                   'PYTHON': sys.executable}
    command = [ROOT / 'scripts/all_methods.sh', '--depth', '8', '--train-fraction', '0.3']
    script = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    wait_for(tmp_path / 'dma/seed1/checkpoint.pth.tar', script)
    script.terminate()
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 143 and 'Stopped; the finished epochs are kept' in output and 'Traceback' not in output
    assert (tmp_path / 'none/seed1/result.json').exists() and not (tmp_path / 'dma/seed1/result.json').exists()

    result = subprocess.run(command, env=environment, cwd='/', capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f'finished: {tmp_path}/none/seed1' in result.stdout and f'resumed: {tmp_path}/dma/seed1' in result.stdout
    assert re.search(r'^--method dma +1 .*[+-]\d+\.\d\d', result.stdout, re.MULTILINE)
