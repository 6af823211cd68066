"""Angles, margins, distances, collapse and calibration: against plain loops and closed forms; then the script."""
import json
import math
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from helpers import Fixed, call, contents, refused, toy_runs
from torch import nn

import measure_margins as script
from large_margin import LargeMarginLoss
from models.base import ImageClassifier
from models.cifar.airbench import WhiteningConv
from utils import memory, metrics
from utils.activations import Activations
from utils.errors import Stopped, UserError
from utils.files import read_json
from utils.lab import entries, margins as lab

runs = toy_runs(plain='-a resnet --depth 8 --val-split 0.2', method='-a lenet --method dma --val-split 0.2',
                arcface='-a mlp --method arcface')
MEANS = ('angle to the nearest class weight', 'angle to the target', 'angular margin', 'angle to the class mean')


def random_case(seed=0, number=30, classes=4, size=5):
    generator = torch.Generator().manual_seed(seed)
    features, weight = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for rows in (number, classes))
    return features, torch.randint(classes, (number,), generator=generator), weight


def angle_by_loop(a, b):
    dot = sum(p * q for p, q in zip(a.tolist(), b.tolist()))
    lengths = math.sqrt(sum(p * p for p in a.tolist())) * math.sqrt(sum(q * q for q in b.tolist()))
    return math.degrees(math.acos(dot / lengths)) if lengths else 90.0


def approximately(values):
    return {'mean': pytest.approx(np.mean(values)), '5%': pytest.approx(np.quantile(values, 0.05)),
            'median': pytest.approx(np.median(values)),
            'deviation': pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None}


# Angles

def test_angles_by_loop(monkeypatch):
    monkeypatch.setattr(lab, 'ROWS', 7)
    features, targets, weight = random_case()
    features[3], weight[2], targets[targets == 1] = 0, 0, 3  # a feature, a weight, and a class without images
    found, rows = lab.angles(features, targets, weight), []
    means = {c: features[targets == c].mean(dim=0) for c in set(targets.tolist())}
    for x, y in zip(features, targets.tolist()):
        each = [angle_by_loop(x, w) for w in weight]
        rows.append((min(each), each[y], min(each[:y] + each[y + 1:]) - each[y], angle_by_loop(x, means[y])))
    for name, values in zip(MEANS, zip(*rows)):
        assert found[name] == approximately(values)
    for what, vectors in (('class means', list(means.values())), ('class weights', list(weight))):
        pairs = [angle_by_loop(a, b) for index, a in enumerate(vectors) for b in vectors[:index]]
        assert found[f'mean angle between {what}'] == pytest.approx(np.mean(pairs))
        assert found[f'smallest angle between {what}'] == pytest.approx(min(pairs))


def test_vectors_of_zeros_are_at_a_right_angle_to_all():
    found = lab.angles(torch.zeros(3, 5), torch.tensor([0, 1, 1]), torch.zeros(4, 5))
    assert [found[name]['mean'] for name in MEANS] == [90, 90, 0, 90]
    assert found['smallest angle between class means'] == found['mean angle between class weights'] == 90


def test_one_image_has_no_deviation_and_one_class_no_angle_between_means():
    features, _, weight = random_case()
    found = lab.angles(features[:1], torch.tensor([2]), weight)
    assert found['angle to the target'] == approximately([angle_by_loop(features[0], weight[2])])
    assert found['angle to the class mean']['mean'] == pytest.approx(0, abs=1e-5)
    assert found['mean angle between class means'] is found['smallest angle between class means'] is None


# Margins

def test_margins_by_loop(monkeypatch):
    monkeypatch.setattr(lab, 'ROWS', 7)
    _, targets, _ = random_case()
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    found = lab.margins(logits, targets)
    for z, y, of_logits, of_probabilities in zip(logits.tolist(), targets.tolist(), *found.tolist()):
        p = [math.exp(one) / sum(map(math.exp, z)) for one in z]
        assert of_logits == pytest.approx(z[y] - max(z[:y] + z[y + 1:]))
        assert of_probabilities == pytest.approx(p[y] - max(p[:y] + p[y + 1:]))


