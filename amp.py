"""Adversarial Model Perturbation: step from the gradient at the worst nearby weights.

Zheng, Zhang and Mao, "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021 (arXiv 2010.04925).

    L_AMP(theta) = max over |delta| <= epsilon of L(theta + delta)

    delta = 0
    inner_iter times:  delta <- delta + inner_lr * gradient at theta + delta,  shortened to epsilon if it is longer
    theta <- base optimizer's step at theta, with the gradient at theta + delta                        (algorithm 1)

By default each parameter tensor has its own ball, as in the original code; perturbation='global' is the equation.

In your own loop:

    optimizer = AMP(model.parameters(), lr=0.1, epsilon=0.5, momentum=0.9)     # momentum: an option of SGD
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        return loss
    loss = optimizer.step(closure)                                             # the loss of the first pass, at theta
"""
import contextlib
import functools
import inspect
import math

import torch


class AMP(torch.optim.Optimizer):
    """Wraps `base_optimizer`, a torch.optim class that steps without a closure, which gets `options`; SGD by default.

    epsilon: radius of the ball, at least 0. inner_lr: step size in the ball. inner_iter: number of steps in the ball;
    0 is the base optimizer. perturbation: 'tensor', a ball for each parameter tensor, or 'global', one ball for all.
    buffers: tensors that only the first pass may change, such as model.buffers() of a model that is already on its
    device: BatchNorm's statistics are then the statistics at theta. By default every pass changes them, as in the
    original code.
    local: each process of torch.distributed climbs along the gradient of its local batch, which saves averaging it;
    only the last gradient is averaged. `local_pass` tells the closure when it need not average.
    climb_fraction: above 0 and at most 1, the share of each batch, its first images, along whose gradient it climbs.
    `pass_fraction` tells the closure the share that the pass is over.

    Raises ValueError for an option out of range, for maximize, and for a base optimizer whose step needs a closure,
    such as LBFGS, or that has an option of the same name, as SAM's rho is in Adadelta.
    epsilon, inner_lr and inner_iter can be set per parameter group. Parameter groups and state are the base
    optimizer's, so schedulers and state_dict work as usual. All parameters are on one device, and their gradients are
    dense.
    """

    def __init__(self, params, lr, epsilon, inner_lr=1.0, inner_iter=1, perturbation='tensor', buffers=(), local=False,
                 climb_fraction=1.0, base_optimizer=torch.optim.SGD, **options):
        if perturbation not in ('tensor', 'global'):
            raise ValueError(f"perturbation must be 'tensor' or 'global', was given {perturbation!r}")
        self.perturbation = perturbation
        self._wrap(base_optimizer, options, params, buffers, local, climb_fraction,
                   {'lr': lr, 'epsilon': epsilon, 'inner_lr': inner_lr, 'inner_iter': inner_iter})
        for group in self.param_groups:
            for name in ('epsilon', 'inner_lr'):
                if not 0 <= group[name] < math.inf:
                    raise ValueError(f'{name} must be a number of at least 0, was given {group[name]}')
            if not isinstance(group['inner_iter'], int) or group['inner_iter'] < 0:
                raise ValueError(f'inner_iter must be a whole number of at least 0, was given {group["inner_iter"]}')

    def _wrap(self, base_optimizer, options, params, buffers, local, climb_fraction, defaults):
        """defaults: the options of parameter groups that do not set them."""
        check_base_optimizer(type(self).__name__, base_optimizer, defaults.keys())
        if not 0 < climb_fraction <= 1:
            raise ValueError(f'climb_fraction must be a number above 0 and at most 1, was given {climb_fraction}')
        super().__init__(params, defaults)
        self.base_optimizer = base_optimizer(self.param_groups, lr=defaults['lr'], **options)
        if any(group.get('maximize') for group in self.param_groups):
            raise ValueError(f'{type(self).__name__} climbs to a higher loss, so maximize has no meaning in it; give '
                             'the closure the negated loss')
        self.defaults.update(self.base_optimizer.defaults)
        self.local, self.local_pass = local, False
        self.climb_fraction, self.pass_fraction = climb_fraction, 1.0
        by_dtype = {}  # because one kernel launch handles one dtype
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self.buffers = list(by_dtype.values())
        self._use_base_groups()

    def _use_base_groups(self):
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def load_state_dict(self, state_dict):
        """Loads a state_dict of AMP, or of the base optimizer alone, which leaves each group its radius and steps."""
        before = self.param_groups
        self.base_optimizer.load_state_dict(state_dict)
        self._use_base_groups()
        for own, group in zip(before, self.param_groups):
            group.update({**own, **group})

    def __getstate__(self):
        own = {name: value for name, value in vars(self).items() if not name.startswith('_')}
        return {**own, **super().__getstate__(), 'local_pass': False, 'pass_fraction': 1.0}

    @torch.no_grad()
    def step(self, closure):
        """Algorithm 1; returns what the first call of `closure` over the whole batch returned: with climb_fraction 1
        the pass at theta, otherwise the last pass.

        closure() clears the gradients, computes the loss, calls backward and returns anything. It is called
        1 + inner_iter times, or once where all radii are 0. If it raises, the weights stay as they were. If the length
        of a gradient is infinite or NaN, and it is called more than once, the weights stay too, and the base
        optimizer's state is as after a gradient of 0. A parameter without a gradient in one of the passes takes no
        part in the step.
        """
        return self._step(torch.enable_grad()(closure))

    def _step(self, closure):  # apart, as torch counts each call of a `step`, also that of a subclass's super().step
        climbs = self._climbs()
        try:
            self._tell_closure(climbing=climbs > 0)
            result = closure()                                              # the gradient at theta
            groups = [(group, [p for p in group['params'] if p.grad is not None]) for group in self.param_groups]
            groups = [(group, params) for group, params in groups if params]
            if climbs == 0 or not groups:
                self.base_optimizer.step()
                return result
            deltas = None
            with self._guarded([p for _, params in groups for p in params]) as (move, back):
                for index in range(climbs):
                    deltas, finite = self._climb(groups, deltas, index)
                    move(deltas, finite)                                    # to theta + delta
                    self._tell_closure(climbing=index < climbs - 1)
                    last_result = closure()                                 # the gradient at theta + delta
                back()                                                      # to theta
                self.base_optimizer.step()
        finally:
            self._tell_closure(climbing=False)
        return result if self.climb_fraction == 1 else last_result

    def _climbs(self):
        """How many passes climb."""
        return max((group['inner_iter'] for group in self.param_groups if group['epsilon'] > 0 < group['inner_lr']),
                   default=0)

    def _tell_closure(self, climbing):
        self.local_pass = self.local and climbing
        self.pass_fraction = self.climb_fraction if climbing else 1.0

    @contextlib.contextmanager
    def _guarded(self, weights):
        """Gives move(deltas, finite), which moves `weights` to theta + delta, and back(), which moves them to theta.

        theta is a copy, so it comes back exactly, as do the buffers, also if an exception is raised. After back() a
        parameter that had no gradient in one of the passes has none. If a gradient is not finite, the perturbation and
        the last gradient become 0, and at the end the weights are theta. Nothing here waits for the device.
        """
        theta, buffers = copies(weights), [copies(tensors) for tensors in self.buffers]
        always_with_gradient, all_finite = set(weights), True

        def restore():
            torch._foreach_copy_(weights, theta)
            for tensors, values in zip(self.buffers, buffers):
                torch._foreach_copy_(tensors, values)

        def move(deltas, finite):
            nonlocal all_finite
            always_with_gradient.intersection_update([p for p in weights if p.grad is not None])
            all_finite = self._in_all_processes(finite & all_finite)
            torch._foreach_copy_(weights, theta)
            torch._foreach_add_(weights, zero_unless(all_finite, [delta for group in deltas for delta in group]))

        def back():
            nonlocal all_finite
            restore()
            for p in (p for group in self.param_groups for p in group['params'] if p not in always_with_gradient):
                p.grad = None
            gradients = [p.grad for p in weights if p.grad is not None]
            if gradients:
                all_finite = all_finite & torch.stack(torch._foreach_norm(gradients)).isfinite().all()
                zero_unless(all_finite, gradients)

        try:
            yield move, back
        except BaseException:
            restore()
            raise
        # Momentum and weight decay move the weights even if the gradient is 0.
        torch._foreach_mul_(weights, all_finite.to(weights[0].dtype))
        torch._foreach_add_(weights, torch._foreach_mul(theta, (~all_finite).to(weights[0].dtype)))

    def _in_all_processes(self, finite):
        """Whether `finite` is true in every process, so that either all of them step or none does."""
        if self.local and torch.distributed.is_available() and torch.distributed.is_initialized():
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return finite.bool()

    def _climb(self, groups, deltas, index):
        """Inner step `index`: each group's list of deltas, and whether their lengths were finite (0-d bool tensor)."""
        rates = [group['inner_lr'] if index < group['inner_iter'] else 0.0 for group, _ in groups]
        if deltas is None:
            deltas = [torch._foreach_mul([p.grad for p in params], rate) for (_, params), rate in zip(groups, rates)]
        else:
            for (_, params), delta, rate in zip(groups, deltas, rates):
                gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
                torch._foreach_add_(delta, gradients, alpha=rate)
        lengths = [torch.stack(torch._foreach_norm(delta)) for delta in deltas]
        all_lengths = torch.cat(lengths)
        if self.perturbation == 'global':
            moved = [length for (group, _), length in zip(groups, lengths) if group['epsilon'] > 0]
            lengths = [torch.linalg.vector_norm(torch.cat(moved or lengths))] * len(groups)
        for (group, _), delta, length in zip(groups, deltas, lengths):
            factor = (group['epsilon'] / (length + 1e-12)).clamp(max=1)
            torch._foreach_mul_(delta, factor.unbind() if factor.dim() else factor)
        return deltas, all_lengths.isfinite().all()


