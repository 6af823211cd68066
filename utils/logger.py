"""log.txt: one tab-separated row per epoch, under a header; and the curves drawn from it."""
import contextlib
import os

from utils.errors import UserError
from utils.files import not_written, open_text, replacing, save_figure


class Logger:
    """Appends rows to `path`. With `rows`, those of the run being resumed, it begins with them."""

    def __init__(self, path, columns, rows=()):
        self.path, self.lines = path, [columns, *rows]  # of the words in each line
        with replacing(path) as temporary, open_text(temporary, 'w') as file:
            file.writelines('\t'.join(line) + '\n' for line in self.lines)

    def append(self, values):
        self.lines.append([_text(value) for value in values])
        whole = os.path.getsize(self.path)
        try:
            with open_text(self.path, 'a') as file:
                file.write('\t'.join(self.lines[-1]) + '\n')
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)
            raise not_written(self.path, error) from error


def _text(value):
    return str(value) if isinstance(value, int) else f'{value:.6g}'


def read_lines(path):
    """The header and the rows of the log at `path`, each a list of words, without blank lines and comments (#).

    A last line that was not written to its end is left out.
    """
    with open_text(path) as file:
        return [line.rstrip('\n').split('\t') for line in file
                if line.endswith('\n') and line.strip() and not line.startswith('#')]


def read_rows(path, columns, epochs):
    """The rows, as text, of the first `epochs` epochs in the log at `path`; none if path is None or not there.

    A process that was killed may have left a row of an epoch that no checkpoint has, or half a row: those are dropped.
    UserError if it is the log of something else.
    """
    if path is None or not os.path.exists(path):
        return []
    try:
        header, *rows = read_lines(path) or [[]]
        if header != columns:
            raise ValueError(f'its columns are {", ".join(header)}')
        rows = [row for row in rows if len(row) == len(columns) and int(row[0]) <= epochs]
        [float(value) for row in rows for value in row]
    except (ValueError, OSError) as error:
        raise UserError(f'{path} is not a log of this run ({error}); move it away') from error
    return rows


def read_log(path):
    """A log as a dict of column name -> list of floats."""
    names, *rows = read_lines(path)
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}


def plot_log(path, *pictures):
    """Draw loss and top-1 accuracy of the log at `path` over epochs, into each file of `pictures`."""
    from matplotlib.figure import Figure  # a second of import time that a short command should not pay

    log = read_log(path)
    figure = Figure(figsize=(10, 4), layout='constrained')
    for axes, quantity in zip(figure.subplots(1, 2), ('Loss', 'Top-1')):
        for column, values in log.items():
            if column.endswith(quantity):
                points = [point for point in zip(log['Epoch'], values) if point[1] == point[1]]  # not NaN: tested
                axes.plot(*zip(*points), label=column, marker='.' if len(points) < 30 else None)
        axes.set(xlabel='epoch', ylabel='loss' if quantity == 'Loss' else 'top-1 accuracy (%)')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, *pictures)
