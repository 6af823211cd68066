"""Sharpness-Aware Minimization: step from the gradient at the worst weights at distance rho.

SAM: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization"
(arXiv 2010.01412). ASAM: Kwon, Kim, Park and Choi (arXiv 2102.11600). Momentum-SAM: Becker, Altrock and Risse
(arXiv 2401.12033).

    g     = gradient at theta
    delta = rho g / |g|                      SAM; |.| is one norm over all parameters
            rho t^2 g / |t g|                adaptive=True, with t = |theta| + eta, elementwise
            -rho v / |v|                     direction='momentum', with v the momentum of the base optimizer, 0 at first
    theta <- base optimizer's step at theta, with the gradient at theta + delta

Momentum-SAM looks ahead along the coming step, and needs one pass instead of two.

In your own loop:

    optimizer = SAM(model.parameters(), lr=0.1, rho=0.05, momentum=0.9)        # momentum: an option of SGD
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        return loss
    loss = optimizer.step(closure)
"""
import functools
import math

import torch

from amp import AMP, add_climbing_arguments, climbing_options, copies


class SAM(AMP):
    """Wraps `base_optimizer`, a torch.optim class that steps without a closure, which gets `options`; SGD by default.

    rho: at least 0, of direction 'momentum' any number, as below 0 it looks back. adaptive: scale by the weights, with
    eta, at least 0, added to them; parameters in `unscaled` keep t = 1. ASAM's authors have eta 0.01 and leave out all
    parameters whose name does not contain "weight"; others, such as davda54/sam, have eta 0 and scale all.
    direction: 'gradient', with two passes, or 'momentum', with one. buffers, local, climb_fraction: as in AMP; not of
    direction 'momentum', whose one pass is over the whole batch, at theta + delta.

    After `step` the weights are theta's successors, never perturbed. With direction 'momentum' weight decay as SGD has
    it is taken at theta + delta, as in the authors' code; other base optimizers take it at theta.
    rho can be set per parameter group. Raises ValueError for an option out of range, and for a base optimizer whose
    step needs a closure, or that has no momentum where the direction is along it.
    """

    def __init__(self, params, lr, rho=0.05, adaptive=False, direction='gradient', base_optimizer=torch.optim.SGD,
                 eta=0.0, unscaled=(), buffers=(), local=False, climb_fraction=1.0, **options):
        if direction not in ('gradient', 'momentum'):
            raise ValueError(f"direction must be 'gradient' or 'momentum', was given {direction!r}")
        if direction == 'momentum' and (adaptive or local or climb_fraction != 1):
            name = 'adaptive' if adaptive else 'local' if local else 'climb_fraction'
            raise ValueError(f"{name} is for direction 'gradient'; with 'momentum' no gradient is needed to climb")
        if not 0 <= eta < math.inf:
            raise ValueError(f'eta must be a number of at least 0, was given {eta}')
        self._wrap(base_optimizer, options, params, buffers, local, climb_fraction, {'lr': lr, 'rho': rho})
        for group in self.param_groups:
            lowest = -math.inf if direction == 'momentum' else 0
            if not lowest <= group['rho'] < math.inf or group['rho'] == -math.inf:
                raise ValueError(f'rho must be a number{" of at least 0" * (lowest == 0)}, was given {group["rho"]}')
            if direction == 'momentum' and not (group.get('momentum') or 'betas' in group):
                raise ValueError("direction 'momentum' needs a base optimizer with momentum, such as SGD with a "
                                 'momentum above 0, or Adam')
        self.adaptive, self.direction, self.eta, self.unscaled = adaptive, direction, eta, set(unscaled)

    @torch.no_grad()
    def step(self, closure):
        """Returns what `closure` returned, of direction 'gradient' as in AMP.

        closure() clears the gradients, computes the loss, calls backward and returns anything. If it raises, the
        weights stay as they were.
        """
        return self._step(torch.enable_grad()(closure))

    def _step(self, closure):
        return self._step_ahead(closure) if self.direction == 'momentum' else super()._step(closure)

    def _climbs(self):
        return int(any(group['rho'] > 0 for group in self.param_groups))

    def _climb(self, groups, deltas, index):
        scaled = [[self._scale(p) * p.grad if self._scales(p) else p.grad for p in params] for _, params in groups]
        lengths = [torch.stack(torch._foreach_norm(each)) for each in scaled]
        moved = [norms for (group, _), norms in zip(groups, lengths) if group['rho'] > 0]
        length = torch.linalg.vector_norm(torch.cat(moved or lengths))
        deltas = [torch._foreach_mul([self._scale(p) * t_g if self._scales(p) else t_g
                                      for p, t_g in zip(params, each)], group['rho'] / (length + 1e-12))
                  for (group, params), each in zip(groups, scaled)]
        return deltas, torch.cat([*lengths, length[None]]).isfinite().all()

    def _scales(self, p):
        return self.adaptive and p not in self.unscaled

    def _scale(self, p):
        return p.abs() + self.eta

    def _step_ahead(self, closure):
        ahead = [(group, p, v) for group in self.param_groups if group['rho'] != 0 for p in group['params']
                 if p.requires_grad and (v := momentum_of(self.state.get(p, {}))) is not None]
        weights = [p for _, p, _ in ahead]
        theta = copies(weights) if ahead else []
        try:
            if ahead:
                length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([v for _, _, v in ahead])))
                deltas = torch._foreach_mul([-group['rho'] * v for group, _, v in ahead], 1 / (length + 1e-12))
                torch._foreach_add_(weights, deltas)
            result = closure()
        finally:
            if ahead:
                torch._foreach_copy_(weights, theta)
        if isinstance(self.base_optimizer, torch.optim.SGD):
            for (group, p, _), delta in zip(ahead, deltas if ahead else ()):
                if p.grad is not None and group['weight_decay']:
                    p.grad.add_(delta, alpha=group['weight_decay'])
        self.base_optimizer.step()
        return result


