"""Copy what a table needs of finished runs into results/; scripts/keep.sh calls it."""
import os
import pathlib
import shutil
import sys

from utils.errors import UserError, shown
from utils.files import digest, write_json
from utils.flags import Parser, file_path
from utils.lab import measured, runs as lab_runs
from utils.output import RESULT
from utils.script import run_script

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = ('args.json', 'log.txt', RESULT)
MEASURED = (*measured.files_of(chosen=False), *measured.files_of(chosen=True))


def main():
    parser = Parser(prog='keep.sh', usage='scripts/keep.sh FOLDER...', description='Copy finished runs into results/.')
    parser.add_argument('folders', nargs='+', type=file_path, metavar='FOLDER')
    named = parser.parse_args().folders
    folders, refused = lab_runs.find_runs(named)
    refused = [line.removeprefix('left out: ') for line in refused]
    kept = 0
    for folder in folders:
        if reason := why_not(folder):
            refused.append(f'{shown(folder)} ({reason})')
            continue
        target = place_of(folder, named)
        if what := other_than(folder, target):
            place = shown(target.relative_to(ROOT).as_posix())
            refused.append(f'{shown(folder)} ({place} {what}; remove that, or give this one another folder below '
                           'checkpoints/)')
            continue
        target.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, *MEASURED):
            if name in FILES or os.path.exists(os.path.join(folder, name)):
                shutil.copyfile(os.path.join(folder, name), target / name)
            else:
                (target / name).unlink(missing_ok=True)
        name_folder(target)
        kept += 1
    print(f'{kept} runs are in results/')
    if refused:
        print(*(f'refused: {line}' for line in refused), sep='\n', file=sys.stderr)
        raise UserError(f'{len(refused)} of {kept + len(refused)} runs cannot be kept')


def why_not(folder):
    """Why a run cannot be kept, in words, or None."""
    script = lab_runs.script_of(folder)
    runs, others = lab_runs.read_runs([folder], lab_runs.Flags(script or 'cifar.py'))
    if others:
        return others[0]
    try:
        measured.numbers_of(runs[0], 'mean')
    except UserError as error:
        return str(error)
    commit = lab_runs.read_dict(folder, 'args.json').get('environment', {}).get('commit')
    if not commit or 'with changes' in commit or 'unknown' in commit:
        return f'its code is that of commit {commit or "unknown"}; commit the changes, and run it again'
    return None


def other_than(folder, target):
    """What `target` holds, in words, if it is not the result of the run in `folder`; None if it is, or nothing."""
    if not (target / RESULT).exists():
        return None
    try:
        return None if lab_runs.read_dict(target, RESULT) == lab_runs.read_dict(folder, RESULT) else 'is another run'
    except ValueError as error:
        return f'is damaged, as {error}'


def name_folder(target):
    """Let args.json name the folder that the run is kept in, instead of one of the machine that it ran on."""
    args = lab_runs.read_dict(target, 'args.json')
    args['checkpoint'] = target.relative_to(ROOT).as_posix()
    if args.pop('check sum', None):
        args['check sum'] = digest(args)
    write_json(target / 'args.json', args)


def place_of(folder, named):
    """Where in results/ a run is kept: at its path below checkpoints/, or else below the folder that holds the one of
    the folders `named` in which it is.
    """
    above, path = ROOT / 'checkpoints', pathlib.Path(os.path.abspath(folder))
    if not path.is_relative_to(above):
        above, path = above.resolve(), path.resolve()
    if not path.is_relative_to(above):
        path = pathlib.Path(os.path.abspath(folder))
        above = next(one for one in map(pathlib.Path, map(os.path.abspath, named)) if path.is_relative_to(one)).parent
    return ROOT / 'results' / path.relative_to(above)


if __name__ == '__main__':
    run_script(main)
