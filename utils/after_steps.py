"""What an optimizer calls after each step: averages of weights, and heads and loss terms with `after_step()`; and what
it was seen to do.
"""
import gc
import weakref

from utils.errors import UserError

_TELLS = weakref.WeakKeyDictionary()  # a module with after_step() -> a reference to the optimizer that calls it
_SEEN = weakref.WeakKeyDictionary()  # an optimizer -> a Seen


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


class Seen:
    """steps: how many an optimizer has made since it is watched. rates: of its groups in the newest; None before."""
    steps, rates = 0, None


def watch(optimizer):
    """Count the steps of `optimizer` and keep the rates that they had; returns a `Seen`, or None if it calls no hooks.
    """
    if not hasattr(optimizer, 'register_step_post_hook'):
        return None
    seen = _SEEN[optimizer] = Seen()

    def stepped(optimizer, *_):
        seen.steps += 1
        seen.rates = [group.get('lr') for group in optimizer.param_groups]

    optimizer.register_step_post_hook(stepped)
    return seen


def newest_rates(optimizer):
    """The learning rates of the newest step of an optimizer, by group; none if it is not watched or made no step."""
    seen = _SEEN.get(optimizer)
    return seen.rates if seen and seen.rates else []