def momentum_of(state):
    """The moving average of gradients that SGD, RMSprop, Adam or AdamW keeps for a parameter, or None before it has
    one.
    """
    return state.get('momentum_buffer', state.get('exp_avg'))


def add_arguments(parser):
    flag = parser.add_argument
    flag('--rho', type=float, metavar='R', help='how far away the worst weights are (0.05, with --adaptive 0.5)')
    flag('--adaptive', action='store_true', help='in proportion to each weight (ASAM)')
    flag('--eta', type=float, default=0.0, metavar='E', help='adaptive: added to the size of each weight (0)')
    flag('--direction', choices=('gradient', 'momentum'), default='gradient',
         help='uphill along the gradient, or ahead along the momentum, which costs one pass (gradient)')
    add_climbing_arguments(parser)


STRENGTH = 'rho'


def optimizer(args, model, steps_per_epoch):
    """`args`, the model, optimizer steps per epoch -> (params, lr, **options) -> optimizer."""
    if 'eta' in args.given and not args.adaptive:
        raise ValueError('--eta belongs to --adaptive, which is not given')
    unused = {'adaptive', 'eta', 'climb_fraction', 'local_perturbation', 'perturbed_statistics'} & args.given
    if args.direction == 'momentum' and unused:
        flag = f'--{min(unused).replace("_", "-")}'
        raise ValueError(f'{flag} belongs to --direction gradient; along the momentum there is one pass')
    rho = (0.5 if args.adaptive else 0.05) if args.rho is None else args.rho
    if rho == 0 and (unused := (unused | {'direction'}) & args.given):
        raise ValueError(f'--{min(unused).replace("_", "-")} does nothing with --rho 0, which is plain SGD')
    return functools.partial(SAM, rho=rho, adaptive=args.adaptive, eta=args.eta, direction=args.direction,
                             **climbing_options(args, model))


if __name__ == '__main__':
    # f(w) = min(50 w^2, (w - 2)^2 + 0.1) has a sharp minimum at 0 and a flat, higher one at 2. Look from near each.
    for start in (0.01, 2.01):
        w = torch.nn.Parameter(torch.tensor([start]))
        example, losses = SAM([w], lr=0.0, rho=0.1), []

        def closure():
            example.zero_grad()
            loss = torch.minimum(50 * w ** 2, (w - 2) ** 2 + 0.1).sum()
            loss.backward()
            losses.append(loss.item())
            return loss

        example.step(closure)
        print(f'at {start}: loss {losses[0]:.3f}, and at distance 0.1 uphill: {losses[1]:.3f}')
