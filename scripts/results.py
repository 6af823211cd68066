"""Print the tables of a document again, and draw its pictures, from the runs in results/ alone.

    python scripts/results.py docs/results.md

A table follows the command that prints it, an indented line `python compare.py results/... --markdown` or
`python -m utils.lab.choose results/... --markdown`, and ends with the comment <!-- end -->. What is between them is
replaced by what the command prints, which also appears on the terminal. A picture is drawn by such a command with
`--plot FILE` before its --markdown, or by an indented line `python compare.py results/... --plot FILE`.
"""
import contextlib
import glob
import importlib
import io
import os
import pathlib
import re
import shlex
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.errors import UserError  # noqa: E402

PRINTING = r'^    python ((?:compare\.py|-m utils\.lab\.choose) results/(?:[^\n]|\\\n)*? --markdown)$'
COMMAND = re.compile(PRINTING, re.MULTILINE)
TABLE = re.compile(rf'({PRINTING}\n\n)(.*?)(^<!-- end -->$)', re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r'^    python (compare\.py results/(?:[^\n]|\\\n)*? --plot \S+)$', re.MULTILINE)


def tables(text):
    """(words of the command, what the document shows below it) of each table in the text of a document."""
    return [(shlex.split(command.replace('\\\n', ' ')), shown) for _, command, shown, _ in TABLE.findall(text)]


def expanded(words):
    """Words with * replaced by the paths that fit, as a shell does."""
    return [path for word in words for path in sorted(glob.glob(word, root_dir=ROOT)) or [word]]


def printed(words):
    """What a command prints, in Markdown.

    It runs in this process, as importing PyTorch takes most of the time of a command.
    """
    module, *arguments = expanded(words)[words[0] == '-m':]
    argv, folder = sys.argv, os.getcwd()
    try:
        sys.argv = [module, *arguments]
        os.chdir(ROOT)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            importlib.import_module(module.removesuffix('.py')).main()
    except UserError as error:
        sys.exit(f'error: python {shlex.join(words)}: {error}')
    finally:
        sys.argv = argv
        os.chdir(folder)
    return out.getvalue().strip() + '\n\n'


def main():
    if len(sys.argv) == 1:
        sys.exit('error: name the documents, such as docs/results.md')
    for path in map(pathlib.Path, sys.argv[1:]):
        if not path.is_file():
            sys.exit(f'error: there is no document {path}')
        text = path.read_text(encoding='utf-8')
        if not tables(text):
            sys.exit(f'error: {path} has no table that a command of compare.py prints')
        if (commands := len(COMMAND.findall(text))) != len(tables(text)):
            sys.exit(f'error: {path} has {commands} commands, and {len(tables(text))} tables that end with '
                     '<!-- end -->; each needs one')
        outputs = [printed(words) for words, _ in tables(text)]
        print(*outputs, sep='\n', end='')
        for command in PICTURE.findall(text):
            printed(shlex.split(command.replace('\\\n', ' ')))
        new = iter(outputs)
        path.write_text(TABLE.sub(lambda match: match[1] + next(new) + match[4], text), encoding='utf-8')


if __name__ == '__main__':
    main()
