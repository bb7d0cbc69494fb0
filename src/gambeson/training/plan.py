"""What a training will cost, measured on a few steps of a copy before it starts."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gambeson.base import Config, seeded
from gambeson.data import Dataset
from gambeson.defenses import Defense, Standard
from gambeson.training.batches import Epoch
from gambeson.training.loop import Run
from gambeson.training.recipe import Recipe

_WARM_UP, _TIMED = 2, 5


class Plan(Config):
    """The expected cost of a training run."""

    steps: int
    """Steps in all."""
    seconds_a_step: float
    """Median of the steps measured, those of the last epoch, in which every part of an objective is at work."""
    seconds: float
    """All steps together; validation between epochs comes on top."""
    plain_ratio: float
    """A step over a step of standard training, measured in turn."""
    weights: int
    """Bytes of weights, their gradients and the optimiser's moments."""
    activations: int
    """Most bytes that one backward of a step keeps alive."""
    data: int
    """Bytes of the training images, where they are kept on the device."""
    device: str

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations + self.data


def plan(model: nn.Module, data: Dataset, defense: Defense, recipe: Recipe, seed: int = 0) -> Plan:
    """Measure a few steps of a training on a copy of ``model``, which stays as it is.

    Args:
        model: on the device of the training.
        data: the data set.
        defense: the objective, with the models it names supplied.
        recipe: how to train.
        seed: of the run.
    """
    runs = [
        Run(copy.deepcopy(model), data, one, recipe.model_copy(update={"track": "none"}), seed, None)
        for one in (defense, Standard())
    ]
    ours = runs[0]
    times: list[list[float]] = [[], []]
    kept = 0
    for k in range(_WARM_UP + _TIMED):
        for run, found in zip(runs, times, strict=True):
            epoch = Epoch(run.train, recipe, run.defense.num_orders, seed, recipe.epochs - 1, run.device)
            run.model.train()
            batch = epoch[k % len(epoch)]
            with seeded(seed, "plan", k):
                if run is ours and k == 0:
                    kept = _kept(lambda run=run, batch=batch: run.take(batch))  # type: ignore[misc]
                    continue
                began = time.perf_counter()
                run.take(batch)
                if run.device.type != "cpu":
                    torch.accelerator.synchronize(run.device)
                if k >= _WARM_UP:
                    found.append(time.perf_counter() - began)
    second, steps = statistics.median(times[0]), ours.steps * recipe.epochs
    values = sum(parameter.numel() * parameter.element_size() for parameter in ours.model.parameters())
    return Plan(
        steps=steps,
        seconds_a_step=second,
        seconds=second * steps,
        plain_ratio=second / statistics.median(times[1]),
        weights=values * (3 if recipe.optimizer == "sgd" else 4),
        activations=kept,
        data=len(ours.train) * math.prod(ours.train.shape),
        device=str(ours.device),
    )


def _kept(step: Callable[[], object]) -> int:
    """Return the most bytes that autograd holds for a backward while ``step`` runs, each storage counted once."""
    alive: dict[int, int] = {}
    most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            self.key = tensor.untyped_storage().data_ptr()
            alive[self.key] = tensor.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            alive.pop(self.key, None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        step()
    return most
