"""SmoothOut: train under noise on the weights, so that sharp minima, which the noise throws out of, are not stayed in.

Wen, Wang, Yan, Xu, Chen and Li, "SmoothOut: Smoothing Out Sharp Minima to Improve Generalization in Deep Learning"
(arXiv 1805.07898), algorithm 1; adapt='filter' is its AdaSmoothOut. adapt='weight' and the schedules are of the authors' code.

    v uniform in [-1, 1], or standard normal; new for every pass
    noise = coefficient ss v                          adapt='none'
            coefficient ss |w| v                      'weight': in proportion to each weight
            coefficient ss v |w_f| / |v_f|            'filter': each filter's noise as long as the filter
    theta <- base optimizer's step at theta, with the gradient at theta + noise

Use in a loop of your own:

    optimizer = SmoothOut(model.parameters(), lr=0.1, ss=0.01, momentum=0.9, exclude=batch_norm_parameters(model))
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


class SmoothOut(torch.optim.Optimizer):
    """Wraps `base_optimizer`, any torch.optim class, whose options are passed on; SGD by default.

    ss: sharpness smoothing, the size of the noise, at least 0, in the units of the weights or, with adapt 'weight' and
    'filter', as a share of each weight or filter's length. noise: 'uniform' or 'normal'. adapt: 'none', 'weight', 'filter'. schedule, anneal_index, tanh_scale: see `smoothing_coefficient`;
    'tanh' also needs total_steps, the length of training. first_step: how many steps of it are behind.
    exclude: parameters that get no noise, usually batch_norm_parameters(model).
    generator: a torch.Generator on the parameters' device; left out, one that torch.manual_seed determines.

    Raises ValueError for an option out of range. ss can be set per parameter group. Groups are those of the base
    optimizer, so schedulers work as on it; state_dict adds to its state the step and the state of the generator.
    """

    def __init__(self, params, lr, ss, noise='uniform', adapt='none', schedule='constant', anneal_index=0.55, tanh_scale=10.0,
                 total_steps=None, first_step=0, exclude=(), generator=None, base_optimizer=torch.optim.SGD, **options):
        for name, value, known in (('noise', noise, ('uniform', 'normal')), ('adapt', adapt, ('none', 'weight', 'filter'))):
            if value not in known:
                raise ValueError(f'{name} must be {" or ".join(map(repr, known))}, was given {value!r}')
        smoothing_coefficient(schedule, first_step, total_steps, anneal_index, tanh_scale)  # raises what it would raise later
        super().__init__(params, {'lr': lr, 'ss': ss})
        for group in self.param_groups:
            if not 0 <= group['ss'] < math.inf:
                raise ValueError(f'ss must be a number of at least 0, was given {group["ss"]}')
        self.base_optimizer = base_optimizer(self.param_groups, lr=lr, **options)
        self.defaults.update(self.base_optimizer.defaults)
        self.noise, self.adapt, self.exclude, self.steps = noise, adapt, set(exclude), first_step
        self.coefficient = functools.partial(smoothing_coefficient, schedule, total_steps=total_steps,
                                             anneal_index=anneal_index, tanh_scale=tanh_scale)
        self.noisy, self.saved = [], []  # while a step runs, the parameters under noise and what they were
        # Drawn from, and so unlike, the seed of the generator that dropout uses; neighbouring seeds give unrelated noise.
        seed = torch.randint(2 ** 63 - 1, (), generator=torch.Generator().manual_seed(torch.initial_seed())).item()
        self.generator = generator or torch.Generator(self.param_groups[0]['params'][0].device).manual_seed(seed)
        self._share()

    def _share(self):
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def __getstate__(self):
        return {**super().__getstate__(), 'base_optimizer': self.base_optimizer, 'noise': self.noise, 'adapt': self.adapt,
                'exclude': self.exclude, 'steps': self.steps, 'coefficient': self.coefficient, 'generator': self.generator,
                'noisy': [], 'saved': []}

    def state_dict(self):
        own = {'steps': self.steps, 'generator': self.generator.get_state(), 'device': self.generator.device.type}
        return {**self.base_optimizer.state_dict(), 'smoothout': own}

    def load_state_dict(self, state_dict):
        """On another kind of device than the state was saved on the noise is that of a new generator.

        Raises ValueError for the state of another optimizer.
        """
        if 'smoothout' not in state_dict:
            raise ValueError('this is not the state of a SmoothOut optimizer')
        own = state_dict['smoothout']
        self.base_optimizer.load_state_dict(state_dict)
        self._share()
        self.steps = own['steps']
        if own['device'] == self.generator.device.type:
            self.generator.set_state(own['generator'])

    @torch.no_grad()
    def step(self, closure):
        """One step; returns what `closure` returned, which is the pass under noise.

        closure() clears the gradients, computes the loss, calls backward and returns what it likes. The weights are
        without noise again, exactly, when the base optimizer steps, and also if the closure raises.
        """
        self.noisy = [p for group in self.param_groups for p in group['params'] if p.requires_grad and p not in self.exclude]
        self.saved = torch._foreach_mul(self.noisy, 1) if self.noisy else []  # a copy, in one launch
        try:
            self._add_noise()
            with torch.enable_grad():
                result = closure()
        finally:
            self._restore()
            self.noisy, self.saved = [], []
        self.base_optimizer.step()
        self.steps += 1
        return result

    @torch.no_grad()
    def next_part(self, parts=1):
        """For a closure that calls backward several times: between two of these this exchanges the noise for new noise.

        With `parts` above 1 it is the noise that as many calls would end with. Outside of a step it does nothing.
        """
        for _ in range(parts - 1):
            self._draw()
        self._restore()
        self._add_noise()

    def _restore(self):
        if self.saved:
            torch._foreach_copy_(self.noisy, self.saved)

    def _add_noise(self):
        noise = dict(zip(self.noisy, adapted(self._draw(), self.noisy, self.adapt)))
        for group in self.param_groups:
            params = [p for p in group['params'] if p in noise]
            if params:
                torch._foreach_add_(params, [noise[p] for p in params], alpha=group['ss'] * self.coefficient(self.steps))

    def _draw(self):
        return draw(self.noisy, self.noise, self.generator)


def draw(weights, noise='uniform', generator=None):
    """v for each of `weights`, a list of tensors of one dtype and device; noise: 'uniform' in [-1, 1], or 'normal'."""
    if not weights:
        return []
    sizes = [w.numel() for w in weights]
    v = torch.empty(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)  # drawn all at once
    v = v.uniform_(-1, 1, generator=generator) if noise == 'uniform' else v.normal_(generator=generator)
    # In the memory order of the weight, as tensors of one order are added fastest.
    return [piece.as_strided(w.shape, w.stride()) if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last)
            else piece.view(w.shape) for piece, w in zip(v.split(sizes), weights)]


def adapted(v, weights, adapt='none'):
    """The noise of each of `weights`, lists of tensors as `draw` gives them; without the factors ss and coefficient."""
    if adapt == 'weight':
        return torch._foreach_mul(v, torch._foreach_abs(weights)) if v else []
    return [filter_normalized(one, w) for one, w in zip(v, weights)] if adapt == 'filter' else v


def smoothing_coefficient(schedule, step, total_steps=None, anneal_index=0.55, tanh_scale=10.0):
    """The factor on the noise at optimizer step `step`, counted from 0.

    'constant'  1
    'anneal'    (1 + step) ^ (-anneal_index / 2), which falls from 1
    'tanh'      (tanh(tanh_scale (step / total_steps - 1/2)) + 1) / 2, which rises from about 0 to about 1
    Raises ValueError for another schedule, for 'tanh' without the total_steps of training, and for a negative step,
    anneal_index or tanh_scale.
    """
    if step < 0:
        raise ValueError(f'step must be at least 0, was given {step}')
    if not (0 <= anneal_index < math.inf and 0 <= tanh_scale < math.inf):
        raise ValueError(f'anneal_index and tanh_scale must be numbers of at least 0, were given {anneal_index} and {tanh_scale}')
    if schedule == 'constant':
        return 1.0
    if schedule == 'anneal':
        return (1 + step) ** (-anneal_index / 2)
    if schedule != 'tanh':
        raise ValueError(f"schedule must be 'constant', 'anneal' or 'tanh', was given {schedule!r}")
    if not total_steps or total_steps < 0:
        raise ValueError("schedule 'tanh' needs total_steps, the number of optimizer steps in training")
    return (math.tanh(tanh_scale * (step / total_steps - 0.5)) + 1) / 2


def filter_normalized(noise, weight):
    """`noise` scaled so that each filter of it is as long as that filter of `weight`; both of one shape, as is the result.

    A filter is a slice along the first axis; of a vector, such as a bias, each element is one. Where the noise or the
    weight is zero, so is the result. 1e-6 is added to the length of the noise, as in the original code. (Wen et al., AdaSmoothOut;
    Li et al., arXiv 1712.09913, section 4.)
    """
    def length(tensor):
        axes = tuple(range(1, tensor.dim()))
        return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) if axes else tensor.abs()

    return noise * (length(weight) / (length(noise) + 1e-6))


def batch_norm_parameters(model):
    """The weights and biases of the BatchNorm layers of `model`."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return [p for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)]


