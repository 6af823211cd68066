"""A table of measurements that grows row by row and resumes where it was interrupted."""
import csv
import json
import os

from utils.errors import UserError
from utils.files import open_text, read_json, replacing, write_json


class Scan:
    """STEM.csv, a row for each point that has been measured, and STEM.json, the settings that they were measured with.

    A point is a tuple of `axes` numbers, the first columns; the others are what was measured there, all with every
    digit.
    rows: point -> what was measured. UserError if the files are there with other settings, unless `overwrite`.
    """

    def __init__(self, stem, settings, columns, axes, overwrite=False):
        self.path, self.columns, self.axes, self.rows = f'{stem}.csv', columns, axes, {}
        if os.path.exists(self.path) and not os.path.exists(f'{stem}.json') and not overwrite:
            raise UserError(f'{self.path} is there without {stem}.json, which says how it was measured; use '
                            '--overwrite, or move it away')
        if overwrite or not os.path.exists(f'{stem}.json') or not os.path.exists(self.path):
            os.makedirs(os.path.dirname(stem) or '.', exist_ok=True)
            write_json(f'{stem}.json', settings)
            with replacing(self.path) as temporary, open_text(temporary, 'w', newline='') as file:
                csv.writer(file).writerow(columns)
        check_settings(f'{stem}.json', settings)
        try:
            with open_text(self.path, newline='') as file:
                whole = [line for line in file if line.endswith('\n')]  # the last may be the half of one
            header, *rows = csv.reader(whole)
            if header != columns:
                raise ValueError(f'its columns are {", ".join(header)}')
            for row in rows:
                values = [float(value) for value in row]
                if len(values) != len(columns):
                    raise ValueError(f'a row has {len(values)} values')
                self.rows[tuple(values[:axes])] = values[axes:]
        except (ValueError, OSError) as error:
            raise UserError(f'{self.path} is not the table of this scan ({error}); use --overwrite, or move it '
                            'away') from error
        os.truncate(self.path, sum(len(line.encode('utf-8', 'surrogateescape')) for line in whole))

    def append(self, point, values):
        with open_text(self.path, 'a', newline='') as file:
            csv.writer(file).writerow([*point, *values])
            file.flush()
            os.fsync(file.fileno())
        self.rows[tuple(point)] = list(values)

    def column(self, name, points):
        """What was measured under this name at each of `points`."""
        number = self.columns.index(name) - self.axes
        return [self.rows[point][number] for point in points]


def check_settings(path, settings):
    """UserError unless the JSON file at `path` holds these settings, whatever else it holds."""
    try:
        held = read_json(path)
        held = {name: held.get(name) for name in settings}
    except (ValueError, AttributeError) as error:
        raise UserError(f'{path} is not what this script writes; use --overwrite, or move it away') from error
    for name, value in settings.items():
        if held[name] != value:
            before, now = held[name], value
            if isinstance(before, dict) and isinstance(now, dict):  # the first entry that differs says enough
                part = next(part for part in {**before, **now} if before.get(part) != now.get(part))
                name, before, now = f'{name} {part}', before.get(part), now.get(part)
            raise UserError(f'{path} and what lies beside it were made with other settings ({name}: '
                            f'{json.dumps(before)}, and '
                            f'{json.dumps(now)} was asked for); use --overwrite, or another --out')
