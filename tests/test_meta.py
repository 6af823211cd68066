"""The path of a device other than the CPU, on the meta device, whose tensors have shapes but no values.

An operation raises that reads a value, for which a CUDA device would be waited for, or that has tensors of two devices,
which CUDA would refuse. Numbers are not tested here.
"""
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import center
import cifar
import imagenet
from amp import AMP
from dma import DMA_Linear, dma_loss
from helpers import unrecorded
from large_margin import LargeMarginLoss
from lsoftmax import LargeMarginSoftmaxLoss, LSoftmaxLinear
from models import cifar as models
from models import imagenet as torchvision_models
from smoothout import SmoothOut
from utils import methods, schedule
from utils.batches import Batches, Split, seeded_generator
from utils.eval import Meter
from utils.lab.attack import Attack
from utils.lab.landscape import Landscape
from utils.metrics import Predictions

META = torch.device('meta')
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevice(TorchDispatchMode):
    """Raises where an operation other than a copy has tensors both on the meta device and on the CPU.

    PyTorch itself does so for most operations, but not for matrix products or indices.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kinds = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        assert len(kinds) < 2 or function in COPIES, f'{function} of tensors on {sorted(kinds)}'
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device():
    with OneDevice():
        yield


@pytest.fixture
def never_read(monkeypatch):
    """A Meter says nothing of what it counted, as on the meta device it has no numbers. All before that is tested."""
    monkeypatch.setattr(Meter, 'read', lambda meter: {})
    monkeypatch.setattr(Meter, 'first_bad_batch', lambda meter: None)


def images_of(number=12, size=32):
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (number, size, size, 3), dtype=torch.uint8, generator=generator),
                 torch.arange(number) % 7, list('abcdefg'))


def read_flags(script, flags):
    parser = script.make_parser()
    args = parser.parse_args(f'--epochs 2 --lr 0.01 --train-batch 8 --manualSeed 0 {flags}'.split())
    schedule.fill_in(args, None, parser)
    return args


def train_on_meta(script, model, batches, args):
    model.to(META, memory_format=torch.channels_last)
    optimizer = methods.build_optimizer(args, model, len(batches))
    run = unrecorded(args, model, optimizer, batches)
    script.train(run, methods.build_criterion(args, model), optimizer, 0, args)
    script.test(batches, run.to_test, args, Predictions(len(batches), batches.num_classes, batches.device))
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert all(tensor.device == META for tensor in tensors) and run.meter.sizes == [8, 4]


METHODS = ['', 'dma', 'lsoftmax', 'amp', 'smoothout', 'large_margin', 'dma amp', 'lsoftmax large_margin smoothout',
           'dma large_margin center smoothout']


@pytest.mark.parametrize('flags', ['', '--mini-batch 4 --clip-norm 1 --ema 0.9 --optimizer AdamW --precision bf16 '
                                       '--label-smoothing 0.1'])
@pytest.mark.parametrize('names', METHODS)
def test_training_and_testing(names, flags, never_read, monkeypatch):
    monkeypatch.setitem(methods.METHODS, 'center', center)
    if 'large_margin' in names:
        flags += ' --large-margin-layers input layer1 features --cross-entropy-weight 1'
    args = read_flags(cifar, f'{flags} --method {names}' if names else flags)
    model = methods.attach_loss_terms(args, models.build('resnet', 7, methods.build_head(args), depth=8))
    batches = Batches(images_of(), [120.0] * 3, [60.0] * 3, 8, META, padding=4, flip=True, cutout=8)
    train_on_meta(cifar, model, batches, args)


@pytest.mark.parametrize('flags', [
    '--method amp --inner-iter 3 --perturbation global --optimizer Adam', '--method amp --perturbed-statistics',
    '--method smoothout --noise-type normal --adapt-type filter --smoothing-type tanh --perturb-batch-norm',
    '--method smoothout --adapt-type weight --optimizer RMSprop',
    '--method lsoftmax --margin 3 --beta-min 1 --nesterov',
    '--method large_margin --exact --top-k 3 --aggregate sum --norm inf',
    '--method large_margin --exact --top-k 3 --aggregate mean --norm 1', '--lr-schedule onecycle'])
def test_options_of_methods(flags, never_read):
    args = read_flags(cifar, flags)
    model = models.build('resnet', 7, methods.build_head(args), depth=8)
    train_on_meta(cifar, model, Batches(images_of(), [120.0] * 3, [60.0] * 3, 8, META), args)


SMALL = {'densenet': {'depth': 10}, 'wrn': {'depth': 10}}


@pytest.mark.parametrize('arch', ['vgg11_bn', 'preresnet', 'preactresnet18', 'lenet', 'shallow', 'mlp', *SMALL])
def test_architectures_of_small_images(arch, never_read):
    args = read_flags(cifar, '--method dma')
    with META:
        model = models.build(arch, 7, methods.build_head(args), **SMALL.get(arch, {}))
    train_on_meta(cifar, model, Batches(images_of(), [120.0] * 3, [60.0] * 3, 8, META), args)


class Drawn:
    """What folders.read_folder gives, without files."""

    def __init__(self, split):
        self.split, self.labels, self.classes = split, split.labels, split.classes
        self.class_counts = split.class_counts

    def image(self, index):
            return Image.fromarray(self.split.images[index].numpy())

    def name(self, index):
        return str(index)

    def blank(self):
        return self.image(0)


@pytest.mark.parametrize('flags', ['--method lsoftmax amp --mini-batch 4', '--mixup 0.2 --cutmix 1 --precision bf16'])
def test_photographs(flags, never_read):
    args = read_flags(imagenet, f'{flags} --workers 1')
    args.workers = 0
    batches = imagenet.make_batches(args, None, 'train', Drawn(images_of(size=40)), META)
    train_on_meta(imagenet, torchvision_models.build('resnet18', 7, methods.build_head(args)), batches, args)


def test_images_that_a_transform_changes_one_by_one(never_read):
    args = read_flags(cifar, '')
    batches = Batches(images_of(), [120.0] * 3, [60.0] * 3, 8, META, padding=4, transform=lambda image: image)
    train_on_meta(cifar, models.build('resnet', 7, depth=8), batches, args)


def test_the_meter_ends_with_what_must_be_read():
    meter = Meter(2, 7, META)
    with META:
        meter.update(torch.zeros(3, 7), torch.zeros(3, dtype=torch.long), torch.zeros(()))
    for read in (meter.read, meter.state, meter.first_bad_batch):
        with pytest.raises((NotImplementedError, RuntimeError), match='meta'):
            read()


# The lab

def subject(names='lsoftmax', precision='fp32'):
    args = read_flags(cifar, f'--method {names}')
    model = models.build('resnet', 7, methods.build_head(args), depth=8).to(META)
    return Landscape(model, Batches(images_of(), [120.0] * 3, [60.0] * 3, 8, META), precision)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('names', ['dma', 'lsoftmax'])
def test_landscape(names, precision, never_read):
    landscape = subject(names, precision)
    generator, weights = seeded_generator(0, device=META), landscape.weights
    for noise, adapt, batch_norm in (('uniform', 'none', 1), ('normal', 'filter', 0), ('normal', 'weight', 0)):
        landscape.measure(weights + landscape.noise(generator, noise, adapt, batch_norm))
    landscape.measure(weights, landscape.estimated_buffers(landscape.batches, weights))
    loss, gradient = landscape.loss_and_gradient(weights)
    product = landscape.hessian_product(gradient)
    assert loss.device == gradient.device == product.device == META and product.shape == weights.shape


@pytest.mark.parametrize('kind', ['fgsm', 'pgd'])
def test_attack(kind, never_read):
    landscape = subject()
    batches, tensors = landscape.batches, landscape.at()
    attack = Attack(kind, lambda inputs: landscape.outputs(tensors, inputs), 0.1, 3, batches.mean, batches.std,
                    seeded_generator(0, device=META))
    landscape.measure(inputs_of=attack)


# The parts, as in somebody's own loop

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_heads_and_losses_alone(dtype):
    x, targets = torch.randn(6, 8, device=META, dtype=dtype, requires_grad=True), torch.arange(6, device=META)
    head = DMA_Linear(8, 6, device=META, dtype=dtype)
    dma_loss(head(x)[1]).backward()
    loss = LargeMarginSoftmaxLoss(8, 6).to(META, dtype)
    loss(x, targets).backward()
    loss.after_step()
    assert loss.head.without_margin(loss.head(x, targets)).device == META
    LargeMarginLoss(gamma=1.0, top_k=2, approximate=False)(head(x)[0], targets, [x]).backward()
    assert x.grad.device == META


@pytest.mark.parametrize('made', [lambda params: AMP(params, 0.1, 0.5), lambda params: SmoothOut(params, 0.1, 0.1)])
def test_optimizers_alone(made):
    layer = LSoftmaxLinear(8, 6).to(META)
    optimizer = made(layer.parameters())

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 8, device=META), torch.arange(4, device=META)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).device == META
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize('wrong', [lambda x: x @ torch.ones(8, 2), lambda x: x[torch.arange(2)],
                                   lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: float(x.max())])
def test_what_a_device_would_refuse_or_wait_for_is_noticed(wrong):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wrong(torch.ones(6, 8, device=META))
