"""The batch scripts: every command is one that cifar.py takes, and runs are skipped, resumed, reported and stopped as
they should be.
"""
import collections
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers import call, write_run

import cifar
import compare

ROOT = pathlib.Path(__file__).parent.parent
OTHERS = ('run.sh', 'keep.sh', 'figures.sh')  # that print no table
SCRIPTS = sorted(path.name for path in (ROOT / 'scripts').glob('*.sh') if path.name not in OTHERS)
RUNS = {'dma_cifar.sh': 24, 'amp_cifar.sh': 72, 'lsoftmax_imbalanced.sh': 16, 'smoothout_large_batch.sh': 8,
        'large_margin_mnist.sh': 24, 'all_methods.sh': 14, 'search.sh': 6, 'amp_table1.sh': 48, 'ldam_cifar.sh': 20,
        'large_margin_authors.sh': 2}  # for each seed

# Stands in for Python: writes down its arguments, and "trains" unless the folder matches $FAILING. The first trial is
# the best.
STUB = '''#!/bin/sh
line=
for word; do line="$line${line:+, }\\"$word\\""; done
case $1 in
    scripts/jobs.py) exec "$REAL" "$@" ;;
    -c) exec "$REAL" "$@" ;;
    -m) ls "$3" | head -n 1; exit ;;
    compare.py) echo "table of $2"; echo "[$line]" > "$RECORD.compare"; exit ;;
esac
echo "[$line]" >> "$RECORD"
while [ "$1" != --checkpoint ]; do shift; done
folder=$2
case $folder in
    $FAILING) exit "$STATUS" ;;
    $SLEEPING) trap 'exit 143' TERM; trap 'exit 130' INT; : > "$RECORD.sleeping"
       until [ -e "$RECORD.awake" ]; do sleep 0.1; done ;;
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
                'SLEEPING': '', 'STATUS': '1', 'REAL': sys.executable, 'JOBS': '1', **variables}

    def call(self, script, *flags, **variables):
        """(exit status and output, the commands of cifar.py that were started)"""
        self.record.write_text('')
        result = subprocess.run([ROOT / 'scripts' / script, *flags], env=self.environment(**variables), cwd='/',
                                text=True,
                                capture_output=True, timeout=120)
        return result, self.commands()

    def commands(self):
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [words[1:] for words in lines]


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
    for script in [*SCRIPTS, *OTHERS]:
        subprocess.run(['bash', '-n', ROOT / 'scripts' / script], check=True)


@pytest.mark.parametrize('variables', [{}, {'DATASET': 'digits', 'EPOCHS': '1'}], ids=['default', 'digits'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_every_command_is_understood_and_has_its_baseline(script, variables, stage, monkeypatch):
    result, commands = stage.call(script, '--precision', 'bf16', SEEDS='1 2', **variables)
    commands = [command for command in commands if '--val-split' not in command]  # trials of search.sh
    out = stage.out / 'table' if script == 'search.sh' else stage.out
    assert result.returncode == 0 and not result.stderr and result.stdout.endswith(f'\ntable of {out}\n')
    datasets = len({value(command, '--dataset') for command in commands})
    several = {'dma_cifar.sh': 2, 'amp_cifar.sh': 3, 'amp_table1.sh': 3}.get(script, 1)
    assert datasets == (1 if variables else several) and len(commands) == 2 * RUNS[script] // several * datasets
    assert len({value(command, '--checkpoint') for command in commands}) == len(commands)
    assert len({json.dumps([word for word in command if word != value(command, '--checkpoint')]) for command
                in commands}) == len(commands)
    seeds = {seed: [command for command in commands if value(command, '--manualSeed') == seed] for seed in '12'}
    assert len({len(own) for own in seeds.values()}) == 1

    flags, settings = compare.Flags(), set()
    for command in seeds['1']:
        args = understood(command, monkeypatch)
        assert args.precision == 'bf16' and command[-6:] == ['--precision', 'bf16', '--checkpoint', args.checkpoint,
                                                             '--resume', 'auto']
        assert args.checkpoint.startswith(f'{stage.out}/') and args.checkpoint.endswith('/seed1')
        settings.add(frozenset(flags.setting({**vars(args), 'as given': args.inherited}).items()))
    assert len(settings) == len(seeds['1'])
    settings = [dict(setting) for setting in settings]
    baselines = {flags.without_methods(setting) for setting in settings if setting['method'] == ()}
    assert baselines == {flags.without_methods(setting) for setting in settings} and len(baselines) < len(settings)


def test_the_runs_behind_the_figures_are_understood(stage, monkeypatch):
    result, _ = stage.call('figures.sh', '--precision', 'bf16', LIST='1')
    commands = [shlex.split(line)[1:] for line in result.stdout.splitlines()]
    assert len({value(command, '--checkpoint') for command in commands}) == len(commands) == 9
    assert [command[0] for command in commands] == ['scripts/every_epoch.py'] * 2 + ['cifar.py'] * 7
    for command in commands:
        args = understood(command[1:], monkeypatch)
        assert args.precision == 'bf16' and bool(args.method) != args.checkpoint.endswith('none')


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
    lines = [line for line in result.stdout.splitlines() if line]
    assert [line for line in lines if ' done, ' not in line] == [
        f'finished: {finished}', f'resumed: {broken}', f'run: {debris}', f'run: {empty}', f'table of {stage.out}']
    assert lines[2].startswith('1 done, 0 failed, 2 left, about ') and lines[6].startswith('3 done, 0 failed, 0 left')
    assert [command[-4:] for command in commands] == [
        ['--checkpoint', str(folder), '--resume', 'auto'] for folder in (broken, debris, empty)]
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


def test_runs_side_by_side_share_the_cores_and_keep_their_output(stage, monkeypatch):
    """Three at a time: the fourth waits until one has ended."""
    names = ['none', 'dma', 'amp', 'smoothout', 'lsoftmax']
    script = subprocess.Popen([ROOT / 'scripts/all_methods.sh'], stdout=subprocess.PIPE, text=True,
                              env=stage.environment(JOBS='3', SLEEPING='*/[da]*', METHODS=' '.join(names), SEEDS='1'))
    wait_for(stage.out / 'lsoftmax/seed1/result.json', script)
    assert not (stage.out / 'dma/seed1/result.json').exists() and not (stage.out / 'amp/seed1/result.json').exists()
    assert (stage.out / 'none/seed1/output.txt').read_text() == ''
    said = next(line for line in script.stdout if '3 done' in line)  # the run has ended too
    script.terminate()
    assert '3 done, 0 failed, 2 left' in said and 'table of' not in script.stdout.read() and script.wait(30) == 143


@pytest.mark.parametrize('jobs, threads', [('1', None), ('2', max(1, len(os.sched_getaffinity(0)) // 2)), ('64', 1)])
def test_threads_are_shared_out(jobs, threads, tmp_path):
    command = f'{shlex.quote(sys.executable)} -c "import os; print(os.environ.get(\'OMP_NUM_THREADS\'))" ' \
              f'--checkpoint {tmp_path}'
    clean = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    for given in (None, '5'):
        result = jobs_script(command, jobs, env=clean if given is None else {**clean, 'OMP_NUM_THREADS': given})
        output = result.stdout if jobs == '1' else (tmp_path / 'output.txt').read_text()
        expected = given or str(threads or len(os.sched_getaffinity(0)))
        assert result.returncode == 0 and expected in output.split(), output


def jobs_script(commands, *words, **options):
    return subprocess.run([sys.executable, 'scripts/jobs.py', *words], input=commands, cwd=ROOT, text=True,
                          capture_output=True, timeout=60, **options)


@pytest.mark.parametrize('words, small', [
    ('--arch lenet', True), ('--arch mlp', True), ('--arch resnet --depth 8', True), ('--depth 20', True),
    ('--arch resnet --depth 20 --depth 56', False), ('--arch resnet', True), ('--arch wrn --depth 16', False),
    ('--arch lenet -a vgg11_bn', False), ('-a=mlp', True), ('--arch lenet --ARCH=vgg11_bn', False)])
def test_small_networks_run_one_for_each_core(words, small):
    sys.path.append(str(ROOT / 'scripts'))
    import jobs
    assert jobs.is_small(words.split()) == small
    assert jobs.at_once([words.split()] * 3) == (jobs.cores() if small else 1)
    assert jobs.at_once([words.split(), ['--arch', 'vgg19_bn']]) == 1


@pytest.mark.parametrize('words, sentence', [
    (['0'], 'error: JOBS must be a number of runs side by side, of at least 1, was given 0'),
    (['two'], 'error: JOBS must be a number of runs side by side, of at least 1, was given two'),
    ([], 'error: a command needs --checkpoint FOLDER, was given python cifar.py')])
def test_odd_jobs_are_refused(words, sentence):
    result = jobs_script('python cifar.py\n', *words)
    assert (result.returncode, result.stderr, result.stdout) == (1, sentence + '\n', '')


def test_what_is_no_command_is_refused_and_what_cannot_be_started_has_failed(tmp_path):
    result = jobs_script('python "cifar.py\n')
    assert result.returncode == 1 and result.stderr.startswith('error: python "cifar.py cannot be read as a command (')
    (tmp_path / 'file').touch()
    result = jobs_script(f'sh -c "sleep 0.5; touch {tmp_path}/ended" --checkpoint {tmp_path}/a\n'
                         f'{tmp_path}/nopython x --checkpoint {tmp_path}/b\ntrue --checkpoint {tmp_path}/file\n', '3')
    assert result.returncode == 1 and (tmp_path / 'ended').exists() and '1 done, 2 failed, 0 left' in result.stdout
    failed = result.stderr.split('\nfailed:\n')[1].splitlines()
    assert [line.split(' (')[0] for line in failed] == [f'{tmp_path}/b', f'{tmp_path}/file']
    assert all('not started: ' in line for line in failed) and 'Traceback' not in result.stderr
    result = jobs_script(f'{tmp_path}/nopython x --checkpoint {tmp_path}/b\n', '1')
    assert result.returncode == 1 and 'Traceback' not in result.stderr


@pytest.mark.parametrize('name, status', [('TERM', 143), ('INT', 130)])
def test_a_run_that_is_just_being_started_is_stopped_too(name, status, tmp_path):
    """The signal comes from the run itself, so before it is known to jobs.py as one that runs."""
    slow = 'import subprocess, sys, time; sys.path.insert(0, "scripts"); import jobs; real = subprocess.Popen; ' \
           'subprocess.Popen = lambda *a, **o: (real(*a, **o), time.sleep(0.3))[0]; sys.argv[1:] = ["1"]; jobs.main()'
    command = f'sh -c "kill -{name} $PPID; sleep 5; touch {tmp_path}/lived" --checkpoint {tmp_path}/a\n'
    result = subprocess.run([sys.executable, '-c', slow], input=command, cwd=ROOT, text=True, capture_output=True,
                            timeout=60)  # and until nobody has its stdout any more
    assert (result.returncode, result.stderr) == (status, '') and not (tmp_path / 'lived').exists()


@pytest.mark.parametrize('signal_name, status', [('TERM', 143), ('KILL', None)])
def test_a_run_that_a_signal_has_ended_has_the_status_of_a_shell(signal_name, status, tmp_path):
    """A run that is stopped before it handles signals stops the others as one that handles them."""
    result = jobs_script(f'sh -c "kill -{signal_name} $$" --checkpoint {tmp_path}/a\ntrue --checkpoint {tmp_path}/b\n',
                         '1')
    assert result.returncode == (status or 1)
    assert ('(exit status 137)' in result.stderr) == (f'run: {tmp_path}/b' in result.stdout) == (status is None)


def test_any_path_is_listed_as_it_is_in_the_c_locale(stage):
    folder = "b é $x 'q'"
    result, _ = stage.call('all_methods.sh', '--data', folder, LIST='1', METHODS='none', SEEDS='1', LC_ALL='C')
    words, = map(shlex.split, result.stdout.splitlines())
    assert value(words, '--data') == folder


def test_the_reason_of_a_failure_is_shown(tmp_path):
    result = jobs_script(f'sh -c "echo first; echo error: no luck >&2; exit 3" --checkpoint {tmp_path}/a\n'
                         f'true --checkpoint {tmp_path}/b\n', '2')
    assert result.returncode == 1 and 'failed: ' in result.stderr
    assert f'failed: {tmp_path}/a (exit status 3): error: no luck' in result.stderr.splitlines()


def test_a_list_is_printed_and_nothing_runs(stage):
    result, commands = stage.call('all_methods.sh', '--data', 'a b', LIST='1', METHODS='none dma', SEEDS='1 2')
    assert result.returncode == 0 and not commands and not stage.out.exists()
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    subprocess.run(['xargs', '-d', '\n', '-n', '1', '-P', '2', 'bash', '-c'], input=result.stdout, text=True, cwd=ROOT,
                   check=True, env=stage.environment())
    listed = [shlex.split(line)[2:] for line in lines]
    assert sorted(stage.commands()) == sorted(listed) and value(listed[0], '--data') == 'a b'
    result, commands = stage.call('all_methods.sh', LIST='1', METHODS='none dma amp', SEEDS='1 2')
    assert result.stdout.count('\n') == 2 and result.stdout.count('/amp/') == 2  # the others are finished


def test_trials_choose_the_flags_of_the_table(stage):
    variables = {'METHODS': 'none dma', 'TRIAL_SEEDS': '8 9', 'SEEDS': '1'}
    listed, commands = stage.call('search.sh', LIST='1', **variables)
    assert listed.stdout.count('\n') == 12 and '/trials/none/' in listed.stdout and not commands
    result, commands = stage.call('search.sh', **variables)
    assert result.returncode == 0, result.stderr
    trials, table = commands[:24], commands[24:]
    assert all(value(command, '--val-split') == '0.1' and value(command, '--manualSeed') in '89' for command in trials)
    assert all('--val-split' not in command and value(command, '--manualSeed') == '1' for command in table)
    # The stub chooses the first folder, which is not the first of the list.
    assert all(value(command, '--lr') == '0.02' and value(command, '--wd') == '0.0005' for command in trials[12:])
    assert [value(command, '--dma-coef') for command in table if '--dma-coef' in command] == ['0.01']
    assert [line for line in result.stdout.splitlines() if line.startswith('chosen')] == [
        'chosen: none --lr 0.02 --wd 0.0005', 'chosen: dma --method dma --dma-coef 0.01']


def test_combinations_take_what_each_method_chose_alone_in_trials_of_before(stage, tmp_path):
    variables = {'METHODS': 'dma amp smoothing', 'COMBINATIONS': 'amp+dma smoothing+dma', 'SEEDS': '1'}
    for name in ('none/lr-0.1-wd-0.005', 'dma/dma-coef-0.3', 'amp/epsilon-1', 'smoothing/label-smoothing-0.5'):
        (tmp_path / 'trials' / name).mkdir(parents=True)
    result, commands = stage.call('search.sh', TRIALS=str(tmp_path / 'trials'), LIST='1', **variables)
    assert not commands and 'trials' not in result.stdout and result.stdout.count('\n') == 6
    flags = {line.split('/table/')[1].split('/')[0]: line.split(' --wd 0.005 ')[1].split(' --manualSeed')[0]
             for line in result.stdout.splitlines() if '+' in line}
    assert flags == {'amp+dma': '--method amp dma --epsilon 1 --dma-coef 0.3',
                     'smoothing+dma': '--method dma --label-smoothing 0.5 --dma-coef 0.3'}
    result, _ = stage.call('search.sh', LIST='1', **{**variables, 'COMBINATIONS': 'amp+sam'})
    assert result.returncode == 2
    assert result.stderr == 'error: COMBINATIONS can be one or several of: dma amp smoothing; was given sam\n'
    for combination, words in (('amp-late+dma', 'begins late, as --method-start'),
                               ('sam+dma-late', 'begins late'), ('amp', 'one method, which is for'),
                               ('amp+sam', 'cannot combine')):
        result, _ = stage.call('search.sh', LIST='1', METHODS='dma amp sam', COMBINATIONS=combination)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.parametrize('flags, variable', [
    ('--lr 0.1', 'LRS and TUNED'), ('--learning-rate=0.1', 'LRS and TUNED'), ('--wd 0', 'LRS and TUNED'),
    ('--method amp', 'METHODS'), ('--manualSeed 3', 'TRIAL_SEEDS and SEEDS'), ('-c x', 'OUT'),
    ('--val-split 0.2', 'the search itself'), ('--Weight_Decay 0', 'LRS and TUNED'),
    ('--manual-seed=7', 'TRIAL_SEEDS and SEEDS'), ('--label-smoothing 0.1', 'smoothing of METHODS'),
    ('--mixup 1', 'mixup of METHODS')])
def test_flags_that_would_undo_the_search_are_refused(flags, variable, stage):
    result, commands = stage.call('search.sh', *flags.split(), LIST='1', METHODS='dma smoothing mixup')
    assert (result.returncode, commands, result.stdout) == (2, [], '')
    assert result.stderr == (f'error: {re.split("[ =]", flags)[0]} for every run would undo the search; that is said '
                             f'by {variable}\n')


def test_a_method_that_is_named_twice_is_run_once_and_one_for_every_run_is_taken(stage):
    twice, once = (stage.call('search.sh', METHODS=names, LIST='1', TRIALS=str(stage.out))[0] for names
                   in ('dma dma', 'dma'))
    assert twice.stdout == once.stdout
    result, _ = stage.call('search.sh', '--method', 'amp', METHODS='none', LIST='1')
    assert result.stdout.count('--method amp') == 12


@pytest.mark.parametrize('script', [*SCRIPTS, *(name for name in OTHERS if name != 'run.sh')])
def test_help_is_the_text_above_the_script(script, stage):
    result, commands = stage.call(script, '--help')
    assert result.returncode == 0 and not commands and not result.stderr
    assert f'scripts/{script} ' in result.stdout and not any(line.startswith('#') for line
                                                             in result.stdout.splitlines())


def test_every_method_has_as_many_trials(stage):
    result, commands = stage.call('search.sh', TRIAL_SEEDS='1', SEEDS='1')
    trials = collections.Counter(tuple(command[command.index('--method') + 1:][:1]) if '--method' in command else ()
                                 for command in commands if '--val-split' in command)
    assert len(trials) == 6 and set(trials.values()) == {6}


def test_tuned_is_the_plain_network_with_other_rates_and_weight_decays(stage, tmp_path, monkeypatch, capsys):
    result, commands = stage.call('search.sh', METHODS='tuned', TUNED='0.3:0 0.4:0.01', TRIAL_SEEDS='1', SEEDS='1')
    assert result.returncode == 0, result.stderr
    of_tuned = [vars(cifar.make_parser().parse_args(command)) for command in commands
                if '/tuned/' in value(command, '--checkpoint')]
    assert [(args['lr'], args['weight_decay'], args['val_split'], args['method']) for args in of_tuned] == [
        (0.3, 0, 0.1, []), (0.4, 0.01, 0.1, []), (0.3, 0, None, [])]
    for number, command in enumerate(command for command in commands if '--val-split' not in command):
        write_run(tmp_path / f'runs/{number}', shlex.join(command[:command.index('--checkpoint')]))
    words = json.loads((tmp_path / 'record.compare').read_text())
    call(monkeypatch, compare, shlex.join([str(tmp_path / 'runs'), *words[2:]]))  # with two rows without a method
    assert 'Difference: to `--lr 0.02 --wd 0.0005`' in capsys.readouterr().out
    result, commands = stage.call('search.sh', METHODS='tuned', TUNED='0.3:0 0.4')
    assert (result.returncode, commands) == (2, [])
    assert result.stderr == 'error: TUNED must be pairs LR:WD, such as 0.005:0.005; was given 0.4\n'


def test_a_real_script_that_is_killed_in_its_second_run_goes_on_to_its_table(tmp_path):
    environment = {**os.environ, 'OUT': str(tmp_path), 'DATASET': 'digits', 'TRAINING': 'fraction0.1', 'SEEDS': '1',
                   'EPOCHS': '1', 'JOBS': '1', 'PYTHON': sys.executable}
    names = [f'fraction0.1-{loss}/seed1' for loss in ('crossentropy', 'margin', 'both')]
    command = [ROOT / 'scripts/large_margin_mnist.sh', '--test-batch', '360']
    script = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
    wait_for(tmp_path / names[1] / 'checkpoint.pth.tar', script)
    script.terminate()
    output, _ = script.communicate(timeout=120)
    assert script.returncode == 143 and 'Stopped; the finished epochs are kept' in output and 'Traceback' not in output
    assert [(tmp_path / name / 'result.json').exists() for name in names] == [True, False, False]

    result = subprocess.run(command, env={**environment, 'JOBS': '2'}, cwd='/', capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr
    assert f'finished: {tmp_path}/{names[0]}' in result.stdout and f'resumed: {tmp_path}/{names[1]}' in result.stdout
    assert 'epoch 1 | test loss' in (tmp_path / names[2] / 'output.txt').read_text()
    assert re.search(r'^--method large_margin .*[+-]\d+\.\d\d', result.stdout, re.MULTILINE)
