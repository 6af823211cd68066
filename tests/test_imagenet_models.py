import copy
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models._api import WeightsEnum
from torchvision.models.regnet import BlockParams

from dma import DMA_Linear, dma_loss
from lsoftmax import LSoftmaxLinear
from models import imagenet as models
from models.base import WithAuxiliary
from models.wrapped import TorchvisionClassifier
from utils import methods
from utils.eval import logits_of

# The smallest of a family, and images as small as its network takes.
FAMILIES = [('resnet18', 32), ('mobilenet_v2', 32), ('mobilenet_v3_small', 32), ('mnasnet0_5', 32),
            ('shufflenet_v2_x0_5', 32),
            ('efficientnet_b0', 32), ('densenet121', 32), ('regnet_x_400mf', 32), ('convnext_tiny', 32), ('swin_t', 32),
            ('vit_b_16', 32), ('googlenet', 32), ('inception_v3', 75)]


def real(arch, classifier=nn.Linear, size=None):
    torch.manual_seed(0)
    return models.build(arch, 10, classifier, image_size=size)


def criterion(model, *names, label_smoothing=0.0):
    args = SimpleNamespace(method=list(names), given=set(), label_smoothing=label_smoothing, dma_coef=0.5)
    return methods.build_criterion(args, model)


@pytest.fixture
def on_meta(monkeypatch):
    """Networks without memory and without initialisation; regnet computes its widths with tensors, so these have to be
    real.
    """
    widths = BlockParams.from_init_params

    def on_cpu(*args, **options):
        with torch.device('cpu'):
            return widths(*args, **options)

    monkeypatch.setattr(BlockParams, 'from_init_params', on_cpu)
    for name in [name for name in dir(nn.init) if name.endswith('_') and not name.startswith('_')]:
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
    with torch.device('meta'):
        yield


@pytest.fixture
def downloads(monkeypatch):
    """What torchvision would download is the state of the network that is put in this list."""
    source = []
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *args, **options: copy.deepcopy(source[0].state_dict()))
    return source


def test_every_torchvision_classifier_is_listed():
    assert len(set(models.MODELS)) == len(models.MODELS) > 80
    assert {'resnet50', 'vit_h_14', 'maxvit_t', 'resnext50', 'resnext101'} <= set(models.MODELS)
    assert not any('deeplab' in arch or 'rcnn' in arch or 'quantized' in arch or 'r3d' in arch for arch
                   in models.MODELS)


@pytest.mark.parametrize('arch', models.MODELS)
def test_the_head_is_found_in_every_network_but_squeezenet(arch, on_meta):
    if arch.startswith('squeezenet'):
        sentence = (f"--arch {arch} cannot take a method's head: it does not end in a linear layer "
                    'but in a Conv2d (classifier.1)')
        with pytest.raises(ValueError, match=f'^{re.escape(sentence)}$'):
            models.build(arch, 7)
        return
    model = models.build(arch, 7, DMA_Linear)
    assert isinstance(model.head, DMA_Linear) and model.head.out_features == 7
    assert model.regime == {0: {'weight_decay': 1e-4}} and model.input_transform is None
    others = [name for name, module in model.backbone.named_modules() if getattr(module, 'out_features', 0) == 7]
    assert others == {'googlenet': ['aux1.fc2', 'aux2.fc2'], 'inception_v3': ['AuxLogits.fc']}.get(arch, [])


@pytest.mark.parametrize('arch, size', FAMILIES)
def test_features_are_as_wide_as_the_head_and_the_last_thing_before_it(arch, size):
    model, images = real(arch, size=size if arch == 'vit_b_16' else None).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, logits = model.features(images), model(images)
        assert features.shape == (2, model.head.in_features) and logits.shape == (2, 10)
        assert torch.equal(model.head(features), logits)
        model.to(memory_format=torch.channels_last)
        assert torch.allclose(model(images.contiguous(memory_format=torch.channels_last)), logits, 1e-3, 1e-3)
        assert torch.allclose(model.double()(images.double()).float(), logits, 1e-3, 1e-3)


