"""Adversarial Model Perturbation: step from the gradient at the worst nearby weights.

Zheng, Zhang and Mao, "Regularizing Neural Networks via Adversarial Model Perturbation", CVPR 2021 (arXiv 2010.04925).

    L_AMP(theta) = max over |delta| <= epsilon of L(theta + delta)

    delta = 0
    inner_iter times:  delta <- delta + inner_lr * gradient at theta + delta,  shortened to epsilon where it is longer
    theta <- base optimizer's step at theta, with the gradient at theta + delta                        (algorithm 1)

By default each parameter tensor has a ball of its own, as in the original code; perturbation='global' is the equation as
it stands.

Use in a loop of your own:

    optimizer = AMP(model.parameters(), lr=0.1, epsilon=0.5, momentum=0.9)     # momentum: an option of SGD
    def closure():
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        loss.backward()
        return outputs, loss
    outputs, loss = optimizer.step(closure)
"""
import functools
import math

import torch


class AMP(torch.optim.Optimizer):
    """Wraps `base_optimizer`, any torch.optim class, whose options are passed on; SGD by default.

    epsilon: radius of the ball, at least 0. inner_lr: step size in it. inner_iter: steps in it; 0 is the base optimizer.
    perturbation: 'tensor', one ball for each parameter tensor as in the original code, or 'global', one for all of them.
    buffers: tensors that only the first pass may change, such as model.buffers() of a model that is on its device:
    BatchNorm's statistics then are those of the weights that are kept. Without it every pass changes them, as in the
    original code.
    local: among several processes of torch.distributed, each climbs along the gradient of its own part of the batch, which
    saves averaging these; only the last gradient is that of all. `local_pass` tells the closure when it need not average.

    Raises ValueError for an option out of range. All but `perturbation`, `buffers` and `local` can be set per parameter group.
    Groups and state are those of the base optimizer, so schedulers and state_dict work as on it. The parameters are on
    one device, their gradients dense.
    """

    def __init__(self, params, lr, epsilon, inner_lr=1.0, inner_iter=1, perturbation='tensor', buffers=(), local=False,
                 base_optimizer=torch.optim.SGD, **options):
        if perturbation not in ('tensor', 'global'):
            raise ValueError(f"perturbation must be 'tensor' or 'global', was given {perturbation!r}")
        super().__init__(params, {'lr': lr, 'epsilon': epsilon, 'inner_lr': inner_lr, 'inner_iter': inner_iter})
        for group in self.param_groups:
            for name in ('epsilon', 'inner_lr'):
                if not 0 <= group[name] < math.inf:
                    raise ValueError(f'{name} must be a number of at least 0, was given {group[name]}')
            if not isinstance(group['inner_iter'], int) or group['inner_iter'] < 0:
                raise ValueError(f'inner_iter must be a whole number of at least 0, was given {group["inner_iter"]}')
        self.base_optimizer = base_optimizer(self.param_groups, lr=lr, **options)
        self.defaults.update(self.base_optimizer.defaults)
        self.perturbation, self.local, self.local_pass = perturbation, local, False
        by_dtype = {}  # as one launch handles one dtype
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self.buffers = list(by_dtype.values())
        self._share()

    def _share(self):
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def load_state_dict(self, state_dict):
        self.base_optimizer.load_state_dict(state_dict)
        self._share()
        for group in self.param_groups:  # of the base optimizer alone, perhaps
            group.update({**self.defaults, **group})

    def __getstate__(self):
        return {**super().__getstate__(), 'base_optimizer': self.base_optimizer, 'perturbation': self.perturbation,
                'buffers': self.buffers, 'local': self.local, 'local_pass': False}

    @torch.no_grad()
    def step(self, closure):
        """One step; returns what the first call of `closure` returned, which is the pass at the weights themselves.

        closure() clears the gradients, computes the loss, calls backward and returns what it likes. It is called
        1 + inner_iter times. If it raises, the weights stay as they were. So they do if the length of a gradient is infinite
        or NaN, unless inner_iter is 0; the base optimizer's state then is as after a gradient of 0. A parameter without
        a gradient in one of the passes takes no part in the step.
        """
        closure = torch.enable_grad()(closure)
        passes = max(group['inner_iter'] for group in self.param_groups)
        self.local_pass = self.local and passes > 0
        result = closure()
        taking_part = self._with_gradient()
        if passes == 0 or not taking_part:
            self.base_optimizer.step()
            return result

        groups = [(group, params) for group in self.param_groups if (params := [p for p in group['params'] if p in taking_part])]
        weights = [p for _, params in groups for p in params]
        saved, saved_buffers = copies(weights), [copies(tensors) for tensors in self.buffers]
        deltas, finite = None, True
        try:
            for number in range(passes):
                deltas, lengths = self._climb(groups, deltas, number)
                finite = self._everywhere(lengths.isfinite().all() & finite)
                torch._foreach_copy_(weights, saved)
                torch._foreach_add_(weights, zero_unless(finite, [delta for group in deltas for delta in group]))
                self.local_pass = self.local and number < passes - 1
                closure()
                taking_part &= self._with_gradient()
        finally:
            self.local_pass = False
            torch._foreach_copy_(weights, saved)
            for tensors, values in zip(self.buffers, saved_buffers):
                torch._foreach_copy_(tensors, values)

        for p in self._with_gradient() - taking_part:
            p.grad = None
        if taking_part:
            gradients = [p.grad for p in taking_part]
            finite &= torch.stack(torch._foreach_norm(gradients)).isfinite().all()
            zero_unless(finite, gradients)
        self.base_optimizer.step()
        # Momentum and weight decay move the weights even without a gradient. Here too nothing waits for the device.
        torch._foreach_mul_(weights, finite.to(weights[0].dtype))
        torch._foreach_add_(weights, torch._foreach_mul(saved, (~finite).to(weights[0].dtype)))
        return result

    def _everywhere(self, finite):
        """What decides whether there is a step must be the same in all processes, also where their gradients are not."""
        if self.local and torch.distributed.is_available() and torch.distributed.is_initialized():
            finite = finite.int()
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return finite.bool()

    def _with_gradient(self):
        return {p for group in self.param_groups for p in group['params'] if p.grad is not None}

    def _climb(self, groups, deltas, number):
        """One inner step: each group's perturbations, and the lengths (tensors,) that they had before they were shortened."""
        rates = [group['inner_lr'] if number < group['inner_iter'] else 0.0 for group, _ in groups]
        if deltas is None:
            deltas = [torch._foreach_mul([p.grad for p in params], rate) for (_, params), rate in zip(groups, rates)]
        else:
            for (_, params), delta, rate in zip(groups, deltas, rates):
                torch._foreach_add_(delta, [p.grad if p.grad is not None else torch.zeros_like(p) for p in params], alpha=rate)
        lengths = [torch.stack(torch._foreach_norm(delta)) for delta in deltas]
        whole = torch.linalg.vector_norm(torch.cat(lengths))
        for (group, _), delta, length in zip(groups, deltas, lengths):
            factor = (group['epsilon'] / ((whole if self.perturbation == 'global' else length) + 1e-12)).clamp(max=1)
            torch._foreach_mul_(delta, factor if self.perturbation == 'global' else factor.unbind())
        return deltas, torch.cat(lengths)


