"""What evaluate.py found of a finished run under other flags, as a run of its own, which compare.py shows beside it."""
import os
import pathlib

from utils import metrics, output
from utils.errors import UserError
from utils.files import digest, write_json
from utils.lab import checkpoints, runs as lab_runs
from utils.logger import Logger, read_lines


def read(subject, changed, folder):
    """The files of the run that a checkpoint is the result of, for `write`: args.json with `changed` flags, the lines
    of log.txt, result.json.

    changed: flag -> its value, of what evaluate.py was told. folder: that of the new run. UserError unless the run is
    finished, its result and the checkpoint are of the last epoch, the flags make another setting, and `folder` is apart
    from other runs.
    """
    checkpoints.check_output_folder(folder, '--as-run')
    source = os.path.dirname(subject.path) or '.'
    flags = lab_runs.Flags(subject.state['script'])
    runs, others = lab_runs.read_runs([source], flags)
    if others:
        raise UserError(f'--as-run needs a finished run around {subject.path}; {others[0]}')
    args, result = (lab_runs.read_dict(source, name) for name in ('args.json', output.RESULT))
    if runs[0].chosen:
        raise UserError(f'--as-run needs a run without --val-split; the epoch of {subject.path} was chosen by '
                        'validation images that were not tested in this way')
    if result['epoch'] != subject.state['epoch']:
        raise UserError(f'--as-run needs the checkpoint that its run has its result of, of epoch {result["epoch"]}; '
                        f'{subject.path} is of epoch {subject.state["epoch"]}')
    if other := run_at(folder):
        raise UserError(f'--as-run {folder} cannot be used, as there is a run in {other}; name another folder')
    trained_with = {**args, 'as given': subject.state['args'], 'optimizer class': subject.state.get('optimizer_class')}
    if flags.setting(trained_with) != runs[0].setting or lab_runs.seeds_of(subject.state['args']) != runs[0].seed:
        raise UserError(f'--as-run needs the checkpoint of the run that is around it; {subject.path} is of other flags '
                        f'or another seed than {os.path.join(source, "args.json")}')
    args.pop('check sum', None)
    args |= changed
    args['as given'] = {**args.get('as given', {}), **changed}
    if flags.setting(args) == runs[0].setting:
        raise UserError('--as-run would be the same run again; give --logit-adjust or another --tta')
    return args, read_lines(os.path.join(source, 'log.txt')), result


def run_at(folder):
    """A run that is in `folder`, below it or around it, where compare.py would see only one of the two; or None."""
    path = pathlib.Path(folder).resolve()
    if output.results_in(path):
        return path
    places = (*path.parents, *(pathlib.Path(below) for below, _, _ in os.walk(path)))
    return next((place for place in places if (place / 'args.json').exists()), None)


def write(folder, files, tested, by_class, images, environment):
    """Make `folder` the run that `read` gave as `files`, but with these test results.

    tested, by_class: what a Meter and `metrics.of_classes` gave of the test images. images: how many these are.
    environment: where that was done.
    """
    args, (names, *rows), result = files
    columns = [f'Test {name}' for name in tested]
    untested = [[word if name not in columns else 'nan' for name, word in zip(names, row)] for row in rows[:-1]]
    last = dict(zip(names, rows[-1])) | {column: f'{value:.6g}' for column, value in zip(columns, tested.values())}
    rows = [*untested, list(last.values())]
    trained_in = args.get('environment') or {}
    both = {name: [own.get(name) or 'unknown' for own in (trained_in, environment)] for name in environment}
    args = {**args, 'checkpoint': folder,
            'environment': {name: ', '.join(dict.fromkeys(words)) for name, words in both.items()}}
    result = {**result, **metrics.in_result(tested, by_class), 'test images': images,
              'best': {'top1': tested['Top-1'], 'epoch': result['epoch']}}
    result['check sums'] = output.check_sums(result, [names, *rows])
    os.makedirs(folder, exist_ok=True)
    write_json(os.path.join(folder, 'args.json'), {**args, 'check sum': digest(args)})
    Logger(os.path.join(folder, 'log.txt'), names, rows)
    write_json(os.path.join(folder, output.RESULT), result)