def test_a_tie_is_on_the_boundary():
    """Half precision makes many: the prediction changes there, at no further distance."""
    def network(x):
        return torch.stack([x[:, 0].round(), torch.ones(len(x)) + 0 * x[:, 0]], dim=1) + 0 * x.sum(dim=1, keepdim=True)

    images, targets = torch.ones(1, 2), torch.tensor([0])
    assert lab.deepfool(network, images, targets, '2', 1).tolist() == [0]
    tied = lab.pgd(lambda x: torch.cat([x[:, :1]] * 2, dim=1), images, targets, '2', torch.tensor([1.0]), 2, 4)
    assert tied < 0.1


def test_the_product_of_spectral_norms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.BatchNorm1d(16, affine=False), nn.Linear(16, 3))
    net[1].weight.data, net[1].running_var = torch.tensor([0.5, -9.0, 1.0, 2.0]), torch.tensor([1.0, 4.0, 0.1, 9.0])
    norms = [np.linalg.svd(net[0].weight.detach().numpy().reshape(4, 27))[1][0], 9 / math.sqrt(4 + 1e-5),
             1 / math.sqrt(1 + 1e-5), np.linalg.svd(net[5].weight.detach().numpy())[1][0]]
    assert lab.log_spectral_product(net) == pytest.approx(sum(map(math.log, norms)), rel=1e-6)
    with_whitening = nn.Sequential(WhiteningConv(), net)
    more = np.linalg.svd(with_whitening[0].weight.numpy().reshape(24, 12))[1][0]
    assert lab.log_spectral_product(with_whitening) == pytest.approx(sum(map(math.log, [*norms, more])), rel=1e-6)
    net[1].running_var = None
    with pytest.raises(UserError, match='--spectral needs the statistics of BatchNorm, and 1 keeps none'):
        lab.log_spectral_product(net)


# Distances

def linear_case(classes):
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    images = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    return net, images, torch.randint(classes, (40,))


@pytest.mark.parametrize('norm, dual', [('2', 2), ('inf', 1)])
@pytest.mark.parametrize('classes', [2, 4])
def test_distances_of_a_linear_classifier_in_closed_form(norm, dual, classes):
    net, images, targets = linear_case(classes)
    weight, exact = net[1].weight.detach().numpy(), []
    for z, y in zip(net(images).tolist(), targets.tolist()):
        each = [(z[y] - z[j]) / np.linalg.norm(weight[y] - weight[j], dual) for j in range(classes) if j != y]
        exact.append(max(min(each), 0))  # 0 for what is wrong already
    by_deepfool = lab.deepfool(net, images, targets, norm, classes - 1)
    assert by_deepfool.tolist() == pytest.approx([1.02 * value for value in exact]) and 0 in exact and max(exact) > 0
    by_pgd = lab.pgd(net, images, targets, norm, by_deepfool, 20, 12)
    # On the way to the nearest boundary the second best class may change; with two classes there is one way.
    assert all(low <= value <= high for low, value, high in zip(exact, by_pgd.tolist(), by_deepfool.tolist()))
    if classes == 2:
        assert by_pgd.tolist() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize('norm', ['2', 'inf'])
def test_perturbations_that_are_reported_change_the_prediction(norm):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)).double()
    images, seen = torch.randn(30, 3, 4, 4, dtype=torch.float64), []
    targets = net(images).argmax(dim=1)

    def network(inputs):
        logits = net(inputs)
        seen.extend((x.detach(), z.argmax().item()) for x, z in zip(inputs, logits))
        return logits

    by_deepfool = lab.deepfool(network, images, targets, norm, 2)
    by_pgd = lab.pgd(network, images, targets, norm, by_deepfool, 10, 6)
    for image, y, first, second in zip(images, targets.tolist(), by_deepfool.tolist(), by_pgd.tolist()):
        changed = [torch.linalg.vector_norm(x - image, float(norm)).item() for x, predicted in seen if predicted != y]
        assert any(first == pytest.approx(length) for length in changed)
        assert 0 < second <= first and min(changed) <= second * (1 + 1e-9)
    assert (by_pgd < 0.999 * by_deepfool).any()
    alone = [lab.deepfool(net, image[None], y[None], norm, 1).item() for image, y in zip(images, targets)]
    assert lab.deepfool(net, images, targets, norm, 1).tolist() == pytest.approx(alone)


