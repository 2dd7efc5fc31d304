"""Losses against their formulas, written out in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from medray.models.fcn import Fcn8s
from medray.training.losses import Loss, SegmentationLoss, hardest


@pytest.fixture(scope="module")
def field() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 3, 6, 7)
    return logits, torch.randint(0, 3, (2, 6, 7))


def focal(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Lin et al. 2017, gamma 2, mean of each class against the rest: (N, H, W)."""
    total = np.zeros(labels.shape)
    for value in range(logits.shape[1]):
        p = 1 / (1 + np.exp(-logits[:, value]))
        right = np.where(labels == value, p, 1 - p)
        total += -((1 - right) ** 2) * np.log(right)
    return total / logits.shape[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def dice(logits: np.ndarray, labels: np.ndarray) -> float:
    """Milletari et al. 2016, over the whole batch; of classes that are there."""
    soft = softmax(logits)
    scores = []
    for value in range(logits.shape[1]):
        p, truth = soft[:, value], labels == value
        score = 2 * (p * truth).sum() / (p.sum() + truth.sum())
        scores.append((1 - score) if truth.any() else 0.0)
    return float(np.mean(scores))


def of(loss: Loss, field: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(SegmentationLoss(loss)(*field))


def test_each_loss_is_its_formula(field: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = (part.numpy() for part in field)
    entropy = -np.log(np.take_along_axis(softmax(logits), labels[:, None], 1))[:, 0]
    expected = {
        "focal": focal(logits, labels).mean(),
        "dice": dice(logits, labels),
        "cross_entropy": entropy.mean(),
    }
    none = dict.fromkeys(expected, 0.0)
    for name, value in expected.items():
        found = of(Loss(**(none | {name: 2.0})), field)
        assert found == pytest.approx(2 * value, rel=1e-4), name
    total = sum(expected.values())
    assert of(Loss(dice=1, focal=1, cross_entropy=1), field) == pytest.approx(total)


def test_a_class_that_is_not_there_costs_no_dice() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(1, 3, 5, 5), torch.randint(0, 2, (1, 5, 5))
    expected = dice(logits.numpy(), labels.numpy())
    assert of(Loss(dice=1, focal=0), (logits, labels)) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_only_the_hardest_pixels_count(
    field: tuple[torch.Tensor, torch.Tensor], share: float
) -> None:
    logits = field[0].clone().requires_grad_()
    loss = SegmentationLoss(Loss(dice=0, focal=1, hardest=share))(logits, field[1])
    pixels = focal(*(part.numpy() for part in field))
    count = round(share * pixels.size)
    chosen = np.sort(pixels.ravel())[-count:]
    assert float(loss.detach()) == pytest.approx(chosen.mean(), rel=1e-4)
    loss.backward()
    moved = logits.grad.abs().sum(1).numpy() > 0  # type: ignore[union-attr]
    np.testing.assert_array_equal(moved, pixels >= chosen[0])


def test_at_least_one_pixel_counts() -> None:
    assert hardest(torch.tensor([[1.0, 3.0, 2.0]]), 1e-6).tolist() == [3.0]


def test_l2_counts_the_weights_above_the_encoder() -> None:
    model = Fcn8s(2)
    above = (model.score8, model.score16, model.score32, model.up32, model.up16)
    total = sum(
        float((layer.weight.detach() ** 2).sum()) for layer in (*above, model.up8)
    )
    with torch.no_grad():
        model.score8.bias.fill_(100)  # type: ignore[union-attr]
    loss = SegmentationLoss(Loss(l2=0.1))
    assert float(loss.of_weights(model).detach()) == pytest.approx(
        0.1 * total, rel=1e-5
    )
    assert SegmentationLoss(Loss()).of_weights(model) == 0
    assert not isinstance(model.encoder[0], nn.ConvTranspose2d)


@pytest.mark.parametrize("bad", [{"dice": -1.0}, {"hardest": 0.0}, {"l2": -1e-3}])
def test_wrong_weights_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="for Loss"):
        Loss(**bad)
