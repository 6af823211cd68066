"""Methods through the training loop: alone, in every allowed pair, in parts, resumed; and what is refused."""
import itertools
import math
import sys

import pytest
import torch
from torch import nn

import cifar
from helpers import broken_off, unrecorded
from large_margin import LargeMarginLoss
from models import cifar as models
from utils import checkpoint, datasets, methods, schedule
from utils.batches import Batches, Split, mean_and_std
from utils.activations import Activations
from utils.errors import UserError
from utils.eval import shown_logits
from utils.parts import Batch, Parts
from utils.logger import read_log

HEADS, OPTIMIZERS = {'dma', 'lsoftmax'}, {'amp', 'smoothout'}
RIVALS = {name for name, module in methods.METHODS.items() if module.__name__.startswith('baselines.')}
PAIRS = [pair for pair in itertools.combinations(methods.METHODS, 2) if set(pair) not in (HEADS, OPTIMIZERS)
         and not RIVALS & set(pair)]
WITH_RIVALS = [('dma', 'sam'), ('large_margin', 'arcface', 'smoothout'), ('amp', 'ldam'),
               ('lsoftmax', 'logit_adjustment', 'sam'), ('smoothout', 'hinge')]
# Large Margin looks inside, SmoothOut's noise changes during training, and both are resumed too.
FLAGS = {'large_margin': '--large-margin-layers input layer2 --top-k 2 --cross-entropy-weight '
                         '1', 'lsoftmax': '--margin 3 --beta 5',
         'amp': '--inner-iter 2 --epsilon 0.1', 'smoothout': '--smoothing-type tanh --adapt-type filter', 'dma': '',
         'sam': '--direction momentum', 'ldam': '--deferred 0.5'}


def arguments(text):
    parser = cifar.make_parser()
    args = parser.parse_args('--epochs 3 --lr-schedule cosine --lr 0.02 --warmup 0 --train-batch 8 --manualSeed 1 '
                             f'{text}'.split())
    methods.check_arguments(args, parser)
    schedule.fill_in(args, None, parser)
    return args


def selected(names):
    return f'--method {" ".join(names)} ' + ' '.join(FLAGS.get(name, '') for name in names)


class Run:
    """What main builds, on 24 images of noise: three batches of 8."""

    def __init__(self, args, arch='resnet', **network):
        generator = torch.Generator().manual_seed(0)
        split = Split(torch.randint(256, (24, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(24) % 4,
                      list('abcd'))
        torch.manual_seed(args.seed)
        self.args = args
        self.model = models.build(arch, 4, methods.build_head(args), **(network or {'depth': 8}))
        self.model.to(memory_format=torch.channels_last)
        self.batches = Batches(split, *mean_and_std(split.images), args.train_batch * args.batch_multiplier,
                                    torch.device('cpu'), 4, True)
        self.optimizer = methods.build_optimizer(args, self.model, len(self.batches))
        self.criterion = methods.build_criterion(args, self.model, self.batches.class_counts)
        self.run = unrecorded(args, self.model, self.optimizer, self.batches)

    def train(self, epoch):
        return cifar.train(self.run, self.criterion, self.optimizer, epoch, self.args)

    def state(self):
        return {'state_dict': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'random': checkpoint.random_state()}

    def load(self, state):
        self.model.load_state_dict(state['state_dict'])
        checkpoint.load_optimizer(self.optimizer, state, 'x')
        checkpoint.set_random_state(state['random'])


def flat(value, path=''):
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in flat(part, f'{path}/{name}').items()}
    return {path: value}


def assert_same(state, other):
    state, other = flat(state), flat(other)
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], key


IN_PARTS = '--mini-batch 4 --batch-multiplier 2 --clip-norm 1 --precision bf16'
COMBINED = [*((name,) for name in methods.METHODS), *PAIRS, *WITH_RIVALS, ('dma', 'large_margin', 'amp'),
            ('lsoftmax', 'large_margin', 'smoothout')]


@pytest.mark.parametrize('names, options', [
    pytest.param(names, options, id=f'{" ".join(names)} {options}') for names in COMBINED
    for options in ('', IN_PARTS) if options or names[0] not in RIVALS and len(names) == 1])