@pytest.mark.parametrize('norm', ['2', 'inf'])
def test_where_there_is_no_slope_nothing_is_found(norm):
    def network(inputs):
        return torch.stack((inputs.flatten(1).sum(dim=1) * 0 + 1, inputs.flatten(1).sum(dim=1) * 0), dim=1)

    found = lab.deepfool(network, torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 0]), norm, 1)
    assert found.tolist() == [math.inf, 0, math.inf]
    assert lab.pgd(network, torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 0]), norm, found, 2, 2).equal(found)
    assert lab.summary(found) == {'mean': 0, 'deviation': None, '5%': 0, 'median': 0, 'not found': 2}
    assert lab.summary(found[:1]) == {'mean': None, 'deviation': None, '5%': None, 'median': None, 'not found': 1}
    assert script.text(lab.summary(found[:1])) == '-, 1 not found' and script.text(None) == '-'


class Tiny(ImageClassifier):
    def __init__(self, num_classes=3, classifier=nn.Linear):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(12, 6), nn.Tanh())
        self.set_head(6, num_classes, classifier)

    def features(self, x):
        return self.layer(x.flatten(1))


def test_first_order_distances_are_those_of_large_margin_by_loop():
    torch.manual_seed(0)
    net, images, targets = Tiny().double().eval(), torch.randn(8, 3, 2, 2, dtype=torch.float64), torch.arange(8) % 3
    found = lab.first_order(net, Activations(net, ['input', 'features']), images, targets, 2)
    for index, (image, y) in enumerate(zip(images, targets.tolist())):
        for name, start in (('input', image[None]), ('features', net.features(image[None]).detach())):
            start.requires_grad_()
            p = (net(start) if name == 'input' else net.head(start)).softmax(dim=1)[0]
            slopes = [(torch.autograd.grad(p[y] - p[j], start, retain_graph=True)[0], p[y] - p[j]) for j in range(3)
                      if j != y]
            for norm, dual in (('1', math.inf), ('2', 2), ('inf', 1)):
                expected = min(d.item() / np.linalg.norm(slope.flatten().numpy(), dual) for slope, d in slopes)
                assert found[name, norm][index].item() == pytest.approx(expected, rel=1e-6)
    x = images.clone().requires_grad_()
    loss = LargeMarginLoss(gamma=0.5, top_k=2, norm='inf')(net(x), targets, [x])
    assert loss.item() == pytest.approx(-found['input', 'inf'].clamp(-1.5, 0.5).mean().item())
    assert all(p.grad is None for p in net.parameters())


def test_no_gradient_is_computed_twice_or_in_vain(monkeypatch):
    torch.manual_seed(0)
    net, images, calls = Tiny().double().eval(), torch.randn(8, 3, 2, 2, dtype=torch.float64), []
    targets, grad = net(images).argmax(dim=1), torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *args, **options: calls.append(args) or grad(*args, **options))
    lab.first_order(net, Activations(net, ['input', 'features']), images, targets, 2)
    assert len(calls) == 2  # other classes; the three norms and the layers share them
    calls.clear()
    lab.deepfool(net, images, targets, '2', 2, steps=1)
    assert len(calls) == 2  # nothing moves after the last step
    calls.clear()
    lab.pgd(net, images, targets, '2', torch.ones(8, dtype=torch.float64), 5, 3)
    assert len(calls) == 3 * 5


def test_the_first_order_distance_of_two_classes_in_closed_form():
    net, images, targets = linear_case(2)
    net = net.requires_grad_(False)
    weight, z = (net[1].weight[0] - net[1].weight[1]).numpy(), net(images)
    activations = types.SimpleNamespace(names=['input'], read=lambda: [images.requires_grad_()])
    found = lab.first_order(lambda x: net(x.requires_grad_()), activations, images, targets, 1)
    margin = z.gather(1, targets[:, None]).squeeze(1) - z.gather(1, 1 - targets[:, None]).squeeze(1)
    for norm, dual in (('1', math.inf), ('2', 2), ('inf', 1)):
        assert found['input', norm].tolist() == pytest.approx((margin.sinh() / np.linalg.norm(weight, dual)).tolist(),
                                                              rel=1e-5)


# Neural collapse

