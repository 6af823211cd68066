"""Where methods are listed, and how the chosen ones are put together. No other file knows their names.

A method is a module beside cifar.py. It offers `add_arguments(parser)` and those of these that it needs:
    head(args)            -> classifier: (in_features, num_classes) -> module with forward(features, targets=None)
    loss_term(args)       -> (outputs, targets, activations) -> scalar, added to the cross-entropy
    optimizer(args, model, steps_per_epoch) -> (params, lr, **options) -> optimizer, used in place of torch.optim.SGD; where
                             --optimizer names another class than SGD, the options have it as base_optimizer
and, where it needs them:
    layers(args)                -> names of the modules whose outputs are the activations of its loss term
    cross_entropy_weight(args)  -> the weight of the cross-entropy beside its loss term; without it 1, several are multiplied
    FIRST_VALUES                = flags that a checkpoint's state takes the place of, so that a resumed run refuses them
    CLASS_TARGETS = True        where targets must be one class for each image, not shares of several, as mixing images gives
A head with `after_step()` is told of every optimizer step; one that trains on other logits than it predicts with has
`without_margin(logits)` for these. An optimizer with `next_part(parts)` is told when a batch that is split goes on by so many parts; one
whose `local_pass` is true does not need the gradient of all processes.
A loss term's weight is a flag of its own, --NAME-coef; --coef is short for it. `args.given` is the set of flags that the command
line set; a ValueError from any of these functions ends the run with its sentence.
"""
import argparse
import importlib
import inspect
import math

import torch
from torch import nn

from models.base import WithAuxiliary
from utils.activations import Activations
from utils.eval import cross_entropy

# A method of your own is one more line here, the name of its file.
METHODS = {name: importlib.import_module(name) for name in (
    'dma',
    'lsoftmax',
    'amp',
    'smoothout',
    'large_margin',
)}


def add_arguments(parser):
    """--method, --coef, and a group of flags for each method."""
    group = parser.add_argument_group('method')
    group.add_argument('--method', nargs='+', choices=METHODS, default=[], metavar='NAME',
                       help=f'one or several of: {", ".join(METHODS)} (none: cross-entropy)')
    group.add_argument('--coef', type=float, metavar='C', help="weight of the method's loss term")
    for name, module in METHODS.items():
        module.add_arguments(parser.add_argument_group(f'--method {name}'))


def check_arguments(args, parser):
    """Refuse what cannot combine and flags of methods that are not selected; give --coef to the term that it means."""
    for name in args.method:
        if args.method.count(name) > 1:
            parser.error(f'--method names {name} twice; once is enough')
    for part, why in (('head', 'a network has one'), ('optimizer', 'a step has one')):
        having = [name for name in args.method if hasattr(METHODS[name], part)]
        if len(having) > 1:
            parser.error(f'--method {" and ".join(having)} cannot combine: each brings its own {part}, and {why}')
    for name, module in METHODS.items():
        unused = sorted(flags(module) & args.given)
        if unused and name not in args.method:
            parser.error(f'--{unused[0].replace("_", "-")} is a flag of --method {name}, which is not selected')
        if name in args.method and args.compile and hasattr(module, 'layers'):
            parser.error(f'--method {name} and --compile cannot combine: it needs gradients at layers inside of what is compiled')
        for flag in sorted(getattr(module, 'FIRST_VALUES', set()) & args.given if args.resume else ()):
            parser.error(f'--{flag.replace("_", "-")} is where a new run begins; a resumed one goes on from what the checkpoint has')
        mixing = [flag for flag in ('mixup', 'cutmix') if getattr(args, flag, 0)]
        if name in args.method and mixing and getattr(module, 'CLASS_TARGETS', False):
            parser.error(f'--method {name} and --{mixing[0]} cannot combine: it needs one class for each image, and a mixed image has two')
    weighted = [name for name in args.method if hasattr(args, f'{name}_coef')]
    if 'coef' in args.given:
        if len(weighted) != 1:
            why = (f'{" and ".join(weighted)} each do; use {" and ".join(map(_coef_flag, weighted))}' if weighted
                   else f'--method {" ".join(args.method) or "(none)"} has none')
            parser.error(f'--coef weighs the loss term of the one selected method that has one, but {why}')
        if f'{weighted[0]}_coef' in args.given:
            parser.error(f'--coef and {_coef_flag(weighted[0])} are the same weight; use one of them')
        setattr(args, f'{weighted[0]}_coef', args.coef)
    for name in weighted:
        if not 0 <= getattr(args, f'{name}_coef') < math.inf:
            parser.error(f'{_coef_flag(name)} must be a number of at least 0, was given {getattr(args, f"{name}_coef")}')


def _coef_flag(name):
    return f'--{name.replace("_", "-")}-coef'


def flags(module):
    """The names, in `args`, of the flags that a method's module adds."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return set(vars(parser.parse_args([])))


def _chosen(args, part, *context):
    return [getattr(METHODS[name], part)(args, *context) for name in args.method if hasattr(METHODS[name], part)]


def build_head(args):
    """The classifier that models are built with."""
    return (_chosen(args, 'head') or [nn.Linear])[0]


def build_criterion(args, model):
    """(outputs, targets) -> scalar: cross-entropy, unless a method does without, plus the chosen methods' terms.

    Where the network has auxiliary classifiers, their weighted cross-entropies are added, whatever the method.
    ValueError if a method asks for layers that `model` does not have.
    """
    weight = math.prod(_chosen(args, 'cross_entropy_weight'))
    if args.label_smoothing and not weight:
        raise ValueError('--label-smoothing does nothing without cross-entropy; give it a --cross-entropy-weight')
    terms = []
    for module in (METHODS[name] for name in args.method if hasattr(METHODS[name], 'loss_term')):
        layers = Activations(model, module.layers(args)).read if hasattr(module, 'layers') else list
        terms.append((module.loss_term(args), layers))

    def criterion(outputs, targets):
        auxiliary = 0
        if isinstance(outputs, WithAuxiliary):
            auxiliary = outputs.weight * sum(cross_entropy(logits, targets, args.label_smoothing) for logits in outputs.auxiliary)
            outputs = outputs.outputs
        loss = weight * cross_entropy(outputs, targets, args.label_smoothing) if weight else 0
        return loss + sum(term(outputs, targets, layers()) for term, layers in terms) + auxiliary

    return criterion


def build_optimizer(args, model, steps_per_epoch):
    """The optimizer of --optimizer, alone or inside of what the chosen method wraps around it, for the parameters of `model`.

    ValueError if a model's regime sets an option that the optimizer does not have.
    """
    base = getattr(torch.optim, args.optimizer)
    options = {**args.regime[0], 'nesterov': True} if args.nesterov else args.regime[0]
    for name in sorted(set().union(*args.regime) - set(inspect.signature(base).parameters)):
        raise ValueError(f'the regime of --arch {args.arch} sets {name}, which {args.optimizer} does not have')
    wrapping = _chosen(args, 'optimizer', model, steps_per_epoch)
    if wrapping and base is not torch.optim.SGD:
        options = {**options, 'base_optimizer': base}
    optimizer = (wrapping or [base])[0](model.parameters(), **options)
    for module in model.modules():
        if hasattr(module, 'after_step'):
            optimizer.register_step_post_hook(lambda *_, module=module: module.after_step())
    return optimizer
