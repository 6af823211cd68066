"""How much memory there is, to refuse at once what cannot fit."""
import math
import pathlib

from utils.errors import UserError


def free():
    """Bytes that this process can still use on the CPU, by the machine and by its control group; inf if unknown."""
    machine = _numbers('/proc/meminfo')
    known = [1024 * machine['MemAvailable']] if 'MemAvailable' in machine else []
    for folder, limit, used in (('/sys/fs/cgroup', 'memory.max', 'memory.current'),
                                ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')):
        limit, used = _read(f'{folder}/{limit}').strip(), _read(f'{folder}/{used}').strip()
        if limit.isdecimal() and used.isdecimal():
            held = _numbers(f'{folder}/memory.stat')  # files that are only cached give way
            known.append(int(limit) - int(used) + held.get('inactive_file', 0) + held.get('active_file', 0))
    return min(known, default=math.inf)


def check(needed, what, flag):
    """UserError if `what`, in words, which takes `needed` bytes, does not fit into memory; flag: what to lower."""
    if needed > (there := free()):
        raise UserError(f'{what} take {needed / 2 ** 30:.4g} GB of memory, and {there / 2 ** 30:.4g} GB are free; give '
                        f'a smaller {flag}')


def _numbers(path):
    words = (line.replace(':', ' ').split() for line in _read(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _read(path):
    try:
        return pathlib.Path(path).read_text(errors='replace')
    except OSError:
        return ''
