"""Draw how loss and accuracy change around one checkpoint along random directions: visualize_sharpness.py of one FILE.

    python visualize2_sharpness.py FILE --alpha="-0.3:0.02:0.31"

The name is that of a script of the SmoothOut project (https://github.com/wenwei202/smoothout).
"""
import functools

import visualize_sharpness
from utils.script import run_script

SCRIPT = {'prog': 'visualize2_sharpness.py', 'at_most': 1}
parse_arguments = functools.partial(visualize_sharpness.parse_arguments, **SCRIPT)
main = functools.partial(visualize_sharpness.main, **SCRIPT)

if __name__ == '__main__':
    run_script(main)