@pytest.mark.parametrize('balanced', [True, False])
def test_collapse_by_loop(balanced):
    features, targets, weight = random_case(number=40, size=7)
    targets = torch.arange(40) % 3 if balanced else targets.clamp(max=2)  # no image of class 3
    found = list(lab.collapse(features, targets, weight).values())
    means = [features[targets == c].mean(dim=0).numpy() for c in range(3)]
    centre, S_W, S_B = np.mean(means, axis=0), np.zeros((7, 7)), np.zeros((7, 7))
    for c in range(3):
        inside = [x.numpy() - means[c] for x in features[targets == c]]
        S_W += np.mean([np.outer(x, x) for x in inside], axis=0) / 3
        S_B += np.outer(means[c] - centre, means[c] - centre) / 3
    M = np.array(means) - centre
    norms, unit = np.linalg.norm(M, axis=1), M / np.linalg.norm(M, axis=1)[:, None]
    angles = np.mean([abs(unit[a] @ unit[b] + 1 / 2) for a in range(3) for b in range(3) if a != b])
    W = weight[:3].numpy()
    expected = [np.trace(S_W @ np.linalg.pinv(S_B, rcond=1e-10)) / 3, norms.std() / norms.mean(), angles,
                np.sum((W / np.linalg.norm(W) - M / np.linalg.norm(M)) ** 2)]
    assert found == pytest.approx(expected)


def test_a_simplex_is_collapsed_and_equal_means_are_not_defined():
    simplex = torch.eye(4, dtype=torch.float64) - 1 / 4
    targets = torch.arange(12) % 4
    assert list(lab.collapse(3 * simplex[targets] + 5, targets, simplex).values()) == pytest.approx([0] * 4, abs=1e-12)
    zeros = list(lab.collapse(simplex[targets], targets, torch.zeros(4, 4)).values())
    assert zeros == pytest.approx([0, 0, 0, 1], abs=1e-12)
    features, targets, weight = random_case()
    for case in ((features, targets * 0), (torch.zeros(30, 5), targets), (features[:1], targets[:1])):
        assert list(lab.collapse(*case, weight).values()) == [None] * 4


# Calibration

def test_the_temperature_is_the_best_and_undoes_a_factor():
    random = np.random.default_rng(0)
    logits = torch.tensor(random.standard_normal((4000, 3)))
    targets = torch.tensor([random.choice(3, p=p) for p in logits.softmax(dim=1).numpy()])
    best = lab.best_temperature(3 * logits, targets)
    assert best == pytest.approx(3 * lab.best_temperature(logits, targets), rel=1e-4) == pytest.approx(3, rel=0.1)

    def loss_by_loop(temperature):
        return -np.mean([math.log(math.exp(z[y] / temperature) / sum(math.exp(one / temperature) for one in z))
                         for z, y in zip((3 * logits).tolist(), targets.tolist())])

    assert lab.mean_loss(3 * logits, targets, best) == pytest.approx(loss_by_loop(best))
    assert loss_by_loop(best) < min(loss_by_loop(0.99 * best), loss_by_loop(1.01 * best))
    assert lab.best_temperature(0.01 * torch.eye(3), torch.arange(3)) == pytest.approx(0.01, rel=1e-3)  # all right


# The script

SHORT = '--images 12 -b 6 --pgd-steps 2 --bisections 2'


def results(path):
    return {entry['measure']: entry['result'] for entry in json.loads(path.read_text())}


def test_all_measures_of_several_checkpoints_in_a_table_and_in_json(runs, monkeypatch, capsys, tmp_path):
    before = {name: contents(runs / name) for name in ('plain', 'method')}
    files = ' '.join(f'{runs}/{name}/checkpoint.pth.tar' for name in before)
    call(monkeypatch, script, f'{files} --all --layers input layer1 features {SHORT} -o {tmp_path}')
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith('|')]
    assert table[0] == '|  | plain/checkpoint | method/checkpoint |' and {line.count('|') for line in table} == {4}
    assert 'nan' not in printed and '12 test images, fp32' in printed
    for name in before:
        found = results(tmp_path / f'{name}-checkpoint-margins.json')
        assert list(found) == list(script.MEASURES)
        assert len(table) == 2 + sum(map(len, found.values()))
        for norm in ('2', 'inf'):
            by_deepfool, by_pgd = (found['distances'][f'upper bound by {by}, norm {norm}']
                                   for by in ('DeepFool', 'PGD'))
            assert 0 <= by_pgd['mean'] <= by_deepfool['mean']
        assert contents(runs / name) == before[name]


