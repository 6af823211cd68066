"""SmoothOut: train under noise on the weights, so that training leaves sharp minima.

Wen, Wang, Yan, Xu, Chen and Li, "SmoothOut: Smoothing Out Sharp Minima to Improve Generalization in Deep Learning"
(arXiv 1805.07898), algorithm 1; adapt='filter' is its AdaSmoothOut. adapt='weight' and the schedules come from the
authors' code.

    v uniform in [-1, 1], or standard normal; new for every pass
    noise = coefficient ss v                          adapt='none'
            coefficient ss |w| v                      'weight': in proportion to each weight
            coefficient ss v |w_f| / |v_f|            'filter': each filter's noise is as long as the filter
    theta <- base optimizer's step at theta, with the gradient at theta + noise

In your own loop:

    optimizer = SmoothOut(model.parameters(), lr=0.1, ss=0.01, momentum=0.9, exclude=batch_norm_parameters(model))
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        return loss
    loss = optimizer.step(closure)
"""
import functools
import inspect
import math

import torch


class SmoothOut(torch.optim.Optimizer):
    """Wraps `base_optimizer`, a torch.optim class that steps without a closure, which gets `options`; SGD by default.

    ss: sharpness smoothing, the size of the noise, at least 0; in the units of the weights, or with adapt 'weight' and
    'filter' relative to each weight or to each filter's length. noise: 'uniform' or 'normal'. adapt: 'none', 'weight'
    or 'filter'. schedule, anneal_index, tanh_scale: see `smoothing_coefficient`; 'tanh' also needs total_steps, the
    number of optimizer steps in training. first_step: number of steps already done.
    exclude: parameters that get no noise, usually batch_norm_parameters(model).
    generator: a torch.Generator on the parameters' device; by default its seed comes from torch.manual_seed.

    Raises ValueError for an option out of range, and for a base optimizer whose step needs a closure, such as LBFGS.
    ss can be set per parameter group. Parameter groups are the base optimizer's, so schedulers work as usual;
    state_dict also has the step and the state of the generator.
    """

    def __init__(self, params, lr, ss, noise='uniform', adapt='none', schedule='constant', anneal_index=0.55,
                 tanh_scale=10.0, total_steps=None, first_step=0, exclude=(), generator=None,
                 base_optimizer=torch.optim.SGD, **options):
        if noise not in ('uniform', 'normal'):
            raise ValueError(f"noise must be 'uniform' or 'normal', was given {noise!r}")
        if adapt not in ('none', 'weight', 'filter'):
            raise ValueError(f"adapt must be 'none', 'weight' or 'filter', was given {adapt!r}")
        check_base_optimizer('SmoothOut', base_optimizer)
        self.coefficient = functools.partial(smoothing_coefficient, schedule, total_steps=total_steps,
                                             anneal_index=anneal_index, tanh_scale=tanh_scale)
        self.coefficient(first_step)  # raises ValueError if an option is out of range
        self.scheduled_steps = total_steps if schedule == 'tanh' else None
        super().__init__(params, {'lr': lr, 'ss': ss})
        for group in self.param_groups:
            if not 0 <= group['ss'] < math.inf:
                raise ValueError(f'ss must be a number of at least 0, was given {group["ss"]}')
        self.base_optimizer = base_optimizer(self.param_groups, lr=lr, **options)
        self.defaults.update(self.base_optimizer.defaults)
        self.noise, self.adapt, self.exclude, self.steps = noise, adapt, set(exclude), first_step
        self.noisy, self.saved = [], []  # during a step: the parameters under noise, and copies of them without noise
        # A random seed, so that the noise is not what dropout draws, and is unrelated for neighbouring seeds.
        seed = torch.randint(2 ** 63 - 1, (), generator=torch.Generator().manual_seed(torch.initial_seed())).item()
        self.generator = generator or torch.Generator(self._device()).manual_seed(seed)
        self._use_base_groups()

    def _use_base_groups(self):
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def _device(self):
        """Where the noise is drawn: on the parameters' device, but the meta device has no generator."""
        kinds = [p.device for group in self.param_groups for p in group['params'] if p.device.type != 'meta']
        return kinds[0] if kinds else 'cpu'

    def __getstate__(self):
        names = ('base_optimizer', 'noise', 'adapt', 'exclude', 'steps', 'coefficient', 'scheduled_steps', 'generator')
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}, 'noisy': [], 'saved': []}

    def state_dict(self):
        state = {'steps': self.steps, 'generator': self.generator.get_state(), 'device': self.generator.device.type}
        return {**self.base_optimizer.state_dict(), 'smoothout': state}

    def load_state_dict(self, state_dict):
        """Loads a state_dict of SmoothOut; ValueError for another optimizer's.

        If it was saved on another kind of device, the generator keeps its state.
        """
        if 'smoothout' not in state_dict:
            raise ValueError('this is not the state of a SmoothOut optimizer')
        self.base_optimizer.load_state_dict(state_dict)
        self._use_base_groups()
        state = state_dict['smoothout']
        self.steps = state['steps']
        if state['device'] == self.generator.device.type:
            self.generator.set_state(state['generator'])

    @torch.no_grad()
    def step(self, closure):
        """Algorithm 1; returns what `closure` returned, which is the pass under noise.

        closure() clears the gradients, computes the loss, calls backward and returns anything. Before the base
        optimizer steps, or if the closure raises, the weights are exactly as they were without noise.
        """
        self.noisy = [p for group in self.param_groups if group['ss'] > 0 for p in group['params']
                      if p.requires_grad and p not in self.exclude]
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

    def before_step(self, behind, strength=1.0):
        """Sets how far the schedule 'tanh' is; without a call it goes by the steps that were made.

        behind: the share of the training that is behind, from 0 to 1. `strength` is not used.
        """
        if self.scheduled_steps:
            self.steps = round(behind * self.scheduled_steps)

    @torch.no_grad()
    def next_part(self, parts=1):
        """Replaces the noise by new noise; a closure that calls backward several times calls it between them.

        next_part(parts) is the same as `parts` calls of next_part(). Outside a step it does nothing.
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
                size = group['ss'] * self.coefficient(self.steps)
                torch._foreach_add_(params, [noise[p] for p in params], alpha=size)

    def _draw(self):
        return draw(self.noisy, self.noise, self.generator)


def check_base_optimizer(wrapper, base_optimizer):
    """ValueError unless `base_optimizer`, a class or a partial of one, steps without a closure."""
    kind = getattr(base_optimizer, 'func', base_optimizer)
    parameters = list(inspect.signature(getattr(kind, 'step', lambda self: None)).parameters.values())[1:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(f'{wrapper} cannot wrap {kind.__name__}, whose step needs a closure; base_optimizer must be a '
                         'class whose step uses the gradients that are there, such as SGD, Adam, AdamW or RMSprop')


def draw(weights, noise='uniform', generator=None):
    """v for each of `weights`, tensors of one dtype and device; noise: 'uniform' in [-1, 1], or 'normal'."""
    if not weights:
        return []
    sizes = [w.numel() for w in weights]
    v = torch.empty(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)  # for all weights, in one launch
    v = v.uniform_(-1, 1, generator=generator) if noise == 'uniform' else v.normal_(generator=generator)
    # In the memory order of the weight, because tensors of the same order are added fastest.
    return [piece.as_strided(w.shape, w.stride()) if w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last)
            else piece.view(w.shape) for piece, w in zip(v.split(sizes), weights)]


def adapted(v, weights, adapt='none'):
    """The noise on each of `weights`, without the factors ss and coefficient; v: what `draw` returned for `weights`."""
    if adapt == 'weight':
        return torch._foreach_mul(v, torch._foreach_abs(weights)) if v else []
    return [filter_normalized(piece, w) for piece, w in zip(v, weights)] if adapt == 'filter' else v


def smoothing_coefficient(schedule, step, total_steps=None, anneal_index=0.55, tanh_scale=10.0):
    """The factor on the noise at optimizer step `step`, counted from 0.

    'constant'  1
    'anneal'    (1 + step) ^ (-anneal_index / 2), which falls from 1
    'tanh'      (tanh(tanh_scale (step / total_steps - 1/2)) + 1) / 2, which rises from about 0 to about 1
    Raises ValueError for another schedule, for 'tanh' without total_steps, the number of optimizer steps in training,
    and for a negative step, anneal_index or tanh_scale.
    """
    if step < 0:
        raise ValueError(f'step must be at least 0, was given {step}')
    if not (0 <= anneal_index < math.inf and 0 <= tanh_scale < math.inf):
        raise ValueError(f'anneal_index and tanh_scale must be numbers of at least 0, '
                         f'were given {anneal_index} and {tanh_scale}')
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
    """`noise` scaled so that each of its filters is as long as the same filter of `weight`; all have the same shape.

    A filter is a slice along the first axis, or an element of a vector such as a bias. The result is zero where the
    noise or the weight is zero. 1e-6 is added to the length of the noise, as in the original code.
    Source: Wen et al., AdaSmoothOut; Li et al., arXiv 1712.09913, section 4.
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
    """The flags that describe the noise; ss: default of its size, kind: the type that argparse reads it with."""
    flag = parser.add_argument
    flag('--ss', '--sharpness-smoothing', type=kind, default=ss, metavar='S',
         help='size of the noise' + (f' ({ss})' if ss else ''))
    flag('--noise-type', choices=('uniform', 'normal'), default='uniform', help='distribution of the noise (uniform)')
    flag('--adapt-type', choices=('none', 'weight', 'filter'), default='none',
         help='noise in proportion to each weight, or as long as each filter (none)')
    flag('--perturb-batch-norm', action='store_true', help='noise on the BatchNorm parameters too')