def test_without_a_method_the_network_is_torchvisions_own():
    images = torch.randn(2, 3, 64, 64)
    for arch, options in (('resnet18', {}), ('googlenet', {'init_weights': True})):
        torch.manual_seed(0)
        expected = torchvision.models.get_model(arch, num_classes=10, **options).eval()
        with torch.no_grad():
            assert torch.equal(real(arch).eval()(images), expected(images))


@pytest.mark.parametrize('arch, options, published', [
    ('resnet18', {}, 11.69), ('resnext50', {}, 25.03), ('resnext101', {'cardinality': 32, 'base_width': 8}, 88.79),
    ('vit_b_16', {}, 86.57), ('maxvit_t', {}, 30.92),
])
def test_parameter_count(arch, options, published, on_meta):
    count = sum(parameter.numel() for parameter in models.build(arch, 1000, **options).parameters())
    assert round(count / 1e6, 2) == published


@pytest.mark.parametrize('arch, options, same', [
    ('resnext50', {}, 'resnext50_32x4d'), ('resnext101', {'base_width': 8}, 'resnext101_32x8d'),
    ('resnext101', {'cardinality': 64}, 'resnext101_64x4d'),
])
def test_resnext_has_the_shapes_of_torchvisions(arch, options, same, on_meta):
    ours, theirs = (models.build(name, 5, **flags).state_dict() for name, flags in ((arch, options), (same, {})))
    assert [(name, value.shape) for name, value in ours.items()] == [(name, value.shape) for name, value
                                                                     in theirs.items()]


def test_options():
    assert models.resolve_options('resnext50',
                                  {'cardinality': None, 'base_width': 8}) == {'cardinality': 32, 'base_width': 8}
    assert models.resolve_options('resnet18', {'cardinality': None}) == {}
    sentence = '--cardinality is not used by --arch resnet18, which takes no such option'
    with pytest.raises(ValueError, match=f'^{sentence}$'):
        models.resolve_options('resnet18', {'cardinality': 8})
    with pytest.raises(ValueError, match=sentence):
        models.build('resnet18', 10, cardinality=8)


def test_image_sizes(on_meta):
    assert models.default_image_size('inception_v3') == 299 and models.default_image_size('resnet50') == 224
    preset = models.weights_preset('efficientnet_b1')
    assert preset.crop_size == [240] and preset.resize_size == [255] and len(preset.mean) == len(preset.std) == 3
    assert models.build('vit_b_16', 10, image_size=64).backbone.encoder.pos_embedding.shape == (1, 17, 768)
    assert models.build('vit_b_16', 10).backbone.encoder.pos_embedding.shape == (1, 197, 768)
    assert models.build('maxvit_t', 10, image_size=448)(torch.empty(2, 3, 448, 448)).shape == (2, 10)
    assert models.build('resnet18', 10, image_size=97)(torch.empty(2, 3, 97, 97)).shape == (2, 10)


@pytest.mark.parametrize('arch, options, sentence', [
    ('resnext50', {'pretrained': True}, '--pretrained: torchvision has no weights of resnext50'),
    ('vit_b_16', {'image_size': 100}, '--arch vit_b_16 takes images whose side is a multiple of 16 pixels, was given '
                                      '100'),
    ('maxvit_t', {'image_size': 256}, '--arch maxvit_t takes images whose side is a multiple of 224 pixels, was given '
                                      '256'),
    ('inception_v3', {'image_size': 298}, '--arch inception_v3 has an auxiliary classifier, for images of at least '
                                          '299 pixels, '
                                          'was given 298'),
    ('vit_b_16', {'image_size': 384, 'pretrained': True}, '--pretrained: the weights of vit_b_16 are for images of '
                                                          '224 pixels, '
                                                          'was given 384'),
    ('maxvit_t', {'image_size': 448, 'pretrained': True}, '--pretrained: the weights of maxvit_t are for images of '
                                                          '224 pixels, '
                                                          'was given 448'),
])
def test_what_cannot_be_is_one_sentence(arch, options, sentence):
    with pytest.raises(ValueError, match=f'^{sentence}$'):
        models.build(arch, 10, **options)
    if arch == 'resnext50':
        with pytest.raises(ValueError, match=f'^{sentence}$'):
            models.weights_preset(arch)


