import argparse

import pytest
import torch

from utils.schedule import learning_rate


def rates(steps_per_epoch, **flags):
    args = argparse.Namespace(**{'lr': 0.1, 'gamma': 0.1, 'schedule': None, 'warmup': 0, **flags})
    return [learning_rate(step, steps_per_epoch, args) for step in range(args.epochs * steps_per_epoch)]


def torchs(scheduler, steps, lr=0.1, per_step=1, **options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler, result = scheduler(optimizer, **options), []
    for step in range(steps):
        result.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        if (step + 1) % per_step == 0:
            scheduler.step()
    return result


def test_step_is_multisteplr():
    expected = torchs(torch.optim.lr_scheduler.MultiStepLR, 50, per_step=5, milestones=[3, 7], gamma=0.2)
    assert rates(5, epochs=10, lr_schedule='step', schedule=[3, 7], gamma=0.2) == pytest.approx(expected)


def test_cosine_is_cosineannealinglr():
    expected = torchs(torch.optim.lr_scheduler.CosineAnnealingLR, 50, T_max=50)
    assert rates(5, epochs=10, lr_schedule='cosine') == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('warmup', [2, 3, 5])
def test_onecycle_is_onecyclelr(warmup):
    expected = torchs(torch.optim.lr_scheduler.OneCycleLR, 100, max_lr=0.1, total_steps=100, pct_start=warmup / 10,
                      cycle_momentum=False)
    assert rates(10, epochs=10, lr_schedule='onecycle', warmup=warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('schedule', ['step', 'cosine'])
def test_warmup_climbs_in_a_line_to_the_rate_and_no_further(schedule):
    values = rates(10, epochs=8, lr_schedule=schedule, schedule=[6], warmup=2)
    assert values[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert values[20] == pytest.approx(0.1) and max(values) == pytest.approx(0.1)


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'onecycle'])
@pytest.mark.parametrize('warmup', [0, 0.3, 1, 3])
@pytest.mark.parametrize('epochs, steps', [(1, 1), (3, 1), (3, 7)])
def test_every_position_has_a_rate_between_0_and_the_highest(schedule, warmup, epochs, steps):
    values = rates(steps, epochs=epochs, lr_schedule=schedule, schedule=[epochs // 2], warmup=min(warmup, epochs))
    assert len(values) == epochs * steps and all(0 <= value <= 0.1 + 1e-12 for value in values)
    assert max(values) > 0
