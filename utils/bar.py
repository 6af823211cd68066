"""The progress line: a bar with ETA on a terminal, nothing elsewhere; each epoch prints its own line in any case."""
import os
import sys
import time

from progress import SHOW_CURSOR
from progress.bar import Bar

from utils import distributed


class ProgressLine(Bar):
    """A bar over `total` batches, or what `unit` names, with what their meter says.

    Reading the meter waits for the device, so it happens twice a second (every five seconds without a terminal).
    """
    width = 20

    def __init__(self, title, total, unit='batch', file=None):
        file = file or (sys.stderr if distributed.is_first() else open(os.devnull, 'w', errors='backslashreplace'))
        super().__init__(title.replace('%', '%%'), max=total, file=file)
        self.unit = unit
        self.interval, self.read = (0.5 if self.is_tty() else 5.0), time.perf_counter()
        self.began, self.done, self.data_seconds = self.read, 0, 0.0

    def advance(self, meter, data_seconds=None):
        """Count one more, whose batch took `data_seconds` to make. True if this was a time to read the meter."""
        self.done += 1
        self.data_seconds += data_seconds or 0.0
        now = time.perf_counter()
        if now - self.read < self.interval:
            return False
        self.read = now
        data = '' if data_seconds is None else f'data {self.data_seconds / self.done:.3f}s | '
        self.suffix = (f'%(index)d/%(max)d | {data}{self.unit} {(now - self.began) / self.done:.3f}s '
                       f'| ETA %(eta_td)s | {str(meter).replace("%", "%%")}')
        self.goto(self.done)
        return True

    def say(self, text):
        """Print a line on standard output, above the bar."""
        if self.is_tty():
            print('\r\033[K', end='', file=self.file, flush=True)
        print(text, flush=True)
        if self.is_tty() and self.index:
            self.update()

    def finish(self):
        """Remove the line from the terminal, for what is printed next."""
        if self.is_tty():
            print('\r\033[K' + SHOW_CURSOR, end='', file=self.file, flush=True)
            self._hidden_cursor = False
