"""How good a model is, and whether a run goes on and has gone well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distoptim_experiments.data.datasets import Dataset


def score(model: nn.Module, data: Dataset) -> dict[str, float]:
    """`evaluate` on the test set, and on the validation set if there is one."""
    found = evaluate(model, data.test_images, data.test_labels)
    if data.validation is None:
        return found
    return {**found, **evaluate(model, *data.validation, part="validation")}


def worker_accuracy(model: nn.Module, data: Dataset) -> float:
    """Of a single worker's own model, on the first 1000 test images or 100 windows of text.

    All workers are asked.
    """
    few = 1000 if data.test_labels.dim() == 1 else 100
    return evaluate(model, data.test_images[:few], data.test_labels[:few])["test_accuracy"]


def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, *, part: str = "test", batch_size: int = 512
) -> dict[str, float]:
    """Mean loss (nats) and accuracy (in [0, 1]) per label of `model` in evaluation mode.

    Its mode is put back.
    """
    was_training = model.training
    model.eval()
    loss = 0.0
    right = 0
    with torch.no_grad():
        for x, y in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            out = model(x)
            loss += float(nn.functional.cross_entropy(out, y, reduction="sum"))
            right += int((out.argmax(1) == y).sum())
    model.train(was_training)
    return {f"{part}_loss": loss / labels.numel(), f"{part}_accuracy": right / labels.numel()}


def mean_loss(losses: Sequence[float]) -> float:
    """Of those that are finite; NaN if there are none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def goes_on(losses: Iterable[float]) -> bool:
    """Whether a run can go on after the workers' losses of a step: one that is finite is enough,
    since a worker that has gone astray alone is left out of the next mean and brought back by it.
    """
    return any(map(math.isfinite, losses))


def diverged(found: Mapping[str, float], classes: int, *, whole: bool) -> bool:
    """Whether a run ended early (not `whole`), or with a `score` no better than guessing."""
    return not whole or not found["test_loss"] < math.log(classes)
