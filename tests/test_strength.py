"""--method-start and --method-ramp, and whatever else follows the position in training."""
import copy

import pytest
import torch

import center
import cifar
import helpers
from helpers import broken_off, call, refused, unrecorded
from models import cifar as models
from utils import methods, schedule, strength
from utils.batches import Batches, Split
from utils.errors import UserError
from utils.run import validate

SHORT = '-d digits --depth 8 --lr-schedule onecycle --train-batch 16 --manualSeed 3'


class Training:
    """Steps of cifar.py on random images, four an epoch, without a folder."""

    def __init__(self, flags, dtype=torch.float32):
        parser = cifar.make_parser()
        self.args = parser.parse_args(f'--train-batch 8 --manualSeed 1 --lr 0.05 --epochs 2 {flags}'.split())
        methods.check_arguments(self.args, parser)
        validate(self.args, None, None, parser, torch.nn.Linear(1, 1))
        torch.manual_seed(0)
        split = Split(torch.randint(256, (32, 32, 32, 3), dtype=torch.uint8), torch.arange(32) % 7 % 4, list('abcd'))
        self.model = models.build('resnet', 4, methods.build_head(self.args), depth=8)
        methods.attach_loss_terms(self.args, self.model).to(dtype)
        self.batches = Batches(split, *split.mean_and_std(), 8, 'cpu')
        self.batches.mean, self.batches.std = self.batches.mean.to(dtype), self.batches.std.to(dtype)
        self.optimizer = methods.build_optimizer(self.args, self.model, len(self.batches))
        self.criterion = methods.build_criterion(self.args, self.model, self.batches.class_counts)
        self.run = unrecorded(self.args, self.model, self.optimizer, self.batches)

    def train(self, epoch):
        cifar.train(self.run, self.criterion, self.optimizer, epoch, self.args)
        return {name: value.clone() for name, value in self.model.state_dict().items() if name != 'head.beta'}


def args_with(flags):
    return cifar.make_parser().parse_args(flags.split())


def test_the_strength_is_a_function_of_the_position():
    args = args_with('--method amp --method-start 0.3 --method-ramp 0.4')
    assert [strength.at(step, 10, args) for step in range(11)] == pytest.approx(
        [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    args = args_with('--method amp --method-start 0.7')
    assert [strength.at(step, 10, args) for step in range(10)] == [0] * 7 + [1] * 3
    assert strength.at(0, 10, args_with('--method amp')) == 1
    assert strength.at(0, 10, args_with('--method amp --method-ramp 1')) == 0


# What is plain training for each of them: without the method, but heads that have another form stay.
@pytest.mark.parametrize('flags, plain', [
    ('dma', ''), ('amp --epsilon 0.1', ''), ('amp --epsilon 0.1 --climb-fraction 0.5', ''),
    ('smoothout --ss 0.1', ''), ('smoothout --ss 0.1 --smoothing-type tanh', ''),
    ('large_margin --large-margin-layers input layer1', ''), ('sam --rho 0.5', ''),
    ('sam --direction momentum --rho 0.5', ''), ('hinge', ''), ('logit_adjustment --tau 2', ''),
    ('dma large_margin amp --cross-entropy-weight 0.3', ''),
    ('lsoftmax --margin 2 --beta 0', '--method lsoftmax --margin 3 --method-start 0.85'),
    ('arcface', '--method arcface --angular-margin 0'),
])
def test_before_its_start_a_method_changes_no_bit(flags, plain):
    mode = '--mini-batch 4' if 'amp' in flags or 'smoothout' in flags else ''
    late, without = Training(f'{mode} --method {flags} --method-start 0.5'), Training(f'{mode} {plain}')
    for epoch in range(2):
        ours, expected = late.train(epoch), without.train(epoch)
        same = all(torch.equal(ours[name], value) for name, value in expected.items())
        assert same == (epoch == 0), epoch


def test_before_its_start_a_method_costs_nothing():
    training, passes, inputs = Training('--method amp large_margin --method-start 0.5 --cross-entropy-weight 1'), [], []
    training.model.conv1.register_forward_pre_hook(lambda module, images: inputs.append(images[0].requires_grad))
    training.model.register_forward_pre_hook(lambda *_: passes.append(1))
    training.train(0)
    assert len(passes) == 4 and not any(inputs)
    training.train(1)
    assert len(passes) == 4 + 8 and all(inputs[4:])

    training = Training('--method smoothout --method-start 0.5')
    before = training.optimizer.generator.get_state()
    training.train(0)
    assert torch.equal(training.optimizer.generator.get_state(), before)
    training.train(1)
    assert not torch.equal(training.optimizer.generator.get_state(), before)


def test_on_the_ramp_each_number_grows_linearly():
    for flags, option, full in (('amp --epsilon 0.4', 'epsilon', 0.4), ('smoothout --ss 0.2', 'ss', 0.2),
                                ('sam --rho 0.8', 'rho', 0.8)):
        training, seen = Training(f'--method {flags} --method-start 0.25 --method-ramp 0.5'), []
        training.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0][option]))
        training.train(0), training.train(1)
        assert seen == pytest.approx([full * share for share in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1)])


