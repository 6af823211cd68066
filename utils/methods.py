"""Where methods are listed, and how the chosen ones are put together.

A method is a module beside cifar.py, or in baselines/. It offers `add_arguments(parser)`, which adds its flags under
names that no script has, and those of these that it needs, each of which takes as many of its arguments as it names:
    head(args)              -> classifier: (in_features, num_classes) -> module with forward(features, targets=None)
    loss_term(args, model, class_counts)
                            -> (outputs, targets, activations) -> scalar, added to the cross-entropy: a function, or an
                               nn.Module, which becomes part of the model: its parameters are trained, its parameters
                               and buffers are on the device and in the checkpoint, its gradients averaged over
                               processes. `model.in_features` and `model.num_classes` are the sizes of the classifier;
                               class_counts, which a module cannot have, as the network is built before the data are
                               read, lists how many training images each class has.
    optimizer(args, model, steps_per_epoch)
                            -> (params, lr, **options) -> optimizer, used instead of torch.optim.SGD; where --optimizer
                               names another class than SGD, the options have it as base_optimizer
and, where it needs them:
    layers(args)                   -> names of what its loss term gets as activations: modules, whose outputs they are,
                                      `input`, the images, or `features`, what goes into the head, in every architecture
    cross_entropy_weight(args)     -> the weight of the cross-entropy together with its loss term; by default 1, several
                                      are multiplied
    parameter_groups(args, model)  -> [{'params': [...], 'lr': ...}, ...]: options of their own for some parameters of
                                      the model; the schedule multiplies their rates as it multiplies all others
    DEFAULT_LR = the rate of the optimizer that it brings, where no flag says it
    STRENGTH = the name of the option of its optimizer's parameter groups that --method-start and --method-ramp scale
    strength(args)                 -> 0 where there is nothing that these two could scale, such as a margin
    begins(args)                   -> {flag: share of the training after which what it says begins}, so that a training
                                      that ends before is refused
    by_position(args)              -> whether its `before_step` or its optimizer does other things at another share of
                                      the training, so that a run that is made longer is mixed; not needed beside
                                      `begins`
    first_values(args)             -> flags that a checkpoint's state replaces, so that a resumed run refuses them
    CLASS_TARGETS = True where targets must be one class for each image, not shares of several, as mixing images gives
--method-start and --method-ramp scale the strength of each method, from 0, which is plain training, to 1: the option
STRENGTH of an optimizer, and the weight of a loss term, which is not computed at 0; where a method does without the
cross-entropy, its weight falls from 1 as the strength grows. A head, or a loss term that is an object, that has
`before_step(behind, strength)` is told before each step the share of the training that is behind and the strength: both
are functions of the position alone.
A head that trains on other logits than it predicts with has `without_margin(logits)` for these. An optimizer with
`next_part(parts)` is told when a batch that is split goes on by so many parts; one whose `local_pass` is true does not
need the gradient of all processes.

A head, or a loss term that is a module, with `after_step()` is told of every optimizer step. Among several processes
it runs in each of them, and must leave the same values in all: it may use its parameters, its buffers and the count of
steps, as they are the same everywhere. It may not use what was computed from this process's images, unless
torch.distributed.all_reduce has made it that of all, nor random numbers, files or the clock. The same holds for
buffers that `forward` changes.

A loss term's weight is a flag of its own, --NAME-coef; --coef is short for it. `args.given` is the set of flags that
the command line set; a ValueError from any of these functions ends the run with its sentence.
"""
import argparse
import copy
import functools
import importlib
import inspect
import math

import torch
from torch import nn

from utils import after_steps, checkpoint, memory, strength
from utils.activations import Activations
from utils.criterion import Criterion
from utils.errors import UserError, one_line
from utils.flags import meaning
from utils.parts import single_image_explained
from utils.schedule import OPTIMIZERS, made_with

# A method of your own is one more line here, the name of its file.
METHODS = {name.rpartition('.')[2]: importlib.import_module(name) for name in (
    'dma',
    'lsoftmax',
    'amp',
    'smoothout',
    'large_margin',
) + (
    'baselines.sam',
    'baselines.arcface',
    'baselines.ldam',
    'baselines.logit_adjustment',
    'baselines.hinge',
)}