def test_every_pair_trains_and_resumes_bit_for_bit(names, options, tmp_path):
    args = arguments(f'{selected(names)} {options}')
    whole = Run(args)
    before = [p.clone() for p in whole.model.parameters()]
    for epoch in range(2):
        assert math.isfinite(whole.train(epoch)['Loss'])
    assert not any(torch.equal(old, new) for old, new in zip(before, whole.model.parameters()))

    first = Run(args)
    first.train(0)
    torch.save(first.state(), tmp_path / 'state')
    second = Run(args)
    torch.rand(3)  # whatever else was drawn in between
    second.load(torch.load(tmp_path / 'state', weights_only=True))
    second.train(1)
    assert_same(second.state(), whole.state())


@pytest.fixture
def few_digits(monkeypatch):
    load = datasets.load
    monkeypatch.setattr(datasets, 'load', lambda *args: load(*args).subset(torch.arange(96)))


def call(monkeypatch, flags):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split()])
    cifar.main()


def test_a_whole_run_of_three_methods_resumed(few_digits, monkeypatch, tmp_path):
    flags = ('-d digits --depth 8 --train-batch 16 --lr-schedule onecycle --manualSeed 3 --epochs 2 --mini-batch 8 '
             '--method lsoftmax large_margin amp --margin 2 --beta-schedule decay --cross-entropy-weight 1 '
             '--epsilon 0.1 --clip-norm 5')
    call(monkeypatch, f'{flags} -c {tmp_path}/whole')
    monkeypatch.setattr('utils.run.Run.report', lambda *args: None)
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    whole, parts = (torch.load(f'{tmp_path}/{name}/checkpoint.pth.tar', weights_only=True) for name
                    in ('whole', 'parts'))
    assert_same(whole, parts)
    assert whole['state_dict']['head.beta'].item() == pytest.approx(100 * 0.99 ** 12, rel=1e-5)  # six steps an epoch
    assert read_log(f'{tmp_path}/parts/log.txt')['Epoch'] == [1, 2]


@pytest.mark.parametrize('names', [('lsoftmax', 'amp'), ('dma', 'smoothout')], ids=' '.join)
def test_a_compiled_network_trains_as_it_would_otherwise(names):
    args = arguments(selected(names))
    plain, compiled = Run(args), Run(args)
    compiled.run.network = torch.compile(compiled.model, backend='aot_eager')
    for epoch in range(2):
        measured = plain.train(epoch)
        assert compiled.train(epoch) == pytest.approx(measured, rel=1e-3)
    for ours, expected in zip(compiled.model.state_dict().values(), plain.model.state_dict().values()):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


# Parts of a batch

@pytest.mark.parametrize('options, sizes', [('--mini-batch 4', [4, 4]), ('--batch-multiplier 3', [8, 8, 8]),
                                            ('--mini-batch 2 --batch-multiplier 2', [2] * 8),
                                            ('--train-batch 20 --mini-batch 10', [10, 10]),
                                            ('--train-batch 20 --mini-batch 10', [4])])
def test_the_gradient_is_the_mean_over_images_of_parts_with_statistics_of_their_own(options, sizes):
    args = arguments(f'{options} --momentum 0 --wd 0 --lr 0.1 --lr-schedule step --schedule 2 ')
    run, by_hand = Run(args), Run(args)
    inputs, targets = list(run.batches.shuffled(args.seed, 0))[-1 if sizes == [4] else 0]  # [4]: the rest at the end
    assert len(inputs) == sum(sizes)
    run.batches.shuffled = lambda seed, epoch, first: iter([(inputs, targets)])
    run.batches.images_in = lambda number: len(targets)
    run.train(0)
    by_hand.model.train()
    for images, labels in zip(inputs.split(sizes), targets.split(sizes)):
        loss = nn.functional.cross_entropy(by_hand.model(images), labels, reduction='sum') / len(inputs)
        loss.backward()
    for ours, p in zip(run.model.parameters(), by_hand.model.parameters()):
        torch.testing.assert_close(ours, p - 0.1 * p.grad, rtol=1e-5, atol=1e-6)
    for ours, expected in zip(run.model.buffers(), by_hand.model.buffers()):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('options', ['', '--mini-batch 2'])
