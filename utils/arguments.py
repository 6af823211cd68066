"""argparse, with the few habits that all scripts here share."""
import argparse
import math
import re
import sys

from utils import distributed


class Parser(argparse.ArgumentParser):
    """Errors are one sentence; flags are read without regard to case, `-` and `_`: `--train_batch`, `--manual-seed`.

    After `parse_args` the namespace has `given`: the set of names that the command line set itself.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)
        self._negative_number_matcher = re.compile(r'-\.?\d')  # so that -1:0.1:2 is a value too; no flag here begins with a digit

    def parse_args(self, args=None, defaults=None):
        """`defaults` (name -> value), a checkpoint's, stand in for the declared ones where the parser knows the name."""
        words = self._canonical(sys.argv[1:] if args is None else args)
        declared = {action.dest: action.default for action in self._actions if action.default is not argparse.SUPPRESS}
        unset = object()
        read = vars(super().parse_intermixed_args(words, argparse.Namespace(**dict.fromkeys(declared, unset))))
        given = {name: value for name, value in read.items() if value is not unset}
        inherited = {name: value for name, value in (defaults or {}).items() if name in declared}
        for action in self._actions:
            value = inherited.get(action.dest) if action.choices and action.dest not in given else None
            for one in value if isinstance(value, list) else [value]:
                if one is not None and one not in action.choices:
                    self.error(f'{action.option_strings[-1]} {one} of the checkpoint is not known here; '
                               f'there are {", ".join(map(str, action.choices))}')
        return argparse.Namespace(**{**declared, **inherited, **given}, given=set(given))

    def _canonical(self, words):
        spelling = {_bare(flag): flag for flag in self._option_string_actions if flag.startswith('--')}
        result = []
        for word in words:
            flag, equals, value = word.partition('=')
            result.append(spelling.get(_bare(flag), flag) + equals + value if word.startswith('--') else word)
        return result

    def error(self, message):
        distributed.let_the_first_speak()
        self.exit(2, f'{self.prog}: error: {message}\n')


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)


def _bare(flag):
    return flag.lower().replace('-', '').replace('_', '')


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] with above=True."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or value == math.inf:
            what = 'a whole number' if kind is int else 'a number'
            bounds = f'{"above" if above else "of at least"} {low}' + ('' if high == math.inf else f' and at most {high}')
            raise argparse.ArgumentTypeError(f'must be {what} {bounds}, was given {text}')
        return value
    return convert