def add_arguments(parser):
    """--method, --coef, and a group of flags for each method."""
    group = parser.add_argument_group('method')
    group.add_argument('--method', nargs='+', choices=METHODS, default=[], metavar='NAME',
                       help=f'one or several of: {", ".join(METHODS)} (none: cross-entropy)')
    group.add_argument('--coef', type=float, metavar='C', help="weight of the method's loss term")
    strength.add_arguments(group)
    owners = {}
    for name, module in METHODS.items():
        if hasattr(module, 'add_arguments'):
            module.add_arguments(_Flags(name, parser, owners))


class _Flags:
    """What the method `name` adds its flags to: a group of `parser`.

    Methods may share a flag that means the same in each of them, with one type and default; it is added once. owners:
    the flags of the methods so far, name -> (its method, its options). Any other flag that is there already, and one
    that every command would need, end the script with a sentence.
    """

    def __init__(self, name, parser, owners):
        self.name, self.parser, self.owners = name, parser, owners
        self.group = parser.add_argument_group(f'--method {name}')

    def add_argument(self, *words, **options):
        flag = max(words, key=len)
        name = options.get('dest') or flag.lstrip('-').replace('-', '_')
        if options.get('required'):
            self.parser.error(f'{flag} of --method {self.name} is required, also of runs without it; give it a default')
        if name not in self.parser.names() and not {*words} & {*self.parser._option_string_actions}:
            self.owners[name] = self.name, options
            return self.group.add_argument(*words, **options)
        owner, first = self.owners.get(name, (None, {}))
        if not owner or any(first.get(key) != options.get(key) for key in ('action', 'type', 'default', 'choices')):
            whose = f'of --method {owner}, with another meaning' if owner else 'of the script'
            self.parser.error(f'{flag} of --method {self.name} is a flag {whose}; give it another name')


def check_arguments(args, parser):
    """Refuse what cannot combine and flags of methods that are not selected; give --coef to the term that it means."""
    for name in args.method:
        if args.method.count(name) > 1:
            parser.error(f'--method names {name} twice; once is enough')
    for part, why in (('head', 'a network has one'), ('optimizer', 'a step has one')):
        having = [name for name in args.method if hasattr(METHODS[name], part)]
        if len(having) > 1:
            parser.error(f'--method {" and ".join(having)} cannot combine: each brings its own {part}, and {why}')
    strength.check_arguments(args, parser)
    for name in args.method if args.method_start or args.method_ramp else ():
        if hasattr(METHODS[name], 'optimizer') and not hasattr(METHODS[name], 'STRENGTH'):
            parser.error(f'--method-start and --method-ramp cannot scale --method {name}, which does not say which '
                         'option of its optimizer is its STRENGTH')
    used = set().union(*(flags(METHODS[name]) for name in args.method))
    for name, module in METHODS.items():
        unused = sorted((flags(module) - used) & args.given)
        if unused and name not in args.method:
            names = ' or '.join(other for other in METHODS if unused[0] in flags(METHODS[other]))
            parser.error(f'{parser.spelling(unused[0])} is a flag of --method {names}, which is not selected')
        if name in args.method and args.compile and hasattr(module, 'layers'):
            parser.error(f'--method {name} and --compile cannot combine: it needs gradients at layers inside of what '
                         'is compiled')
        first_values = _answer(name, 'first_values', args, set()) if args.resume else set()
        for flag in sorted(first_values & args.given):
            parser.error(f'{parser.spelling(flag)} is where a new run begins; a resumed run has the value of its '
                         'checkpoint')
    mixing = [flag for flag in ('mixup', 'cutmix') if getattr(args, flag, 0)]
    for name in args.method if mixing else ():
        if getattr(METHODS[name], 'CLASS_TARGETS', False):
            parser.error(f'--method {name} and --{mixing[0]} cannot combine: it needs one class for each image, and a '
                         'mixed image has two')
    weighted = [name for name in args.method if hasattr(args, f'{name}_coef')]
    if 'coef' in args.given:
        if len(weighted) != 1:
            why = (f'{" and ".join(weighted)} each do; use {" and ".join(map(_coef_flag, weighted))}' if weighted
                   else f'--method {" ".join(args.method) or "(none)"} has none')
            parser.error(f'--coef weighs the loss term of the one selected method that has one, but {why}')
        if f'{weighted[0]}_coef' in args.given:
            parser.error(f'--coef and {_coef_flag(weighted[0])} are the same weight; use one of them')
        spell_out_coef(args, args.method)
    numbers = [_answer(name, 'strength', args, getattr(args, getattr(METHODS[name], 'STRENGTH', f'{name}_coef'), None))
               for name in args.method]
    if args.given & {'method_start', 'method_ramp'} and numbers and all(number == 0 for number in numbers):
        parser.error('--method-start and --method-ramp scale a strength that is 0 here')
    for name in weighted:
        if not 0 <= getattr(args, f'{name}_coef') < math.inf:
            parser.error(f'{_coef_flag(name)} must be a number of at least 0, was given '
                         f'{getattr(args, f"{name}_coef")}')