def check_base_optimizer(wrapper, base_optimizer, options=()):
    """ValueError unless `base_optimizer`, a class or a partial of one, steps without a closure, and has none of the
    `options` of its own, other than lr.
    """
    kind = getattr(base_optimizer, 'func', base_optimizer)
    parameters = list(inspect.signature(getattr(kind, 'step', lambda self: None)).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(f'{wrapper} cannot wrap {kind.__name__}, whose step needs a closure; base_optimizer must be a '
                         'class whose step uses the gradients that are there, such as SGD, Adam, AdamW or RMSprop')
    for name in (set(options) - {'lr'}) & inspect.signature(base_optimizer).parameters.keys():
        raise ValueError(f'{wrapper} cannot wrap {kind.__name__}, which has an option {name} too, with another meaning')


def copies(tensors):
    return torch._foreach_mul(tensors, 1)  # one launch for all of them


def zero_unless(finite, tensors):
    """Sets `tensors` to 0 in place if `finite` (0-d bool tensor) is false, without waiting for it; returns them."""
    # NaN * 0 is NaN, but the bits of a NaN, read as a whole number, times 0 are the bits of 0.
    dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size in {tensor.element_size() for tensor in tensors}:
        bits = [tensor.view(dtypes[size]) for tensor in tensors if tensor.element_size() == size]
        torch._foreach_mul_(bits, finite.to(dtypes[size]))
    return tensors


def add_arguments(parser):
    flag = parser.add_argument
    flag('--epsilon', type=float, default=0.5, metavar='E', help='radius of the ball of perturbations (0.5)')
    flag('--inner-lr', type=float, default=1.0, metavar='LR', help='step size in the ball (1)')
    flag('--inner-iter', type=int, default=1, metavar='N', help='number of steps in the ball; 0 is plain SGD (1)')
    flag('--perturbation', choices=('tensor', 'global'), default='tensor',
         help='a ball for each parameter tensor, or one ball for all (tensor)')
    add_climbing_arguments(parser)


def add_climbing_arguments(parser):
    """The flags of every optimizer that climbs before it steps."""
    flag = parser.add_argument
    flag('--perturbed-statistics', action='store_true',
         help='BatchNorm statistics also from the perturbed passes, as in the original code')
    flag('--local-perturbation', action='store_true',
         help='each of several processes climbs along the gradient of its own images, which saves averaging it')
    flag('--climb-fraction', type=float, default=1.0, metavar='F',
         help='climb along the gradient of the first F of each batch, such as 0.25 (1)')


STRENGTH = 'epsilon'


def strength(args):
    """0 where --method-start and --method-ramp have nothing to scale."""
    return args.inner_iter and args.inner_lr and args.epsilon


def optimizer(args, model, steps_per_epoch):
    """`args`, the model, optimizer steps per epoch -> (params, lr, **options) -> optimizer."""
    unused = {'epsilon', 'inner_lr', 'inner_iter', 'perturbation', 'perturbed_statistics', 'local_perturbation',
              'climb_fraction'} & args.given
    off = next((name for name in ('inner_iter', 'inner_lr') if getattr(args, name) == 0), 'epsilon')
    if getattr(args, off) == 0 and unused - {off}:
        flag, cause = (f'--{name.replace("_", "-")}' for name in (min(unused - {off}), off))
        raise ValueError(f'{flag} does nothing with {cause} 0, which is plain SGD')
    furthest = args.inner_iter * args.inner_lr * (args.clip_norm or math.inf)
    if 0 < furthest <= args.epsilon:
        raise ValueError(f'--epsilon {args.epsilon:g} is never reached, as --clip-norm {args.clip_norm:g} shortens the '
                         f'gradient that AMP climbs along too, to at most {furthest:g} in all; give a larger '
                         '--clip-norm or --inner-lr, or a smaller --epsilon')
    return functools.partial(AMP, epsilon=args.epsilon, inner_lr=args.inner_lr, inner_iter=args.inner_iter,
                             perturbation=args.perturbation, **climbing_options(args, model))


def climbing_options(args, model):
    """The options that the flags of `add_climbing_arguments` give."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if 'local_perturbation' in args.given and not distributed:
        raise ValueError('--local-perturbation needs several processes, but torchrun did not start this one')
    if args.perturbed_statistics and not any('running_mean' in name for name, _ in model.named_buffers()):
        raise ValueError('--perturbed-statistics does nothing in a network without BatchNorm')
    return {'local': args.local_perturbation, 'climb_fraction': args.climb_fraction,
            'buffers': () if args.perturbed_statistics else model.buffers()}


if __name__ == '__main__':
    # f(w) = min(50 w^2, (w - 2)^2 + 0.1) has a sharp minimum at 0 and a flat, higher one at 2. Look from near each.
    for start in (0.01, 2.01):
        w = torch.nn.Parameter(torch.tensor([start]))
        example, losses = AMP([w], lr=0.0, epsilon=0.1, inner_iter=3), []

        def closure():
            example.zero_grad()
            loss = torch.minimum(50 * w ** 2, (w - 2) ** 2 + 0.1).sum()
            loss.backward()
            losses.append(loss.item())
            return loss

        example.step(closure)
        losses = [round(loss, 3) for loss in losses]
        print(f'at {start}: loss {losses[0]:.3f}, and on the way to the worst within 0.1:', losses[1:])
