"""What evaluate.py found of a finished run under other flags, as a run of its own, which compare.py shows beside it."""
import os

from utils import metrics, output
from utils.errors import UserError
from utils.files import digest, write_json
from utils.lab import checkpoints, runs as lab_runs
from utils.logger import Logger, read_lines


def read(subject, changed, folder):
    """The files of the run that a checkpoint is the result of, for `write`: args.json with `changed` flags, the lines
    of log.txt, result.json.

    changed: flag -> its value, of what evaluate.py was told. folder: that of the new run. UserError unless the run is
    finished, the checkpoint is that of its result, the flags make another setting, and `folder` holds no run.
    """
    checkpoints.check_output_folder(folder, '--as-run')
    source = os.path.dirname(subject.path) or '.'
    flags = lab_runs.Flags(subject.state['script'])
    runs, others = lab_runs.read_runs([source], flags)
    if others:
        raise UserError(f'--as-run needs a finished run around {subject.path}; {others[0]}')
    args, result = (lab_runs.read_dict(source, name) for name in ('args.json', output.RESULT))
    if result['epoch'] != subject.state['epoch']:
        raise UserError(f'--as-run needs the checkpoint that its run has its result of, of epoch {result["epoch"]}; '
                        f'{subject.path} is of epoch {subject.state["epoch"]}')
    if output.results_in(folder):
        raise UserError(f'--as-run {folder} holds a run already; name another folder')
    args.pop('check sum', None)
    args |= changed
    args['as given'] = {**args.get('as given', {}), **changed}
    if flags.setting(args) == runs[0].setting:
        raise UserError('--as-run would be the same run again; give --logit-adjust, --tta or --precision')
    return args, read_lines(os.path.join(source, 'log.txt')), result


def write(folder, files, tested, by_class, images, environment):
    """Make `folder` the run that `read` gave as `files`, but with these test results.

    tested, by_class: what a Meter and `metrics.of_classes` gave of the test images. images: how many these are.
    environment: where that was done.
    """
    args, log, result = files
    names, *rows = log
    for row in rows:
        for name, value in tested.items():
            if f'Test {name}' in names:  # not where validation images chose the epoch
                row[names.index(f'Test {name}')] = f'{value:.6g}' if row is rows[-1] else 'nan'
    both = args.get('environment', {}), environment
    args |= {'checkpoint': folder, 'environment': {
        name: ', '.join(dict.fromkeys(str(own.get(name)) for own in both)) for name in environment}}
    result = {name: value for name, value in result.items() if name != 'check sums'}
    result |= {**metrics.in_result(tested, by_class), 'test images': images}
    if result['chosen by'] != 'validation':
        result['best'] = {'top1': tested['Top-1'], 'epoch': result['epoch']}
    result['check sums'] = output.check_sums(result, log)
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, 'args.json'), {**args, 'check sum': digest(args)})
    Logger(os.path.join(folder, 'log.txt'), *log[:1], rows)
    write_json(os.path.join(folder, output.RESULT), result)