def spell_out_coef(args, chosen):
    """Put a given --coef under the name of the weight that it is short for, if the methods `chosen` have one such."""
    weights = [f'{name}_coef' for name in chosen if hasattr(args, f'{name}_coef')]
    if 'coef' in args.given and len(weights) == 1 and weights[0] not in args.given:
        setattr(args, weights[0], args.coef)
        args.given = args.given - {'coef'} | {weights[0]}


def by_position(args, part=None):
    """Whether what the chosen methods do at a step, or those that have `part`, depends on the share of the training
    that is behind it.
    """
    return any(args.method_start or args.method_ramp or _answer(name, 'begins', args)
               or _answer(name, 'by_position', args)
               for name in args.method if part is None or hasattr(METHODS[name], part))


def _coef_flag(name):
    return f'--{name.replace("_", "-")}-coef'


def begins(args):
    """{flag: the share of the training after which what it says begins} of the chosen methods."""
    of_each = [_answer(name, 'begins', args, {}) for name in args.method]
    return {flag: share for own in of_each for flag, share in own.items()}


def _answer(name, part, args, default=None):
    """What the function `part` of a method says of the flags, if it has one; UserError for its ValueError."""
    try:
        return getattr(METHODS[name], part)(args) if hasattr(METHODS[name], part) else default
    except ValueError as error:
        raise UserError(str(error)) from error


def flags(module):
    """The names, in `args`, of the flags that a method's module adds."""
    return _added_by(module.add_arguments) if hasattr(module, 'add_arguments') else frozenset()