def test_a_batch_that_the_loop_makes_longer_or_shorter_has_a_mean_of_its_own(options):
    """Twice the same images have the gradient of once, and half of them that of a batch of half as many."""
    def gradient(edit):
        run = Run(arguments(options))
        parts = Parts(run.model.train(), run.optimizer, run.args)
        torch.manual_seed(0)
        images, targets = edit(torch.rand(8, 3, 32, 32)), edit(torch.arange(8) % 4)
        for images, targets, weight in parts.of(Batch(images, targets, size=8)):
            (weight * nn.functional.cross_entropy(run.model.eval()(images), targets)).backward()
        return torch.cat([p.grad.flatten() for p in run.model.parameters()])

    once = gradient(lambda values: values)
    torch.testing.assert_close(gradient(lambda values: values.repeat_interleave(2, dim=0)), once)
    first, second = gradient(lambda values: values[:4]), gradient(lambda values: values[4:])
    torch.testing.assert_close((first + second) / 2, once)


def test_each_part_sees_noise_of_its_own_and_every_pass_of_a_step_counts_once():
    args = arguments('--method lsoftmax smoothout --beta-schedule decay --ss 0.1 --mini-batch 2 --lr 0')
    run, seen = Run(args), []
    clean = [p.clone() for p in run.model.parameters()]
    run.model.layer1.register_forward_pre_hook(lambda module,
                                               inputs: seen.append(run.model.conv1.weight.detach().clone()))
    run.train(0)
    assert len(seen) == 12 and all(not torch.equal(a, b) for a, b
                                   in itertools.combinations([*seen, run.model.conv1.weight], 2))
    assert run.optimizer.steps == 3 and run.model.head.beta.item() == pytest.approx(100 * 0.99 ** 3)
    assert all(torch.equal(a, b) for a, b in zip(clean, run.model.parameters()))


def test_amp_takes_the_margin_and_its_steps_once_though_it_passes_three_times():
    run = Run(arguments('--method lsoftmax amp --beta-schedule decay --inner-iter 2 --mini-batch 4'))
    run.train(0)
    assert run.model.head.beta.item() == pytest.approx(100 * 0.99 ** 3)
    assert run.model.bn1.num_batches_tracked == 6  # two parts of three batches, in the first of the passes
    run = Run(arguments('--method lsoftmax amp --inner-iter 2 --mini-batch 4 --perturbed-statistics'))
    run.train(0)
    assert run.model.bn1.num_batches_tracked == 18


def test_accuracy_in_training_is_that_of_the_plain_logits():
    class Perfect(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head(4, 4)
            self.head.weight.data = torch.eye(4)  # each target is at 30 degrees, the others at 73

        def forward(self, images, targets):
            return self.head(nn.functional.one_hot(targets, 4).float() + 0.5, targets)

    args = arguments('--method lsoftmax --margin 4 --beta 0 --lr 0')
    run = Run(args)
    run.model = Perfect(methods.build_head(args))
    run.optimizer = methods.build_optimizer(args, run.model, 3)
    run.run = unrecorded(args, run.model, run.optimizer, run.batches)
    assert run.train(0)['Top-1'] == 100
    targets = torch.arange(4)
    outputs = run.model(None, targets)
    assert (outputs.argmax(dim=1) == targets).float().mean() < 0.1
    assert torch.equal(shown_logits(run.model)(outputs).argmax(dim=1), targets)
    run.model.eval()
    assert torch.equal(shown_logits(run.model)(run.model(None, targets)), run.model(None, targets))


# Layers by name

HIDDEN = {'alexnet': 'layers.2', 'vgg11': 'layers.2', 'vgg13': 'layers.4', 'vgg16': 'layers.4', 'vgg19': 'layers.4',
          'vgg11_bn': 'layers.3', **{f'vgg{depth}_bn': 'layers.6' for depth in (13, 16, 19)}}
SMALL = {'resnext': {'cardinality': 2, 'widen_factor': 1, 'depth': 11}, 'wrn': {'widen_factor': 1, 'depth': 10},
         'densenet': {'depth': 10, 'growth_rate': 4}, 'pyramidnet': {'depth': 8, 'alpha': 12}}


@pytest.mark.parametrize('arch', models.MODELS)
def test_large_margin_at_the_input_and_inside_of_every_architecture(arch):
    torch.manual_seed(0)
    model = models.build(arch, 4, **SMALL.get(arch, {}))
    layers = HIDDEN.get(arch, 'layer2' if hasattr(model, 'layer2') else 'features')
    args = arguments(f'--method large_margin --large-margin-layers input {layers} head')
    loss = methods.build_criterion(args, model)(model(torch.randn(3, 3, 32, 32), torch.arange(3)), torch.arange(3))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and loss.isfinite()


def test_activations_are_those_of_the_newest_pass_with_gradients():
    model = models.build('resnet', 4, depth=8).eval()
    layers = Activations(model, ['layer2', 'input', 'head'])
    images = torch.randn(2, 3, 32, 32)
    model(torch.zeros(1, 3, 32, 32))
    logits = model(images)
    with torch.no_grad():
        model(torch.ones(1, 3, 32, 32))
    hidden, seen, head = layers.read()
    assert torch.equal(seen, images) and seen.requires_grad and not images.requires_grad
    assert head is logits and hidden.shape == (2, 32, 16, 16)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(logits.sum(), [hidden, seen]))
    with pytest.raises(UserError, match='there was none since it was called last'):
        layers.read()  # not kept for a second time


