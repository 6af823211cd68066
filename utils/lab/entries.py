"""Measurements in a JSON file beside a checkpoint, each with all its settings, and none made twice.

A script's `measures` are a dict: the name of each -> its function, and the flags that are its further arguments.
"""
import os
import time

from utils.device import environment
from utils.errors import UserError
from utils.files import alone, read_json, write_json


def read(path, cells):
    """What was measured before: the entries in the JSON file at `path`, none if there is no such file.

    cells: a function (measure, result) that fails with a ValueError, KeyError, TypeError or AttributeError on what is
    no result; the file then is not of this script, a UserError.
    """
    if not os.path.exists(path):
        return []
    try:
        entries = read_json(path)
        for entry in entries:
            cells(entry['measure'], entry['result'])
            entry['settings'], entry['seconds']
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not what this script writes; move it away, or use another --out') from error
    return entries


def check_arguments(args, parser, measures):
    """Refuse flags of measures that are not in args.measures."""
    for name, (_, flags) in measures.items():
        for flag in flags:
            if flag in args.given and name not in args.measures:
                parser.error(f'--{flag.replace("_", "-")} is used by --{name}, which is not asked for')


def measured(measure, measures, args, settings, arguments, path, cells, device):
    """The entry of one measurement in the JSON file at `path`, made and added if it is not there.

    arguments: what the function of the measure takes before its flags. settings: what else decides the result.
    """
    function, flags = measures[measure]
    own = {flag: getattr(args, flag) for flag in flags}
    settings = settings | own
    for entry in read(path, cells):
        if entry['measure'] == measure and entry['settings'] == settings:
            return entry
    began = time.perf_counter()
    result = function(*arguments, **own)
    entry = {'measure': measure, 'settings': settings, 'result': result, 'seconds': time.perf_counter() - began,
             'environment': environment(device)}
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with alone(path):
        write_json(path, [*read(path, cells), entry])  # with what another process has added since
    return entry
