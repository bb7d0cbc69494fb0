"""One training loop for every objective."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from gambeson.base import (
    UserError,
    average,
    derive,
    generator,
    load_tensors,
    save_tensors,
    seeded,
    share_first,
    task,
    write_json,
    write_text,
)
from gambeson.data import Dataset, as_dataset, augment
from gambeson.defenses import Batch, Defense, Losses, Scene
from gambeson.models import PixelModel
from gambeson.models import save as save_model
from gambeson.training.recipe import Recipe
from gambeson.training.state import load_state, save_state
from gambeson.victim import Victim, predict, score

History = list[dict[str, float]]
"""One entry an epoch: each term of the objective, the learning rate, the accuracy on the validation split."""


def train(
    model: nn.Module,
    data: object,
    defense: Defense,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    label: str = "training",
    **settings: Any,
) -> History:
    """Train ``model`` in place, on the device it is on.

    Args:
        model: pixels (N, C, H, W) in [0, 1] to logits.
        data: a ``Dataset``, or a split or (images, labels) pair, which are split by a fixed rule.
        defense: the objective.
        recipe: how to train; or give its fields as keywords, such as ``epochs=10``.
        seed: of the order, the augmentation, the perturbations and dropout.
        out: folder for ``metrics.jsonl``, ``model.safetensors`` and ``state/``. A run that was cut goes on from its
            last complete epoch and ends with the weights of an uninterrupted one, bit for bit.
        label: name of the progress bar.
        settings: fields of :class:`Recipe`, where ``recipe`` is not given.

    Raises:
        UserError: recipe, objective, model and data do not fit each other.
    """
    if recipe is not None and settings:
        raise TypeError(f"give a recipe or its fields, not both (got {', '.join(settings)})")
    return _Run(
        model,
        as_dataset(data),
        defense,
        recipe or Recipe(**settings),
        seed,
        None if out is None else Path(out),
    ).go(label)


class _Run:
    def __init__(
        self, model: nn.Module, data: Dataset, defense: Defense, recipe: Recipe, seed: int, out: Path | None
    ) -> None:
        self.model, self.defense, self.recipe, self.seed, self.out = model, defense, recipe, seed, out
        self.device = Victim(model).device
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            device_placement=False,
            mixed_precision="bf16" if recipe.precision == "bfloat16" else "no",
        )
        self.data, self.train = data, data.train.to(self.device)
        processes = self.accelerator.num_processes
        if recipe.batch_size > len(self.train) or recipe.batch_size % processes:
            raise UserError(
                f"batch size {recipe.batch_size} does not fit {len(self.train)} training images on {processes} "
                "process(es): choose a smaller one that the number of processes divides"
            )
        self.share = recipe.batch_size // processes
        defense.check(self.share)
        defense.prepare(model)
        self.steps = len(self.train) // recipe.batch_size
        self.objective = defense.open(
            Scene(
                model=model,
                train=self.train,
                seed=seed,
                epochs=recipe.epochs,
                steps=self.steps,
                batch_size=self.share,
            )
        ).to(self.device)
        self.optimizer = self._optimizer()
        self.history: History = []
        self.seconds: list[float] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        special = self.defense.groups(self.model)
        taken = {parameter for group in special for parameter in group["params"]}
        rest = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        recipe = self.recipe
        return torch.optim.SGD(
            [{"params": [parameter for parameter in rest if parameter not in taken]}, *special],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )

    def go(self, label: str) -> History:
        done = self._resume()
        share_first([*self.model.parameters(), *self.model.buffers()])
        with task(label, self.recipe.epochs * self.steps, done=done * self.steps) as advance:
            for epoch in range(done, self.recipe.epochs):
                began = time.perf_counter()
                with seeded(self.seed, "dropout", epoch, self.accelerator.process_index):
                    means = self._epoch(epoch, advance)
                share_first(self.model.buffers())  # running statistics: each process has seen its own images
                with Victim(self.model) as victim:
                    verdict = score(predict(victim, self.data.validation), self.data.validation)
                self.history.append({"epoch": epoch, **means, "validation_accuracy": 1 - verdict.error})
                self.seconds.append(time.perf_counter() - began)
                self._keep()
        if self.out is not None and self.recipe.select == "best":
            weights, _ = load_tensors(self.out / "state" / "best.safetensors")
            self.model.load_state_dict(weights)
        if self.out is not None and isinstance(self.model, PixelModel):
            save_model(self.model, self.out / "model.safetensors", {"epochs": self.recipe.epochs})
        return self.history

    def _epoch(self, epoch: int, advance: Any) -> dict[str, float]:
        self.model.train()
        orders = [
            torch.randperm(len(self.train), generator=generator(seed, "order", epoch)) for seed in self._member_seeds
        ]
        sums: dict[str, torch.Tensor] = {}
        lr = 0.0
        for k in range(self.steps):
            step = epoch * self.steps + k
            lr = self.recipe.lr_at(step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            # A process takes consecutive rows, so that a heap never crosses processes.
            first = k * self.recipe.batch_size + self.accelerator.process_index * self.share
            batch = self._batch(torch.cat([order[first : first + self.share] for order in orders]), step)
            for losses, moving in self._descend(batch):
                self._step(losses["loss"], moving)
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach()
            self.objective.follow(batch)
            advance()
        means = {name: float(value) / self.steps for name, value in sums.items()}
        if not all(abs(value) < float("inf") for value in means.values()):
            raise UserError(
                f"the loss became NaN or infinite in epoch {epoch}: lower the learning rate ({self.recipe.lr}) or eps"
            )
        return means | {"lr": lr}

    def _descend(self, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        phases = self.objective.phases(self.model, batch)
        while True:
            with self.accelerator.autocast():
                phase = next(phases, None)
            if phase is None:
                return
            yield phase

    def _step(self, loss: torch.Tensor, moving: set[nn.Parameter] | None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if moving is not None:
            for parameter in parameters:
                if parameter not in moving:
                    parameter.grad = None  # the optimiser passes it by: no decay, no momentum
        # After the backward and by hand: objectives go through parts of the model, several times, and through double
        # backwards, and a data-parallel wrapper counts on one forward of the whole.
        average([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.optimizer.step()

    @property
    def _member_seeds(self) -> list[int]:
        if self.defense.members == 1:
            return [self.seed]
        return [derive(self.seed, "member", number) for number in range(self.defense.members)]

    def _batch(self, indices: torch.Tensor, step: int) -> Batch:
        images, labels = self.train.take(indices, self.device)
        seed, place = derive(self.seed, "step", step), self.accelerator.process_index
        if self.recipe.augment != "none":
            draw = generator(seed, "augment", place, device=self.device)
            if labels.ndim == 1:
                images = augment(images, self.recipe.augment, draw)
            else:
                images, labels = augment(images, self.recipe.augment, draw, labels, self.train.ignore_index)
        return Batch(
            images=images,
            labels=labels,
            seed=seed,
            ignore_index=self.train.ignore_index,
            place=(place, self.accelerator.num_processes),
            step=step,
            steps=self.steps,
            epochs=self.recipe.epochs,
            indices=indices if self.recipe.augment == "none" else None,
        )

    @property
    def _state(self) -> Path | None:
        return None if self.out is None else self.out / "state" / "latest.safetensors"

    def _resume(self) -> int:
        if self._state is None or not self._state.is_file():
            return 0
        about = load_state(self._state, self.model, self.optimizer, self.objective)
        self.history, self.seconds = about["history"], about["seconds"]
        return len(self.history)

    def _keep(self) -> None:
        """Write everything an epoch leaves, the state last: what it stands for is then on disk already."""
        if self.out is None or self._state is None or not self.accelerator.is_main_process:
            return
        accuracies = [entry["validation_accuracy"] for entry in self.history]
        if self.recipe.select == "best" and accuracies[-1] > max(accuracies[:-1], default=-1.0):
            save_tensors(self.out / "state" / "best.safetensors", self.model.state_dict(), {})
        write_text(
            self.out / "metrics.jsonl",
            "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in self.history),
        )
        write_json(self.out / "timing.json", {"seconds_per_epoch": self.seconds})
        about = {"history": self.history, "seconds": self.seconds}
        save_state(self._state, self.model, self.optimizer, self.objective, about)