def test_the_numbers_agree_with_those_of_the_run_and_of_a_pass_by_hand(runs, monkeypatch, tmp_path):
    call(monkeypatch, script, f'{runs}/method/checkpoint.pth.tar --margins --calibration -o {tmp_path}')
    found = results(tmp_path / 'method-checkpoint-margins.json')
    run = json.loads((runs / 'method/result.json').read_text())
    assert found['margins']['top-1 (%)'] == pytest.approx(run['test top-1'])
    assert found['calibration']['loss (NLL)'] == pytest.approx(run['test loss'], rel=1e-5)
    assert found['calibration']['calibration error (%)'] == pytest.approx(run['test calibration error'], rel=1e-4)
    assert 'spectrally normalised margin' not in found['margins']


@pytest.mark.parametrize('flags', ['--precision fp64', '--precision bf16', '--mode train', '--mode train --no-augment'])
def test_other_precisions_and_images(flags, runs, monkeypatch, tmp_path):
    call(monkeypatch, script, f'{runs}/arcface/checkpoint.pth.tar {flags} --all {SHORT} -o {tmp_path}')
    found = results(tmp_path / 'arcface-checkpoint-margins.json')
    assert list(found) == ['angles', 'margins', 'distances', 'collapse']
    assert 0 < found['angles']['angle to the nearest class weight']['mean'] < 180


def test_one_image(runs, monkeypatch, capsys, tmp_path):
    call(monkeypatch, script, f'{runs}/plain/checkpoint.pth.tar --all {SHORT} --images 1 -o {tmp_path}')
    found = results(tmp_path / 'plain-checkpoint-margins.json')
    assert found['angles']['angular margin']['deviation'] is None and found['collapse'].popitem()[1] is None
    assert 'nan' not in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again_and_what_is_new_is_added(runs, monkeypatch, capsys, tmp_path):
    shutil.copytree(runs / 'plain', tmp_path / 'plain')
    command, path = f'{tmp_path}/plain/checkpoint.pth.tar --images 20', tmp_path / 'plain/checkpoint-margins.json'
    call(monkeypatch, script, command)
    first, printed = path.read_bytes(), capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(script.View, 'outputs_on', lambda *args: pytest.fail('measured again'))
        call(monkeypatch, script, f'{command} --angles --margins')
    assert path.read_bytes() == first and capsys.readouterr().out == printed
    call(monkeypatch, script, f'{command} --margins --spectral')
    call(monkeypatch, script, f'{command} --margins --mode train')
    held = json.loads(path.read_text())
    assert held[:2] == json.loads(first) and [entry['measure'] for entry in held] == ['angles'] + ['margins'] * 3
    assert held[2]['result']['log10 of the product of norms'] > 0 and not held[1]['settings']['spectral']
    assert [entry['settings']['images']['mode'] for entry in held] == ['test'] * 3 + ['train']
    call(monkeypatch, script, f'{command} --margins --precision fp64')
    *_, last = json.loads(path.read_text())
    assert last['settings']['precision'] == 'fp64' and last['settings']['checkpoint'] == held[0]['settings'][
        'checkpoint']


def test_what_another_process_adds_meanwhile_is_kept(tmp_path):
    """Two commands measure one checkpoint at once, and the second is ready before the first. Each entry has its own
    flags, and no other's.
    """
    path, settings, args, measures = str(tmp_path / 'held.json'), {'a': 1}, types.SimpleNamespace(factor=2, rise=1), {}

    def measure(name):
        return entries.measured(name, measures, args, settings, (), path, lambda *result: None, torch.device('cpu'))

    measures |= {'fast': (lambda factor: factor, ('factor',)),
                 'slow': (lambda rise: measure('fast')['result'] + rise, ('rise',))}
    assert measure('slow')['result'] == 3 and settings == {'a': 1}
    assert [(entry['measure'], entry['settings'], entry['result']) for entry in read_json(path)] == [
        ('fast', {'a': 1, 'factor': 2}, 2), ('slow', {'a': 1, 'rise': 1}, 3)]


def test_one_pass_serves_four_measures(runs, monkeypatch, tmp_path):
    passes, outputs_on = [], script.View.outputs_on
    monkeypatch.setattr(script.View, 'outputs_on', lambda *args: passes.append(args) or outputs_on(*args))
    call(monkeypatch, script, f'{runs}/plain/checkpoint.pth.tar --angles --margins --collapse --calibration -o '
                              f'{tmp_path}')
    assert [len(batches.labels) for _, batches in passes] == [60, 32]  # the second is over the validation images