@pytest.mark.parametrize('names, message', [(['layer9'], "no layer 'layer9' .* input conv1 bn1 layer1 layer1.0"),
                                            ([''], "no layer '' in"),
                                            (['layer1', 'layer1'], 'named twice in layer1 layer1'),
                                            (['bn1'], 'overwrites its output in place'),
                                            (['layer1.0.bn2'], 'overwrites')])
def test_layers_that_cannot_be_used(names, message):
    with pytest.raises(ValueError, match=message):
        model = models.build('resnet', 4, depth=8)
        layers = Activations(model, names)
        model(torch.randn(2, 3, 32, 32))
        layers.read()


@pytest.mark.parametrize('flags, weight', [('', 0), ('--cross-entropy-weight 0.5', 0.5)])
def test_large_margin_takes_the_place_of_the_cross_entropy(flags, weight):
    args = arguments(f'--method large_margin --large-margin-layers head --large-margin-gamma 1 {flags}')
    model, targets = models.build('resnet', 4, depth=8), torch.arange(3)
    criterion = methods.build_criterion(args, model)
    logits = model(torch.randn(3, 3, 32, 32), targets)
    expected = LargeMarginLoss(gamma=1.0)(logits, targets,
                                          [logits]) + weight * nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(criterion(logits, targets), expected)


def test_all_layers_come_from_one_backward_pass_per_class(monkeypatch):
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *args, **options: calls.append(len(args[1]))
                        or grad(*args, **options))
    run = Run(arguments('--method large_margin --large-margin-layers input layer1 layer2 --top-k 2 --train-batch 24'))
    run.train(0)
    assert calls == [3, 3]


# Flags

@pytest.mark.parametrize('name', methods.METHODS)
def test_every_flag_of_a_method_is_in_its_group_and_refused_without_the_method(name, monkeypatch, capsys):
    group = next(group for group in cifar.make_parser()._action_groups if group.title == f'--method {name}')
    actions = {action.dest: action for action in group._group_actions}
    having = {flag: [other for other in methods.METHODS if flag in methods.flags(methods.METHODS[other])]
              for flag in methods.flags(methods.METHODS[name])}  # what amp and sam share is in the group of amp
    assert actions.keys() == {flag for flag, names in having.items() if names[0] == name} and actions
    for action in actions.values():
        value = '' if action.nargs == 0 else f' {action.choices[0] if action.choices else 1}'
        monkeypatch.setattr(sys, 'argv', ['cifar.py', *f'{action.option_strings[-1]}{value}'.split()])
        with pytest.raises(SystemExit):
            cifar.parse_arguments()
        names = ' or '.join(having[action.dest])
        assert f'is a flag of --method {names}, which is not selected' in capsys.readouterr().err