def copies(tensors):
    return torch._foreach_mul(tensors, 1)  # one launch for all of them


def zero_unless(finite, tensors):
    """Set all of `tensors` to 0 in place if the 0-d bool tensor `finite` is false, without waiting to know it; returns them."""
    # NaN * 0 is NaN, but the bits of a NaN times 0 are those of 0.
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for size in {tensor.element_size() for tensor in tensors}:
        bits = [tensor.view(whole_numbers[size]) for tensor in tensors if tensor.element_size() == size]
        torch._foreach_mul_(bits, finite.to(whole_numbers[size]))
    return tensors


def add_arguments(parser):
    parser.add_argument('--epsilon', type=float, default=0.5, metavar='E', help='radius of the ball of perturbations (0.5)')
    parser.add_argument('--inner-lr', type=float, default=1.0, metavar='LR', help='step size in the ball (1)')
    parser.add_argument('--inner-iter', type=int, default=1, metavar='N', help='steps in the ball; 0 is plain SGD (1)')
    parser.add_argument('--perturbation', choices=('tensor', 'global'), default='tensor',
                        help='a ball for each parameter tensor, or one for all (tensor)')
    parser.add_argument('--perturbed-statistics', action='store_true',
                        help='BatchNorm statistics also from the perturbed passes, as the original code')
    parser.add_argument('--local-perturbation', action='store_true',
                        help='of several processes each climbs along the gradient of its own images, which saves averaging it')


def optimizer(args, model, steps_per_epoch):
    """`args`, the model, optimizer steps per epoch -> (params, lr, **options) -> optimizer."""
    unused = {'epsilon', 'inner_lr', 'perturbation', 'perturbed_statistics', 'local_perturbation'} & args.given
    if 'local_perturbation' in args.given and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError('--local-perturbation is for several processes, and torchrun did not start this one')
    if args.inner_iter == 0 and unused:
        raise ValueError(f'--{sorted(unused)[0].replace("_", "-")} does nothing with --inner-iter 0, which is plain SGD')
    return functools.partial(AMP, epsilon=args.epsilon, inner_lr=args.inner_lr, inner_iter=args.inner_iter,
                             perturbation=args.perturbation, buffers=() if args.perturbed_statistics else model.buffers(),
                             local=args.local_perturbation)


if __name__ == '__main__':
    # f(w) = min(50 w^2, (w - 2)^2 + 0.1) has a sharp minimum at 0 and a flat, higher one at 2; look from beside each
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
        print(f'at {start}: loss {losses[0]:.3f}, and on the way to the worst within 0.1:', [round(loss, 3) for loss in losses[1:]])
