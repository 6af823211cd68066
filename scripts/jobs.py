"""Run commands, several side by side: one a line on standard input, as LIST=1 prints them.

    python scripts/jobs.py [N] < commands          # N runs at a time; by default see `at_once`

Each is a command of cifar.py or imagenet.py with --checkpoint FOLDER. One at a time writes to the terminal, several
write to FOLDER/output.txt. The cores are shared out, unless OMP_NUM_THREADS says how many threads a run has. Exit
status: 0, 1 if a run failed, 130 or 143 if it was stopped.
"""
import contextlib
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time

STOPPED = (130, 143)  # exit statuses after SIGINT and SIGTERM


def value(words, *names, default=None):
    """What a command gives as its last flag of these names, which are without -; FLAG=VALUE and other spellings, as the
    scripts take them, count too.
    """
    values = [default]
    for word, after in zip(words, [*words[1:], None]):
        flag, joined, behind = word.partition('=')
        if flag.startswith('-') and flag.lower().replace('-', '').replace('_', '') in names:
            values.append(behind if joined else after)
    return values[-1]


def folder_of(words):
    return value(words, 'checkpoint', 'c')


def is_small(words):
    """Whether a step of this run's network is too small to occupy more than one core."""
    arch, depth = value(words, 'arch', 'a', default='resnet'), value(words, 'depth', default='20')
    return arch in ('lenet', 'mlp') or arch == 'resnet' and depth.isdecimal() and int(depth) <= 20


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def at_once(commands):
    """One run for each core if all networks are small; otherwise one run, whose operations use all cores."""
    return cores() if all(map(is_small, commands)) else 1


class Jobs:
    """The runs of `commands`, each a list of words, `side_by_side` at a time."""

    def __init__(self, commands, side_by_side):
        self.waiting, self.side_by_side = list(commands), side_by_side
        self.running, self.done, self.failed = {}, 0, []  # running: a process -> its folder
        self.news = queue.SimpleQueue()  # processes that have ended, and the numbers of signals that have come
        self.began = time.monotonic()
        self.environment = {'OMP_NUM_THREADS': str(max(1, cores() // side_by_side)), **os.environ}

    def run(self):
        """The exit status."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.stop)
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.side_by_side and self.news.empty():
                self.start(self.waiting.pop(0))
            if not self.running and self.news.empty():  # none could be started
                break
            process = self.news.get()  # waits for one, or for a signal
            if isinstance(process, int):
                return self.end(128 + process)
            status = exit_status(process)
            if status in STOPPED:
                return self.end(status)
            folder = self.running.pop(process)
            told = f': {last_line(folder)}' if status and self.side_by_side > 1 else ''
            self.count(folder, status and f'exit status {status}', told)
        if self.failed:
            print('\nfailed:', *self.failed, sep='\n', file=sys.stderr)
        return 1 if self.failed else 0

    def stop(self, signum, frame):
        """Only said here, and heeded by `run`: a run that is just being started would be none of `running`."""
        self.news.put(signum)

    def start(self, words):
        folder = folder_of(words)
        resumed = pathlib.Path(folder, 'checkpoint.pth.tar').exists()
        print(f'{"resumed" if resumed else "run"}: {folder}', flush=True)
        try:
            with contextlib.ExitStack() as stack:
                output = None
                if self.side_by_side > 1:
                    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
                    output = stack.enter_context(open(pathlib.Path(folder, 'output.txt'), 'a', encoding='utf-8'))
                process = subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                                           stderr=output)
        except OSError as error:
            self.count(folder, f'not started: {error}')
            return
        self.running[process] = folder
        threading.Thread(target=self.wait, args=[process], daemon=True).start()

    def wait(self, process):
        process.wait()
        self.news.put(process)

    def count(self, folder, fault, told=''):
        """Count a run that has ended, and say how far all of them are. fault: why it failed, or nothing."""
        if fault:
            self.failed.append(f'{folder} ({fault})')
            print(f'failed: {self.failed[-1]}{told}', file=sys.stderr, flush=True)
        else:
            self.done += 1
        left = len(self.waiting) + len(self.running)
        ended, seconds = self.done + len(self.failed), time.monotonic() - self.began
        remaining = f', about {duration(seconds / ended * left)} remain' if left else f' after {duration(seconds)}'
        print(f'{self.done} done, {len(self.failed)} failed, {left} left{remaining}', flush=True)

    def end(self, status):
        """Stop the runs, wait for them, and give the exit status. Ctrl-C has reached most of them already: to them a
        second signal is nothing.
        """
        for process in self.running:
            if process.poll() is None:
                process.terminate()
        for process, folder in self.running.items():
            process.wait()
            if self.side_by_side > 1:
                print(f'stopped: {folder}', file=sys.stderr)
        return status


def exit_status(process):
    """As a shell gives it: 128 + signal of a process that a signal has ended."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def last_line(folder):
    lines = pathlib.Path(folder, 'output.txt').read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line for line in reversed(lines) if line.strip()), 'it printed nothing')


def duration(seconds):
    minutes = round(seconds / 60)
    return f'{seconds:.0f} s' if seconds < 100 else f'{minutes} min' if minutes < 100 else f'{minutes / 60:.1f} h'


def main():
    words = sys.argv[1:]
    if len(words) > 1 or words and not (words[0].isdecimal() and int(words[0]) > 0):
        sys.exit(f'error: JOBS must be a number of runs side by side, of at least 1, was given {" ".join(words)}')
    commands = []
    for line in filter(str.strip, sys.stdin):
        try:
            commands.append(shlex.split(line))
        except ValueError as error:
            sys.exit(f'error: {line.strip()} cannot be read as a command ({error})')
    for command in commands:
        if folder_of(command) is None:
            sys.exit(f'error: a command needs --checkpoint FOLDER, was given {shlex.join(command)}')
    sys.exit(Jobs(commands, int(words[0]) if words else at_once(commands)).run())


if __name__ == '__main__':
    main()