@pytest.mark.parametrize('flags, expected', [
    ('--method lsoftmax --margin 2 --beta 50', {'margin': 2, 'beta': 50}),
    ('--method amp --epsilon 0.1 --inner-lr 0.5 --inner-iter 3', {'epsilon': 0.1, 'inner_lr': 0.5, 'inner_iter': 3}),
    ('--method smoothout --sharpness-smoothing 0.1 --smoothing-type anneal --noise-type normal --adapt-type weight '
     '--anneal-index 0.5',
     {'ss': 0.1, 'smoothing_type': 'anneal', 'noise_type': 'normal', 'adapt_type': 'weight', 'anneal_index': 0.5}),
    ('--method smoothout --ss 0.2 --smoothing-type tanh --tanh-scale 5', {'ss': 0.2, 'tanh_scale': 5}),
    ('--method large_margin --coef 3 --gamma 0.2 --large-margin-gamma '
     '4', {'large_margin_coef': 3, 'gamma': 0.2, 'large_margin_gamma': 4}),
    ('--method dma amp --coef 3', {'dma_coef': 3}),
    ('--method dma large_margin --dma-coef 2 --large-margin-coef 3', {'dma_coef': 2, 'large_margin_coef': 3}),
])
def test_the_originals_spellings(flags, expected, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *flags.split()])
    args = vars(cifar.parse_arguments()[0])
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize('flags, sentence', [
    ('--method dma lsoftmax', 'dma and lsoftmax cannot combine: each brings its own head, and a network has one'),
    ('--method amp smoothout', 'amp and smoothout cannot combine: each brings its own optimizer, and a step has one'),
    ('--method large_margin --compile', 'large_margin and --compile cannot combine'),
    ('--method dma large_margin --coef 1', 'dma and large_margin each do; use --dma-coef and --large-margin-coef'),
    ('--method amp --coef 1', '--method amp has none'), ('--margin 4', '--margin is a flag of --method lsoftmax'),
    ('--method dma --epsilon 1', '--epsilon is a flag of --method amp'),
    ('--ss 1', '--ss is a flag of --method smoothout'),
    ('--method amp --top-k 2', '--top-k is a flag of --method large_margin'),
    ('--method smoothout --tanh-scale 5', '--tanh-scale belongs to --smoothing-type tanh, not constant'),
    ('--method smoothout --anneal-index 1', '--anneal-index belongs to --smoothing-type anneal'),
    ('--method smoothout --ss nan', '--ss/--sharpness-smoothing: must be a number, was given nan'),
    ('--method amp --epsilon -1', 'epsilon must be a number of at least 0'),
    ('--method amp --inner-iter -1', 'inner_iter must be'),
    ('--method lsoftmax --margin 0', 'margin must be a whole number of at least 1, was given 0'),
    ('--method lsoftmax --margin 1.5', '--margin: must be a whole number, was given 1.5'),
    ('--method lsoftmax --margin 1000000000', '--margin must be at most 1000, was given 1000000000'),
    ('--method lsoftmax --beta -1', 'beta and its floor must be'),
    ('--method large_margin --large-margin-coef -1', '--large-margin-coef must be a number of at least 0'),
    ('--mini-batch 50', '--mini-batch 50 does not divide --train-batch, which is 128'),
    ('--mini-batch 256', 'does not divide'), ('--mini-batch 0', 'of at least 1'),
    ('-d digits --batch-multiplier 12', '--train-batch 128 times --batch-multiplier 12 is larger than the training '
                                        'set of 1437'),
    ('--method large_margin --large-margin-layers layer7', "there is no layer 'layer7' in this network, which has "
                                                           "input conv1 bn1 layer1"),
    ('--method large_margin --large-margin-layers bn1', 'layer bn1 cannot be used'),
    ('-d digits --method large_margin --top-k 10', 'top_k must be at most the number of other classes, 9, was given '
                                                   '10'),
    ('--method large_margin --large-margin-gamma 0', 'gamma and alpha must be numbers above 0'),
    ('--method large_margin --aggregate sum', '--aggregate does nothing with --top-k 1'),
    ('--method amp --inner-iter 0 --epsilon 1', '--epsilon does nothing with --inner-iter 0'),
    ('--method lsoftmax --beta 3 --beta-min 5', '--beta does nothing, as beta begins at 3, below'),
    ('--method lsoftmax --beta-gamma 0.1 --beta-min 1e6', '--beta-gamma does nothing, as beta begins at 1000, below'),
    ('--method lsoftmax --margin 1 --beta 5', '--beta does nothing with --margin 1'),
    ('--method smoothout --smoothing-type anneal --anneal-index nan', 'anneal-index: must be a number, was given nan'),
    ('--method large_margin --cross-entropy-weight -1', '--cross-entropy-weight must be'),
    ('-d digits --method large_margin hinge --cross-entropy-weight 1', '--cross-entropy-weight 1 does nothing with '
                                                                       '--method hinge'),
    ('-d digits --method logit_adjustment large_margin --cross-entropy-weight 1 --label-smoothing 0.1',
     '--cross-entropy-weight 1 does nothing with --method logit_adjustment'),
    ('--method amp --epsilon 0.5 --clip-norm 0.4', '--epsilon 0.5 is never reached, as --clip-norm 0.4 shortens'),
    ('--method amp --epsilon 0.5 --clip-norm 1 --inner-lr 0.1 --inner-iter 5', 'to at most 0.5 in all'),
    ('--method large_margin --layer-weights 1 2', 'a layer weight for each, was given 1 and 2'),
])
def test_what_cannot_be_is_refused_before_anything_is_read_or_written(flags, sentence, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, 'load', lambda *args: pytest.fail('data was loaded'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, UserError)) as error:
        call(monkeypatch, flags)
    printed = capsys.readouterr().err + (str(error.value) if error.type is UserError else '')
    assert sentence in printed and printed.strip().count('\n') == 0
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_beta(few_digits, monkeypatch, tmp_path, capsys):
    call(monkeypatch, f'-d digits --depth 8 --train-batch 32 --epochs 1 --method lsoftmax --beta 7 '
         f'--beta-schedule decay -c {tmp_path}/run')
    with pytest.raises(SystemExit):
        call(monkeypatch, f'--resume {tmp_path}/run/checkpoint.pth.tar --epochs 2 --beta 9')
    assert '--beta is where a new run begins' in capsys.readouterr().err
    call(monkeypatch, f'--resume {tmp_path}/run/checkpoint.pth.tar --epochs 2 --beta-decay 0.5')
    beta = torch.load(f'{tmp_path}/run/checkpoint.pth.tar', weights_only=True)['state_dict']['head.beta'].item()
    assert beta == pytest.approx(7 * 0.99 ** 3 * 0.5 ** 3, rel=1e-5)