def add_noise_arguments(parser, ss=0.01, kind=float):
    """The flags that say which noise; ss: the default of its size, which is read by `kind`."""
    parser.add_argument('--ss', '--sharpness-smoothing', type=kind, default=ss, metavar='S',
                        help='size of the noise' + (f' ({ss})' if ss else ''))
    parser.add_argument('--noise-type', choices=('uniform', 'normal'), default='uniform', help='(uniform)')
    parser.add_argument('--adapt-type', choices=('none', 'weight', 'filter'), default='none',
                        help='noise in proportion to each weight, or as long as each filter (none)')
    parser.add_argument('--perturb-batch-norm', action='store_true', help='noise on the BatchNorm parameters too')


def add_arguments(parser):
    add_noise_arguments(parser)
    parser.add_argument('--smoothing-type', choices=('constant', 'anneal', 'tanh'), default='constant',
                        help='how the noise changes during training: anneal falls, tanh rises (constant)')
    parser.add_argument('--anneal-index', type=float, default=0.55, metavar='A', help='(0.55)')
    parser.add_argument('--tanh-scale', type=float, default=10.0, metavar='T', help='(10)')


def optimizer(args, model, steps_per_epoch):
    """`args`, the model, optimizer steps per epoch -> (params, lr, **options) -> optimizer."""
    for flag, needed in (('anneal_index', 'anneal'), ('tanh_scale', 'tanh')):
        if flag in args.given and args.smoothing_type != needed:
            raise ValueError(f'--{flag.replace("_", "-")} belongs to --smoothing-type {needed}, not {args.smoothing_type}')
    return functools.partial(
        SmoothOut, ss=args.ss, noise=args.noise_type, adapt=args.adapt_type, schedule=args.smoothing_type,
        anneal_index=args.anneal_index, tanh_scale=args.tanh_scale, total_steps=args.epochs * steps_per_epoch,
        first_step=args.start_epoch * steps_per_epoch, exclude=() if args.perturb_batch_norm else batch_norm_parameters(model))


if __name__ == '__main__':
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    noise = filter_normalized(torch.rand(3, 4) * 2 - 1, weight)
    print('lengths of the filters   ', [round(length, 3) for length in weight.norm(dim=1).tolist()])
    print('of noise normalized to it', [round(length, 3) for length in noise.norm(dim=1).tolist()])
    for schedule in ('constant', 'anneal', 'tanh'):
        print(f'coefficient, {schedule:8}', [round(smoothing_coefficient(schedule, step, 100), 3) for step in (0, 25, 50, 75, 100)])
    # f(w) = min(50 w^2, (w - 2)^2 + 0.1) has a sharp minimum at 0 and a flat, higher one at 2; begin in the sharp one
    for ss in (0.0, 1.0):
        w = torch.nn.Parameter(torch.zeros(1))
        example = SmoothOut([w], lr=0.02, ss=ss)

        def closure():
            example.zero_grad()
            loss = torch.minimum(50 * w ** 2, (w - 2) ** 2 + 0.1).sum()
            loss.backward()
            return loss

        for _ in range(500):
            example.step(closure)
        print(f'ss {ss}: from the sharp minimum at 0 to {w.item():.2f} (the flat one is at 2)')
