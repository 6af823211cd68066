"""What an optimizer calls after each step: averages of weights, and heads and loss terms with `after_step()`."""
import gc
import weakref

from utils.errors import UserError

_TELLS = weakref.WeakKeyDictionary()  # a module with after_step() -> a reference to the optimizer that calls it


def register(optimizer, call, who):
    """Have `optimizer` call `call()` after each step. UserError, about the flag `who`, if it calls no hooks."""
    if not hasattr(optimizer, 'register_step_post_hook'):
        raise UserError(f'{who} needs an optimizer that calls hooks after a step, as torch.optim.Optimizer does, '
                        f'and {type(optimizer).__name__} does not; derive it from that class and call its __init__')
    optimizer.register_step_post_hook(lambda *_: call())


def tell(optimizer, modules, who):
    """Have `optimizer` tell those of `modules` that have `after_step()` of its steps. UserError as of `register`."""
    for module in modules:
        if hasattr(module, 'after_step'):
            register(optimizer, module.after_step, who)
            _TELLS[module] = weakref.ref(optimizer)


def tell_if_none_does(optimizer, modules, who):
    """The same for an optimizer that the script may have made itself, perhaps around one that tells them already."""
    if not all(_teller(module) is optimizer for module in modules if hasattr(module, 'after_step')):
        gc.collect()  # one that nothing holds any more tells nobody
    tell(optimizer, [module for module in modules if _teller(module) is None], who)


def _teller(module):
    return _TELLS.get(module, lambda: None)()