def test_another_training_with_its_weights_begins_with_its_own_beta(few_digits, monkeypatch, tmp_path, capsys):
    flags = '-d digits --depth 8 --train-batch 32 --epochs 1 --method lsoftmax'
    call(monkeypatch, f'{flags} -c {tmp_path}/first')
    call(monkeypatch, f'{flags} --beta 50 --beta-schedule decay --init {tmp_path}/first/checkpoint.pth.tar --lr 0 '
                      f'-c {tmp_path}/second')
    first, second = (torch.load(f'{tmp_path}/{name}/checkpoint.pth.tar', weights_only=True)['state_dict'] for name
                     in ('first', 'second'))
    assert first['head.beta'] < 0.1 and second['head.beta'].item() == pytest.approx(50 * 0.99 ** 3, rel=1e-5)
    assert torch.equal(first['head.weight'], second['head.weight'])
    assert 'beta' not in capsys.readouterr().out.split('--init', 1)[1].split('epoch')[0]


def test_the_noise_of_another_optimizer_is_not_resumed(few_digits, monkeypatch, tmp_path):
    call(monkeypatch, f'-d digits --depth 8 --train-batch 32 --epochs 1 -c {tmp_path}/run')
    with pytest.raises(UserError, match='of another optimizer'):
        call(monkeypatch, f'--resume {tmp_path}/run/checkpoint.pth.tar --epochs 2 --method smoothout')