def test_what_is_broken_off_keeps_what_was_measured(runs, monkeypatch, tmp_path):
    def stopped(*args, **options):
        raise Stopped(signal.SIGINT)

    monkeypatch.setitem(script.MEASURES, 'collapse', (stopped, ()))
    with pytest.raises(Stopped) as stop:
        call(monkeypatch, script, f'{runs}/plain/checkpoint.pth.tar --angles --collapse -o {tmp_path}')
    assert list(results(tmp_path / 'plain-checkpoint-margins.json')) == ['angles'] and 'goes on' in stop.value.sentence


@pytest.mark.parametrize('flags, sentence', [
    ('', 'a checkpoint is required: FILE'),
    ('{}/plain/checkpoint.pth.tar --pgd-steps 3', '--pgd-steps is used by --distances, which is not asked for'),
    ('{}/plain/checkpoint.pth.tar --collapse --spectral', '--spectral is used by --margins, which is not asked for'),
    ('{}/plain/checkpoint.pth.tar --distances --top-k 0', 'must be a whole number of at least 1'),
    ('{}/plain/checkpoint.pth.tar --distances --layers layer9', "plain/checkpoint.pth.tar: there is no layer 'layer9'"),
    ('{}/plain/checkpoint.pth.tar --distances --layers input input', 'a layer is named twice'),
    ('{}/arcface/checkpoint.pth.tar --calibration', 'so it needs runs with --val-split, and {}/arcface/checkpoint'),
    ('{}/plain/checkpoint.pth.tar --calibration --mode val', 'so it needs --mode test or train'),
    ('{}/plain/checkpoint.pth.tar -o {out}', 'is not what this script writes'),
])
def test_a_mistake_is_one_sentence_before_any_data_is_read(flags, sentence, runs, monkeypatch, tmp_path, capsys):
    (tmp_path / 'plain-checkpoint-margins.json').write_text('[{"measure": "angles", "result": {"a": [1]}}]')
    flags = flags.replace('{}', str(runs)).format(out=tmp_path)
    assert sentence.replace('{}', str(runs)) in refused(monkeypatch, capsys, tmp_path, flags, script)


def view_of(model, number=5):
    args = types.SimpleNamespace(precision='fp32')
    view = script.View(types.SimpleNamespace(model=model.eval(), path='FILE', args=args), ['input'])
    view.batches = Fixed([(torch.randn(number, 3, 2, 2), torch.arange(number) % 3)], 3)
    return view


def test_what_cannot_be_measured_is_one_sentence(monkeypatch):
    deep = Tiny(classifier=lambda size, classes: nn.Sequential(nn.Linear(size, 4), nn.Linear(4, classes)))
    with pytest.raises(UserError, match='--angles and --collapse need a head with a weight of 3 classes x 6 features, '
                                        'and that of FILE is a Sequential without one'):
        view_of(deep).weight(script.NEED_WEIGHT)
    assert script.margins(view_of(deep), False)['logit margin']['deviation'] > 0
    broken = Tiny()
    broken.head.weight.data.fill_(math.nan)
    for function, own in ((script.margins, [False]), (script.distances, [['input'], 2, 2, 2])):
        with pytest.raises(UserError, match='the network of FILE gives NaN or infinite numbers for 5 of 5 images'):
            function(view_of(broken), *own)
    monkeypatch.setattr(memory, 'free', lambda device: 100)
    with pytest.raises(UserError, match='the features and logits of 5 images take .* give a smaller --images'):
        view_of(Tiny()).outputs


def test_a_layer_of_zeros_has_no_spectral_margin_and_calibration_is_that_of_metrics():
    model = Tiny()
    model.head.weight.data.zero_()
    found = script.margins(view_of(model), True)
    assert found['spectrally normalised margin'] is found['log10 of the product of norms'] is None
    view = view_of(Tiny(), 9)
    view.validation = view.batches
    _, logits, targets = view.outputs
    found = script.calibration(view)
    after = metrics.calibration_error((logits / found['temperature']).softmax(dim=1).numpy(), targets.numpy())
    assert found['calibration error after it (%)'] == pytest.approx(100 * after)
    assert found['loss after it'] <= found['loss (NLL)']