@pytest.mark.parametrize('weight', [0.0, 0.3, 1.0, 2.0])
def test_on_the_ramp_the_loss_goes_from_cross_entropy_to_that_of_the_method(weight):
    training = Training(f'--method large_margin --cross-entropy-weight {weight} --large-margin-coef 0.7 '
                        '--large-margin-gamma 2')
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6) % 4
    model, losses = training.model.eval(), {}
    for share in (0.0, 0.25, 1.0):
        training.criterion.before_step(0.0, share)
        losses[share] = training.criterion(model(images), targets).item()
    cross_entropy = torch.nn.functional.cross_entropy(model(images), targets).item()
    assert losses[0.0] == pytest.approx(cross_entropy)
    assert losses[0.25] == pytest.approx(0.75 * cross_entropy + 0.25 * losses[1.0], rel=1e-5)


@pytest.mark.parametrize('flags, margin_is_linear', [('lsoftmax --margin 3 --beta 2 --beta-gamma 0', True),
                                                     ('arcface --angular-margin 0 --cosine-margin 0.4', True)])
def test_on_the_ramp_a_head_has_part_of_its_margin(flags, margin_is_linear):
    head, features, targets = Training(f'--method {flags}').model.head, torch.randn(5, 64), torch.arange(5) % 4
    logits = {}
    for share in (0.0, 0.25, 1.0):
        head.before_step(0.5, share)
        logits[share] = head(features, targets)
    torch.testing.assert_close(logits[0.25], 0.75 * logits[0.0] + 0.25 * logits[1.0])
    assert torch.equal(logits[0.0], head.eval()(features)) and not torch.equal(logits[0.0], logits[1.0])


def test_the_parameters_of_a_term_have_gradients_of_0_before_its_start(monkeypatch):
    monkeypatch.setitem(methods.METHODS, 'center', center)
    training = Training('--method center --center-coef 0.1 --method-start 0.5')
    centres = training.model.loss_terms['center'].centres.detach().clone()
    after = training.train(0)
    assert torch.equal(after['loss_terms.center.centres'], centres)  # and DistributedDataParallel has its gradient
    assert training.model.loss_terms['center'].centres.grad.abs().sum() == 0
    assert not torch.equal(training.train(1)['loss_terms.center.centres'], centres)


def test_a_criterion_of_ones_own_is_left_alone():
    training = Training('--method amp --method-start 0.5')
    training.criterion = lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets)
    training.train(0)
    assert training.optimizer.param_groups[0]['epsilon'] == 0


@pytest.mark.parametrize('flags', ['lsoftmax large_margin amp --margin 2 --cross-entropy-weight 1 --clip-norm 5',
                                   'ldam sam --adaptive --climb-fraction 0.25 --deferred 0.5 --mini-batch 8'])
def test_interrupted_on_the_ramp_and_resumed(flags, few_digits, monkeypatch, tmp_path):
    flags = f'{SHORT} --epochs 3 --method {flags} --method-start 0.2 --method-ramp 0.5'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/parts', epoch=1)
    call(monkeypatch, cifar, f'--resume {tmp_path}/parts/checkpoint.pth.tar')
    whole, parts = (torch.load(tmp_path / name / 'checkpoint.pth.tar', weights_only=True) for name
                    in ('whole', 'parts'))
    assert all(torch.equal(value, parts['state_dict'][name]) for name, value in whole['state_dict'].items())
    assert schedule.made_with(whole['optimizer']['param_groups'][0]) == parts['optimizer']['param_groups'][0][
        'made_with']


