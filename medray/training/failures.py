"""Error messages for a training step that failed."""

from __future__ import annotations

import torch

from medray.training.recipe import Recipe


def explain_error(
    error: Exception, recipe: Recipe, side: int, device: torch.device
) -> str:
    """Return what to do about an error of a forward or backward pass.

    Raises:
        Exception: `error` itself, if no setting can fix it.
    """
    crops, text = recipe.crops_per_micro_batch, " ".join(str(error).split())
    of = f"{crops} crops of {side} px at once"
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        half = f"micro_batch_size={crops // 2} halves it"
        less = half if crops > 1 else "lower data.crop"
        return f"not enough memory on {device} for {of}; {less}"
    if "more than 1 value per channel" in text:  # batch normalisation
        return f"the network cannot learn from {of}; set micro_batch_size to 2 or more"
    raise error


def explain_loss(recipe: Recipe, step: int) -> str:
    """Return what to do about a loss that is not a number."""
    return (
        f"the loss of step {step} is not a number; lower optimizer.lr "
        f"({recipe.optimizer.lr:g}), clip gradients (optimizer.clip), or set "
        f"precision=float32"
    )