def add_arguments(parser):
    add_noise_arguments(parser)
    parser.add_argument('--smoothing-type', choices=('constant', 'anneal', 'tanh'), default='constant',
                        help='how the noise changes during training: anneal falls, tanh rises (constant)')
    parser.add_argument('--anneal-index', type=float, default=0.55, metavar='A', help='how fast anneal falls (0.55)')
    parser.add_argument('--tanh-scale', type=float, default=10.0, metavar='T', help='how steeply tanh rises (10)')


STRENGTH = 'ss'


def by_position(args):
    """Whether the noise depends on the share of the training that is behind."""
    return args.smoothing_type == 'tanh'


def optimizer(args, model, steps_per_epoch):
    """`args`, the model, optimizer steps per epoch -> (params, lr, **options) -> optimizer."""
    for flag, needed in (('anneal_index', 'anneal'), ('tanh_scale', 'tanh')):
        if flag in args.given and args.smoothing_type != needed:
            flag = f'--{flag.replace("_", "-")}'
            raise ValueError(f'{flag} belongs to --smoothing-type {needed}, not {args.smoothing_type}')
    unused = {'noise_type', 'adapt_type', 'perturb_batch_norm', 'smoothing_type'} & args.given
    if args.ss == 0 and unused:
        raise ValueError(f'--{min(unused).replace("_", "-")} does nothing with --ss 0, which is plain SGD')
    if args.perturb_batch_norm and not batch_norm_parameters(model):
        raise ValueError('--perturb-batch-norm does nothing in a network without BatchNorm')
    return functools.partial(
        SmoothOut, ss=args.ss, noise=args.noise_type, adapt=args.adapt_type, schedule=args.smoothing_type,
        anneal_index=args.anneal_index, tanh_scale=args.tanh_scale, total_steps=args.epochs * steps_per_epoch,
        first_step=args.start_epoch * steps_per_epoch,
        exclude=() if args.perturb_batch_norm else batch_norm_parameters(model))


if __name__ == '__main__':
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    noise = filter_normalized(torch.rand(3, 4) * 2 - 1, weight)
    print('lengths of the filters   ', [round(length, 3) for length in weight.norm(dim=1).tolist()])
    print('of noise normalized to it', [round(length, 3) for length in noise.norm(dim=1).tolist()])
    for schedule in ('constant', 'anneal', 'tanh'):
        coefficients = [smoothing_coefficient(schedule, step, 100) for step in (0, 25, 50, 75, 100)]
        print(f'coefficient, {schedule:8}', [round(coefficient, 3) for coefficient in coefficients])
    # f(w) = min(50 w^2, (w - 2)^2 + 0.1) has a sharp minimum at 0 and a flat, higher one at 2. Start in the sharp one.
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