def test_a_checkpoint_from_before_beta_had_a_schedule_resumes_with_its_decay(few_digits, monkeypatch, tmp_path):
    flags = f'{SHORT} --epochs 2 --method lsoftmax --margin 2 --beta-schedule decay'
    call(monkeypatch, cifar, f'{flags} -c {tmp_path}/whole')
    broken_off(monkeypatch, f'{flags} -c {tmp_path}/old', epoch=1)
    from utils import checkpoint
    path = tmp_path / 'old/checkpoint.pth.tar'
    state = checkpoint.read(str(path))
    for name in ('beta_schedule', 'beta_gamma', 'beta_power', 'method_start', 'method_ramp'):
        del state['args'][name]
    state['args']['beta'], state['trained_with']['beta'] = 100.0, 100.0  # the default then
    checkpoint.save(str(path), state)
    call(monkeypatch, cifar, f'--resume {path}')
    whole, old = (torch.load(tmp_path / name / 'checkpoint.pth.tar', weights_only=True) for name in ('whole', 'old'))
    assert whole['state_dict']['head.beta'].item() == pytest.approx(100 * 0.99 ** 10, rel=1e-5)
    assert all(torch.equal(value, old['state_dict'][name]) for name, value in whole['state_dict'].items())


@pytest.mark.parametrize('flags, sentence', [
    ('--method-start 0.5', 'need a --method whose strength they scale'),
    ('--method-ramp 0.5', 'need a --method whose strength they scale'),
    ('--method amp --method-start 1', '--method-start must be less than 1'),
    ('--method amp --method-start 1.5', 'must be a number of at least 0 and at most 1, was given 1.5'),
    ('--method amp --method-start 0.7 --method-ramp 0.5',
     '--method-start 0.7 and --method-ramp 0.5 are more than the whole training'),
    ('--method lsoftmax --beta-decay 0.9', '--beta-decay belongs to --beta-schedule decay, not position'),
    ('--method lsoftmax --beta-schedule decay --beta-power 3', '--beta-power belongs to --beta-schedule position'),
    ('--method lsoftmax --margin 1 --beta-schedule decay', '--beta-schedule does nothing with --margin 1'),
    ('--method amp --inner-iter 0 --climb-fraction 0.5', '--climb-fraction does nothing with --inner-iter 0'),
    ('--method amp --epsilon 0 --climb-fraction 0.5', '--climb-fraction does nothing with --epsilon 0, which is plain'),
    ('--method sam --rho 0 --adaptive', '--adaptive does nothing with --rho 0, which is plain SGD'),
    ('--method sam --rho 0 --direction momentum', '--direction does nothing with --rho 0, which is plain SGD'),
    ('--method sam --rho 0 --climb-fraction 0.5', '--climb-fraction does nothing with --rho 0, which is plain SGD'),
    ('--method amp --climb-fraction 0', 'climb_fraction must be a number above 0 and at most 1, was given 0'),
    ('--method sam --direction momentum --climb-fraction 0.5', '--climb-fraction belongs to --direction gradient'),
    ('--method sam --eta 0.01', '--eta belongs to --adaptive'),
    ('--method large_margin --layer-weights few', 'must be numbers or the word elements, was given few'),
    ('--method large_margin --layer-weights elements 1', "layer_weights must be numbers above 0, or 'elements'"),
    ('--method arcface --angular-margin 3.2', 'angular_margin must be at least 0 and below pi radians'),
    ('--method lsoftmax arcface', 'each brings its own head'), ('--method ldam arcface', 'each brings its own head'),
    ('--method amp sam', 'each brings its own optimizer'),
    ('--method amp --epsilon 0 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method amp --inner-iter 0 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method dma --coef 0 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method large_margin --coef 0', '--large-margin-coef 0 leaves nothing to train on'),
    ('--method dma sam --dma-coef 0 --rho 0 --method-ramp 0.5', 'scale a strength that is 0 here'),
    ('--method lsoftmax --margin 1 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method arcface --angular-margin 0 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method logit_adjustment --tau 0 --method-start 0.5', 'scale a strength that is 0 here'),
    ('--method ldam --deferred 1 --reweight-beta 0.9', '--reweight-beta does nothing with --deferred 1'),
    ('--method ldam --deferred 0.5 --reweight-beta 0', '--deferred does nothing with --reweight-beta 0, with which'),
    ('--method ldam --max-margin -1', 'max_margin must be a number of at least 0, was given -1'),
    ('--method logit_adjustment --tau -1', 'tau must be a number of at least 0, was given -1'),
    ('-a lenet --method smoothout --perturb-batch-norm', '--perturb-batch-norm does nothing in a network without'),
    ('-a lenet --method sam --perturbed-statistics', '--perturbed-statistics does nothing in a network without'),
    ('--climb-fraction 0.5', '--climb-fraction is a flag of --method amp or sam, which is not selected'),
])
def test_what_cannot_work_is_refused(flags, sentence, monkeypatch, capsys, tmp_path):
    assert sentence in refused(monkeypatch, capsys, tmp_path, f'-d digits {flags}')