@functools.cache  # compare.py asks for each of its runs
def _added_by(add_arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return frozenset(vars(parser.parse_args([])))


def setting(values):
    """The flags, name -> value, among `values` that decide the result of training: not those of other methods, nor
    what a run is called or shows.
    """
    chosen = sorted(values['method'], key=lambda name: (*METHODS, name).index(name))  # `amp dma` is `dma amp`
    used = set().union(*(flags(METHODS[name]) for name in chosen if name in METHODS))
    unused = set().union(*map(flags, METHODS.values())) - used
    unused |= set() if chosen else {'method_start', 'method_ramp'}
    return {name: value for name, value in {**values, 'method': chosen}.items()
            if meaning(name).result and name not in unused}


def _call(function, *arguments):
    """A part of a method takes the first arguments, as many as it names."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return function(*(arguments if inspect.Parameter.VAR_POSITIONAL in kinds else arguments[:len(kinds)]))


def _chosen(args, part, *context):
    modules = (METHODS[name] for name in args.method)
    return [_call(getattr(module, part), args, *context) for module in modules if hasattr(module, part)]


def build_head(args):
    """The classifier that models are built with."""
    return (_chosen(args, 'head') or [nn.Linear])[0]


def check_head(args, head):
    """ValueError if --method-start or --method-ramp should scale a method that is a head alone, and not told of it."""
    for name in args.method if args.method_start or args.method_ramp else ():
        alone = hasattr(METHODS[name], 'head') and not hasattr(METHODS[name], 'loss_term')
        if alone and not any(hasattr(module, 'before_step') for module in head.modules()):
            raise ValueError(f'--method-start and --method-ramp cannot scale --method {name}, whose head has no '
                             'before_step, which is told the strength')


def attach_loss_terms(args, model):
    """Make the chosen loss terms that are modules part of `model`, as model.loss_terms; returns the model.

    To be called where the model is built, before its weights are loaded and its optimizer is made. UserError for a
    ValueError of a loss term.
    """
    try:
        terms = {name: term for name in args.method if not _needs_class_counts(name)
                 and isinstance(term := _loss_term(args, name, model), nn.Module)}
    except ValueError as error:
        raise UserError(str(error)) from error
    if terms:
        model.loss_terms = nn.ModuleDict(terms)
    return model


def detach_loss_terms(model):
    """Take them off again, for those who look at the network alone."""
    if hasattr(model, 'loss_terms'):
        del model.loss_terms


def _needs_class_counts(name):
    part = getattr(METHODS[name], 'loss_term', None)
    return part is not None and 'class_counts' in inspect.signature(part).parameters


def _loss_term(args, name, model, class_counts=None):
    part = getattr(METHODS[name], 'loss_term', None)
    if not _needs_class_counts(name):
        return _call(part, args, model) if part else None
    before = list(inspect.signature(part).parameters).index('class_counts')
    try:
        return part(*(args, model)[:before], class_counts)
    except ValueError as error:  # perhaps of a class without training images
        raise UserError(f'--method {name}: {error}') from error


def build_criterion(args, model, class_counts=None):
    """(outputs, targets) -> scalar: cross-entropy, unless a method does without, plus the chosen methods' terms.

    class_counts: how many training images each class has, a list, for methods that need it. Where the network has
    auxiliary classifiers, their weighted cross-entropies are added, whatever the method. ValueError if a method asks
    for layers that `model` does not have.
    """
    weights = {name: _call(METHODS[name].cross_entropy_weight, args) for name in args.method
               if hasattr(METHODS[name], 'cross_entropy_weight')}
    weight = math.prod(weights.values())
    without = [name for name in weights if not weights[name] and 'cross_entropy_weight' not in flags(METHODS[name])]
    if without and 'cross_entropy_weight' in args.given and args.cross_entropy_weight:
        raise ValueError(f'--cross-entropy-weight {args.cross_entropy_weight:g} does nothing with --method '
                         f'{without[0]}, which is trained on instead of the cross-entropy')
    if args.label_smoothing and not weight and not (args.method_start or args.method_ramp):  # which begin with it
        hint = '' if without else '; give it a --cross-entropy-weight'
        raise ValueError(f'--label-smoothing does nothing without cross-entropy, which --method '
                         f'{" ".join(args.method)} does without{hint}')
    attached, terms = getattr(model, 'loss_terms', {}), []
    for name in args.method:
        term = attached[name] if name in attached else _loss_term(args, name, model, class_counts)
        if isinstance(term, nn.Module) and name not in attached:
            raise ValueError(f'the loss term of --method {name} is a module, which cannot have class_counts, as the '
                             'network is built before the data are read')
        if term is not None:
            layers = _call(METHODS[name].layers, args) if hasattr(METHODS[name], 'layers') else None
            terms.append((term, Activations(model, layers) if layers else None))
    return Criterion(terms, weight, args.label_smoothing)


def scaled_options(args):
    """The options of the optimizer's parameter groups that the strength of the chosen methods scales."""
    return {METHODS[name].STRENGTH for name in args.method if hasattr(METHODS[name], 'STRENGTH')}


def check_optimizer(args, optimizer):
    """UserError if a chosen method is an optimizer, and `optimizer`, of the script, is neither that nor wraps it."""
    for name in args.method:
        option = getattr(METHODS[name], 'STRENGTH', None)
        if hasattr(METHODS[name], 'optimizer') and option and not any(option in g for g in optimizer.param_groups):
            raise UserError(f'--method {name} is an optimizer, and the script trains with {type(optimizer).__name__} '
                            f'instead, which has no option {option}; put yours inside of it (base_optimizer), or leave '
                            f'out --method {name}')


def own_options(args, model, optimizer):
    """Words for the options of an `optimizer` that the script made itself, as far as the flags would make others; none
    where the flags make the same.
    """
    made = build_optimizer(args, model, 1)
    own, of_flags = ([made_with(group) for group in each.param_groups] for each in (optimizer, made))
    alike = type(made) is type(optimizer) and checkpoint.class_name(made) == checkpoint.class_name(optimizer)
    if not alike or len(own) != len(of_flags):
        of_flags = [{}] * len(own)
    differing = [', '.join(f'{name} {value}' for name, value in mine.items()
                           if _is_told(name, value) and (value or None) != (theirs.get(name) or None))
                 for mine, theirs in zip(own, of_flags)]
    return '; '.join(differing) if any(differing) else ''


def _is_told(name, value):
    """Whether an option of an optimizer is a number or a word, or some of these, or none."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return name not in ('initial_lr', 'param_names') and all(
        each is None or isinstance(each, (bool, int, float, str)) for each in values)


def default_lr(args):
    """The learning rate that a chosen method brings for its optimizer, or None."""
    return next((rate for name in args.method if (rate := getattr(METHODS[name], 'DEFAULT_LR', None)) is not None),
                None)


def build_optimizer(args, model, steps_per_epoch, parameters=None):
    """The optimizer of --optimizer, alone or inside of what the chosen method wraps around it.

    parameters: by default those of `model`, in the groups that the methods ask for. ValueError if the regime of the
    model sets an option that the optimizer does not have.
    """
    base = OPTIMIZERS[args.optimizer].func
    options = {**args.regime[0], 'nesterov': True} if args.nesterov else args.regime[0]
    for name in sorted(set().union(*args.regime.values()) - set(inspect.signature(base).parameters)):
        raise ValueError(f'the regime of --arch {args.arch} sets {name}, which {args.optimizer} does not have')
    wrapping = _chosen(args, 'optimizer', model, steps_per_epoch)
    make = (wrapping or [base])[0]
    if wrapping and base is not torch.optim.SGD:
        taken = inspect.signature(make).parameters
        if 'base_optimizer' not in taken and not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            raise ValueError(f'the optimizer of --method {" ".join(args.method)} has no base_optimizer, so it cannot '
                             f'have --optimizer {args.optimizer} inside of it; leave out one of the two')
        options = {**options, 'base_optimizer': base}
    optimizer = make(parameter_groups(args, model) if parameters is None else parameters, **options)
    after_steps.tell(optimizer, model.modules(), f'--method {" ".join(args.method)}')
    return optimizer


def parameter_groups(args, model):
    """The parameters of `model`, in one group, except those to which a method, or --bias-lr-factor, gives options of
    their own. ValueError if the model has no BatchNorm that this flag is about.
    """
    groups = [group for groups in _chosen(args, 'parameter_groups', model) for group in groups]
    if args.bias_lr_factor != 1:
        groups.append(batch_norm_biases(args, model))
    if not groups:
        return model.parameters()
    separate = {id(p) for group in groups for p in group['params']}
    return [{'params': [p for p in model.parameters() if id(p) not in separate]}, *groups]


def batch_norm_biases(args, model):
    """The parameter group of --bias-lr-factor: the rate times the factor, and the weight decay divided by it, as
    cifar10-airbench has it (Jordan, arXiv 2404.00498): SGD subtracts rate * weight decay * bias, which stays the same.
    """
    kinds, factor = torch.nn.modules.batchnorm._BatchNorm, args.bias_lr_factor
    biases = [module.bias for module in model.modules() if isinstance(module, kinds) and module.bias is not None]
    if not biases:
        raise ValueError(f'--bias-lr-factor {factor:g} is for the biases of BatchNorm, and --arch {args.arch} has none')
    decay = {} if args.weight_decay is None else {'weight_decay': args.weight_decay / factor}
    return {'params': biases, 'lr': args.lr * factor, **decay}


def rehearse(args, model, size, images=2, training_images=0, device='cpu'):
    """Pass `images` blank images of `size` pixels a side through a copy: what cannot work is refused before data is
    read.

    images: 1 if an epoch of training_images images ends with a part of one image, see parts.smallest_part. device: in
    whose memory a whole batch must fit.
    """
    model = copy.deepcopy(model).cpu().train()
    inputs, targets = torch.zeros(images, 3, size, size), torch.zeros(images, dtype=torch.long)
    try:
        with torch.random.fork_rng(devices=[]), single_image_explained(args, training_images):
            parameter_groups(args, model)  # which refuses flags that this model has no use for
            check_head(args, model.head)
            criterion = build_criterion(args, model, [1] * model.num_classes)
            kept = memory.Kept(model, images)
            with kept.hooks:
                criterion(model(inputs, targets), targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--arch {args.arch} cannot take images of {size} pixels ({one_line(error)[:200]}); '
                        'give another --image-size') from error
    if not args.evaluate:
        memory.check_pass(args, kept.bytes, images, device)