def test_squeezenet_is_refused_before_any_download(monkeypatch):
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *args, **options: pytest.fail('download'))
    with pytest.raises(ValueError, match="cannot take a method's head"):
        models.build('squeezenet1_1', 10, pretrained=True)


def test_targets_reach_a_head_with_a_margin():
    model, images, targets = real('resnet18', LSoftmaxLinear), torch.randn(4, 3, 32, 32), torch.arange(4)
    head, state = copy.deepcopy(model.head), copy.deepcopy(model.state_dict())
    outputs = model(images, targets)
    model.load_state_dict(state)
    assert torch.equal(outputs, head(model.features(images), targets))
    with pytest.raises(ValueError, match='needs the targets in training'):
        model(images)
    assert model.eval()(images).shape == (4, 10)


@pytest.mark.parametrize('name, size, weight, count', [('googlenet', 32, 0.3, 2), ('inception_v3', 299, 0.4, 1)])
def test_the_loss_of_auxiliary_classifiers(name, size, weight, count):
    model, images, targets = real(name), torch.randn(2, 3, size, size), torch.arange(2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        outputs = model(images, targets)
    assert isinstance(outputs, WithAuxiliary) and outputs.weight == weight
    assert [tuple(logits.shape) for logits in outputs.auxiliary] == count * [(2, 10)]
    assert logits_of(outputs) is outputs.outputs

    loss = criterion(model)(outputs, targets)
    expected = -sum(outputs.outputs.log_softmax(1)[i, i] for i in range(2)) / 2
    for logits in outputs.auxiliary:
        expected = expected - weight * sum(logits.log_softmax(1)[i, i] for i in range(2)) / 2
    assert torch.allclose(loss, expected)
    if name == 'googlenet':  # the other takes seconds
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert isinstance(model.eval()(images), torch.Tensor)


def test_auxiliary_classifiers_beside_a_methods_head(monkeypatch):
    model, images, targets = real('googlenet', DMA_Linear), torch.randn(4, 3, 32, 32), torch.arange(4)
    outputs = model(images, targets)
    (logits, cosine), auxiliary, weight = outputs
    assert logits_of(outputs) is logits and cosine.shape == (4, 10)
    shared = 0.3 * sum(F.cross_entropy(logits, targets) for logits in auxiliary)
    assert torch.allclose(criterion(model, 'dma')(outputs, targets),
                          F.cross_entropy(logits, targets) + 0.5 * dma_loss(cosine) + shared)
    monkeypatch.setitem(methods.METHODS, 'without', SimpleNamespace(cross_entropy_weight=lambda args: 0))
    assert torch.allclose(criterion(model, 'without')(outputs, targets), shared)
    smooth = [F.cross_entropy(logits, targets, label_smoothing=0.1) for logits in (logits, *auxiliary)]
    assert torch.allclose(criterion(model, label_smoothing=0.1)(outputs, targets), smooth[0] + 0.3 * sum(smooth[1:]))
    assert type(model.eval()(images)) is tuple

    model = real('googlenet', LSoftmaxLinear)
    assert model(images, targets).outputs.shape == (4, 10) and len(model(images, targets).auxiliary) == 2


class Backbone(nn.Module):
    """What torchvision's networks with auxiliary classifiers do, in four layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.aux, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8,
                                                                              10), nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        aux = self.aux(x)
        x = self.fc(self.bn(x).relu())
        return torchvision.models.GoogLeNetOutputs(x, aux, -aux) if self.training else x


def test_auxiliary_classifiers_under_compile_and_data_parallel(tmp_path):
    torch.manual_seed(0)
    model, images, targets = TorchvisionClassifier(Backbone(), 'fc', DMA_Linear,
                                                   0.3), torch.randn(4, 3, 8, 8), torch.arange(4)
    expected = copy.deepcopy(model)(images, targets)
    compiled = torch.compile(copy.deepcopy(model), backend='eager', fullgraph=True)
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        for network in (compiled, parallel):
            outputs = network(images, targets)
            assert isinstance(outputs, WithAuxiliary) and outputs.weight == 0.3
            torch.testing.assert_close((*outputs.outputs, *outputs.auxiliary), (*expected.outputs, *expected.auxiliary))
            criterion(model, 'dma')(outputs, targets).backward()
            assert all(parameter.grad is not None for parameter in network.parameters())
            assert type(network.eval()(images)) is tuple
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('arch', ['resnet18', 'googlenet'])
def test_pretrained_weights_for_the_same_classes(arch, downloads, recwarn):
    torch.manual_seed(1)
    downloads.append(torchvision.models.get_model(arch, **({'init_weights': True} if arch == 'googlenet' else {})))
    images = torch.randn(2, 3, 64, 64)
    torchvisions = torchvision.models.get_model(arch, weights='DEFAULT').eval()
    recwarn.clear()
    model, margin = models.build(arch, 1000, pretrained=True), models.build(arch, 1000, LSoftmaxLinear, pretrained=True)
    assert not recwarn.list
    preset, usual = (torch.tensor(each) for each
                     in ((models.weights_preset(arch).mean, models.weights_preset(arch).std),
                                                    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
    assert torch.equal(preset, usual) == (arch == 'resnet18')
    own, images = ((images - mean[:, None, None]) / std[:, None, None] for mean, std in (preset, usual))
    with torch.no_grad():
        expected = torchvisions(images)  # GoogLeNet maps what is normalised as usual to what its weights are for
        assert torch.allclose(model.eval()(own), expected, atol=1e-6)
        assert torch.allclose(margin.eval()(own), expected - torchvisions.fc.bias, atol=1e-5)
        torchvisions.fc = nn.Identity()  # as its new layers are so small that logits would hide a difference
        features, theirs = model.features(own), torchvisions(images)
        other = (model.features(images + 1) - theirs).abs().max()
        assert (features - theirs).abs().max() < 1e-4 * theirs.abs().max() < other
    assert torch.equal(models.build(arch, 1000, DMA_Linear, pretrained=True).head.bias, downloads[0].fc.bias)
    if arch == 'googlenet':
        assert torch.equal(model.backbone.aux1.fc2.weight, downloads[0].aux1.fc2.weight)


@pytest.mark.parametrize('arch', ['resnet18', 'googlenet'])
def test_pretrained_weights_for_other_classes(arch, downloads):
    torch.manual_seed(1)
    downloads.append(torchvision.models.get_model(arch, **({'init_weights': True} if arch == 'googlenet' else {})))
    for classifier in (nn.Linear, DMA_Linear):
        model = models.build(arch, 10, classifier, pretrained=True)
        assert type(model.head) is classifier and model.head.out_features == 10
        state, trained = model.backbone.state_dict(), downloads[0].state_dict()
        new = {name for name in trained if name not in state or not torch.equal(state[name], trained[name])}
        assert {name.split('.')[0] for name in new} == ({'fc', 'aux1', 'aux2'} if arch == 'googlenet' else {'fc'})
        outputs = model.train()(torch.randn(2, 3, 32, 32))
        assert all(logits.shape == (2, 10) for logits in getattr(outputs, 'auxiliary', [logits_of(outputs)]))


def test_a_bias_that_the_weights_lack_is_zero(downloads):
    torch.manual_seed(1)
    downloads.append(torchvision.models.maxvit_t(input_size=(224, 224)))
    head = models.build('maxvit_t', 1000, DMA_Linear, pretrained=True).head
    assert torch.equal(head.weight, downloads[0].classifier[-1].weight) and not head.bias.any()
