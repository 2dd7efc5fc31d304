"""Learning rate, optimizer and average against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from medray.training.finetuning import Phase
from medray.training.optim import (
    Optimizer,
    build_average,
    build_optimizer,
)
from medray.training.schedule import Schedule, learning_rate, plateau_drops


def rates(
    schedule: Schedule, steps: int, scores: tuple[float, ...] = ()
) -> list[float]:
    total = steps * schedule.epochs
    return [
        learning_rate(step, steps, scores[: step // steps], 2.0, schedule)
        for step in range(total)
    ]


def test_cosine_rises_to_its_highest_and_falls_to_nothing() -> None:
    found = rates(Schedule(epochs=10, warmup=0.1), 10)
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10)
    falling = [1 + math.cos(math.pi * k / 90) for k in range(90)]
    np.testing.assert_allclose(found[10:], falling)


def test_staircase_drops_after_so_many_epochs() -> None:
    found = rates(Schedule("staircase", epochs=6, warmup=0, decay=0.5, every=2), 3)
    np.testing.assert_allclose(found, [2.0] * 6 + [1.0] * 6 + [0.5] * 6)


def test_plateau_drops_when_nothing_gets_better() -> None:
    scores = (0.1, 0.5, 0.4, 0.5, 0.6, 0.6, 0.6)
    assert [plateau_drops(scores[:n], 2) for n in range(8)] == [0, 0, 0, 0, 1, 1, 1, 2]
    schedule = Schedule("plateau", epochs=8, warmup=0, decay=0.1, every=2)
    np.testing.assert_allclose(
        rates(schedule, 1, scores), [2, 2, 2, 2, 0.2, 0.2, 0.2, 0.02]
    )


def test_each_phase_has_its_rate_and_its_plateau() -> None:
    phases = (Phase(3, "head"), Phase(2, "last", stages=1, lr=0.5), Phase(lr=0.1))
    flat = Schedule("staircase", epochs=8, warmup=0, decay=1.0, phases=phases)
    np.testing.assert_allclose(rates(flat, 1), [2, 2, 2, 1, 1, 0.2, 0.2, 0.2])
    plateau = Schedule("plateau", 8, 0, 0.1, every=1, phases=phases)
    scores = (0.5, 0.4, 0.6, 0.5, 0.5, 0.1, 0.1, 0.1)  # drops after the 2nd, 5th, 7th
    np.testing.assert_allclose(
        rates(plateau, 1, scores), [2, 2, 0.2, 1, 1, 0.2, 0.2, 0.02]
    )


def test_no_warmup_starts_at_the_highest() -> None:
    assert rates(Schedule(epochs=2, warmup=0), 1)[0] == 2.0


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_each_optimizer_minimises(name: str) -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    how = Optimizer(name=name, lr=0.1, weight_decay=0.0)  # type: ignore[arg-type]
    optimizer = build_optimizer(how, [weight])
    for _ in range(200):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
    assert abs(weight.item() - 1) < 0.1


def test_the_average_follows_weights_and_statistics() -> None:
    model = nn.BatchNorm1d(1)
    average = build_average(model, 0.75)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 4.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        model.running_mean = torch.tensor([value])
        average.update_parameters(model)
        expected = value if step == 0 else 0.75 * expected + 0.25 * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert float(average.module.running_mean) == pytest.approx(expected)
