"""imagenet.py, but when torchrun starts it for the first time its second process is killed after so many steps:
killed_once.py STEPS FLAGS...
"""
import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import imagenet  # noqa: E402
from utils import methods  # noqa: E402
from utils.script import run_script  # noqa: E402

build_optimizer, steps = methods.build_optimizer, int(sys.argv.pop(1))


def doomed(*args, **options):
    optimizer, done = build_optimizer(*args, **options), []

    def count(*_):
        done.append(1)
        if len(done) == steps and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer.register_step_post_hook(count)
    return optimizer


methods.build_optimizer = doomed
run_script(imagenet.main)