@pytest.mark.parametrize('flags, fraction, sizes', [
    ('', 0.25, [[2], [8]]), ('', 0.3, [[4], [8]]), ('', 0.99, [[8], [8]]), ('--mini-batch 4', 0.25, [[4], [4, 4]]),
    ('--mini-batch 4 --batch-multiplier 2', 0.25, [[4], [4, 4, 4, 4]]),
    ('--mini-batch 4 --batch-multiplier 2', 0.4, [[4, 4], [4, 4, 4, 4]]),
    ('--batch-multiplier 2', 0.75, [[8, 4], [8, 8]]), ('--train-batch 9', 0.25, [[4], [9]])])
def test_climbing_on_a_part_is_a_step_of_sam_by_hand(flags, fraction, sizes):
    training = Training(f'--momentum 0 --wd 0 --lr-schedule step {flags} --method sam --rho 0.3 '
                        f'--climb-fraction {fraction}', torch.float64)
    size = training.args.train_batch * training.args.batch_multiplier
    training.batches.batch_size = size
    batch, passes = next(iter(training.run.steps(0)))[1], []
    training.model.register_forward_pre_hook(lambda model, inputs: passes.append(len(inputs[0])))
    by_hand = copy.deepcopy(training.model)
    training.run.steps = lambda epoch: iter([(0, batch)])
    measured = cifar.train(training.run, training.criterion, training.optimizer, 0, training.args)
    assert passes == [size for each in sizes for size in each]

    def gradient(parts):
        by_hand.train().zero_grad()
        losses, images, targets = [], batch.images, batch.targets
        for part in parts:
            loss = torch.nn.functional.cross_entropy(by_hand(images[:part]), targets[:part], reduction='sum')
            (loss / sum(parts)).backward()
            losses.append(loss.item())
            images, targets = images[part:], targets[part:]
        return [p.grad.clone() for p in by_hand.parameters()], sum(losses) / sum(parts)

    climb, _ = gradient(sizes[0])
    length = torch.cat([g.flatten() for g in climb]).norm()
    theta = [p.detach().clone() for p in by_hand.parameters()]
    with torch.no_grad():
        for p, g in zip(by_hand.parameters(), climb):
            p.add_(0.3 * g / length)
    statistics = [buffer.clone() for buffer in by_hand.buffers()]
    descent, loss = gradient(sizes[1])
    for ours, start, g in zip(training.model.parameters(), theta, descent):
        torch.testing.assert_close(ours, start - 0.05 * g, rtol=1e-9, atol=1e-12)
    assert measured['Loss'] == pytest.approx(loss)  # of the pass over the whole batch, at the perturbed weights
    for ours, expected in zip(training.model.buffers(), statistics):
        torch.testing.assert_close(ours, expected)  # of the climb, at theta


@pytest.mark.parametrize('flags, sentence', [
    ('--method dma --method-start 0.99', 'with --method-start 0.99 no step is left to --method dma, whose strength'),
    ('--method dma --method-start 0.95 --method-ramp 0.05', 'with --method-start 0.95 and --method-ramp 0.05 no'),
    ('--method ldam --deferred 0.96', '--deferred 0.96 leaves no step to what begins there: the last of 20 begins'),
])
def test_a_training_that_ends_before_a_method_begins_is_refused(flags, sentence, monkeypatch, tmp_path):
    helpers.few_digits(monkeypatch, 160, 20)
    with pytest.raises(UserError, match=sentence):
        call(monkeypatch, cifar, f'-d digits -a lenet --epochs 2 --train-batch 16 {flags} -c {tmp_path}/a')
    enough = flags.replace('0.99', '0.95').replace('0.96', '0.95').replace('start 0.95 --method-ramp', 'start')
    call(monkeypatch, cifar, f'-d digits -a lenet --epochs 2 --train-batch 16 {enough} -c {tmp_path}/b')
