"""The training loop."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gambeson.base import (
    UserError,
    as_text,
    autograd_limits,
    average,
    default_dtype,
    load_tensors,
    refuse_foreign,
    repeatable,
    save_tensors,
    seeded,
    share_first,
    task,
    write_json,
    write_text,
)
from gambeson.base.run_folder import RUN
from gambeson.data import Dataset, as_dataset
from gambeson.defenses import Batch, Defense, Losses, TrainContext, name_of
from gambeson.models import PixelModel, fingerprint
from gambeson.models import save as save_model
from gambeson.models.storage import CLASS_NAMES, FILE_NAME
from gambeson.training.batches import Epoch
from gambeson.training.checkpoint import load_state, read_state, save_state
from gambeson.training.graphs import GraphedForward
from gambeson.training.recipe import Recipe, fitted, freeze_statistics, make_optimizer, recipe_for, set_lr
from gambeson.training.validation import ACCURACY, is_best, is_due, rank, validate, validate_robustly, warn_at_chance
from gambeson.victim import Victim, copied
from gambeson.victim.graphs import has_graphs
from gambeson.victim.scoring import NonFiniteLogitsError

if TYPE_CHECKING:
    from accelerate import Accelerator

History = list[dict[str, float]]
"""One entry per epoch: each term of the objective, the learning rate, and the accuracy on the validation split; of
label maps also the mean IoU."""


def train(
    model: nn.Module,
    data: object,
    defense: Defense,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    label: str = "training",
    stop: Callable[[History], bool] | None = None,
    **settings: Any,
) -> History:
    """Train ``model`` in place, on the device it is on.

    Args:
        model: pixels (N, C, H, W) in [0, 1] to logits.
        data: a ``Dataset``, or a split or (images, labels) pair, which are split by a fixed rule.
        defense: the objective.
        recipe: optimiser and schedule; or give its fields as keywords, such as ``epochs=10``, beside which those of the
            defence's own recipe are used, if it has one.
        seed: of the order, the augmentation, the perturbations and dropout.
        out: folder for ``metrics.jsonl``, ``model.safetensors`` and ``state/``. An interrupted run resumes from its
            last complete epoch and ends with the weights of an uninterrupted one, bit for bit.
        label: name of the progress bar.
        stop: told the history after every epoch, also of a resumed run; the training ends where it says so.
        settings: fields of :class:`Recipe`, if ``recipe`` is not given.

    Raises:
        UserError: recipe, objective, model and data do not fit each other, no epoch has the recipe's
            ``least_accuracy``, or the folder holds anything but this training.
    """
    if not isinstance(defense, Defense):
        raise UserError(
            f"defense is a {type(defense).__name__}: expected a defence, such as gb.defenses.Standard() or "
            "gb.defenses.create('standard')"
        )
    if recipe is not None and settings:
        raise TypeError(f"give a recipe or its fields, not both (got {', '.join(settings)})")
    if out is not None:
        refuse_foreign(Path(as_text(out)), "train", *_FIRST)
    with default_dtype(), torch.inference_mode(False), torch.enable_grad():
        dataset = as_dataset(data)
        recipe = recipe or Recipe(**fitted(recipe_for(defense, settings), len(dataset.train)))
        parts = model.modules() if isinstance(model, nn.Module) else ()
        modes = [(part, part.training) for part in parts if hasattr(part, "training")]  # a frozen program has none
        try:
            run = Run(model, dataset, defense, recipe, seed, None if out is None else Path(out))
        except UserError:
            for part, mode in modes:
                if part.training != mode:
                    part.training = mode
            raise
        return run.fit(label, stop)


_FIRST = ("state/latest.safetensors", "state/best.safetensors", "track")
"""What a training writes first."""
_BEGUN: WeakKeyDictionary[nn.Module, tuple[Path, str]] = WeakKeyDictionary()
"""Where models of this process were last trained and the weights they began with: after an interrupt, the same call
with the same model goes on."""
_WATCH = 50
"""Steps between checks that the loss is finite."""


class DivergedError(UserError):
    """A training whose loss or logits have become NaN or infinite."""


class NoEpochError(UserError):
    """No epoch may be chosen, since none that was measured has the recipe's least accuracy.

    Args:
        recipe: of the training.
        history: of its epochs since all of the objective was active.
        split: the name of the validation split.
    """

    def __init__(self, recipe: Recipe, history: History, split: str) -> None:
        self.history = history
        measured = [entry[ACCURACY] for entry in history if rank(entry, recipe.select) is not None]
        most = f"the best got {100 * max(measured):.1f} %" if measured else "none was measured"
        super().__init__(
            f"no epoch that was measured got {100 * recipe.least_accuracy:.1f} % of {split} right, the least_accuracy "
            f"asked for ({most}): lower it, train for longer, or lower eps or the learning rate"
        )


class Run:
    """A training run; see :func:`train` for the arguments."""

    def __init__(
        self, model: nn.Module, data: Dataset, defense: Defense, recipe: Recipe, seed: int, out: Path | None
    ) -> None:
        self.model, self.defense, self.recipe, self.seed, self.out = model, defense, recipe, seed, out
        self.device, self.dtype = _trainable(model, data)
        from accelerate import Accelerator
        from accelerate.state import is_initialized

        # Its state is shared within the process and must not be changed by a training on another device or in another
        # precision.
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu" and not is_initialized(), device_placement=False, **tracking(recipe, out)
        )
        if recipe.track != "none":
            self.accelerator.init_trackers("gambeson")
        self.data, self.train = data, data.train.to(self.device)
        processes = self.accelerator.num_processes
        if recipe.batch_size > len(self.train) or recipe.batch_size % processes:
            shares = "" if processes == 1 else f" on {processes} processes"
            divides = "" if processes == 1 else f", a multiple of {processes}"
            raise UserError(
                f"batch size {recipe.batch_size} does not fit {len(self.train)} training images{shares}: choose "
                f"{len(self.train)} or less{divides}"
            )
        self.share = recipe.batch_size // processes
        defense.check(self.share)
        self.steps = len(self.train) // recipe.batch_size
        context = TrainContext(
            model=model, train=self.train, seed=seed, epochs=recipe.epochs, steps=self.steps, batch_size=self.share
        )
        self._begun = {} if out is None else self._origin(out)
        file = self._state  # read before the defence changes the model, so that a refusal leaves it as it is
        self._held = read_state(file, self._settings) if file is not None and file.is_file() else None
        with autograd_limits():
            defense.configure_model(model)
            if recipe.channels_last:
                model.to(memory_format=torch.channels_last)
            self.objective = defense.build_objective(context).to(self.device)
        self.optimizer = make_optimizer(model, defense, recipe)
        self.shadow = None if recipe.ema is None else AveragedModel(copied(model))
        self.graphs = GraphedForward() if has_graphs(self.device) else None
        self.history: History = []
        self.seconds: list[float] = []

    def fit(self, label: str, stop: Callable[[History], bool] | None = None) -> History:
        """Train to the end, from where an earlier run in the same folder stopped."""
        done = self._resume()
        share_first([*self.model.parameters(), *self.model.buffers()])
        with task(label, self.recipe.epochs * self.steps, done=done * self.steps) as advance:
            for epoch in range(done, self.recipe.epochs):
                if stop is not None and self.history and stop(self.history):
                    break
                began = time.perf_counter()
                with seeded(self.seed, "dropout", epoch, self.accelerator.process_index):
                    means = self._epoch(epoch, advance)
                share_first(self.model.buffers())  # running statistics differ between processes
                try:
                    self.history.append({"epoch": epoch, **means, **self._validate(epoch)})
                except NonFiniteLogitsError:  # the last step, whose loss nobody asks for, broke the weights
                    raise DivergedError(
                        f"the model gives NaN or infinite logits after epoch {epoch}: lower the learning rate "
                        f"({self.recipe.lr:g}) or eps"
                    ) from None
                self.seconds.append(time.perf_counter() - began)
                self._checkpoint()
        warn_at_chance(self.history[-1], self.data.validation)
        self.model.load_state_dict(self._chosen())
        if self.out is not None and isinstance(self.model, PixelModel) and self.accelerator.is_main_process:
            about = {"epochs": self.recipe.epochs, CLASS_NAMES: self.data.classes}
            save_model(self.model, self.out / FILE_NAME, about)
        finish(self.accelerator)
        return self.history

    @property
    def result(self) -> nn.Module:
        """The model that is validated and returned: the moving average, if there is one."""
        return self.model if self.shadow is None else self.shadow.module

    def _validate(self, epoch: int) -> dict[str, float]:
        with seeded(self.seed, "validation", epoch):
            found = validate(self.result, self.data)
            if is_due([*self.history, found], self.recipe, self.defense):
                found |= validate_robustly(self.result, self.data, self.defense, self.seed)
        return found

    def _chosen(self) -> dict[str, torch.Tensor]:
        if self.out is None or self.recipe.select == "last":
            return self.result.state_dict()
        best = self.out / "state" / "best.safetensors"
        if not best.is_file():
            late = self.history[self.defense.fully_active_epoch(self.recipe.epochs) :]
            raise NoEpochError(self.recipe, late, self.data.validation.name)
        return load_tensors(best)[0]

    def _epoch(self, epoch: int, advance: Any) -> dict[str, float]:
        self.model.train()
        if self.recipe.freeze_statistics:
            freeze_statistics(self.model)
        batches = Epoch(self.train, self.recipe, self.defense.num_orders, self.seed, epoch, self.device)
        sums: dict[str, torch.Tensor] = {}
        lr = 0.0
        for k, batch in enumerate(batches.walk()):
            step = epoch * self.steps + k
            lr = self.recipe.lr_at(step, self.steps)
            set_lr(self.optimizer, lr)
            for name, value in self.train_step(batch).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            if k % _WATCH == _WATCH - 1 or k == self.steps - 1:
                self._watch(sums["loss"], epoch, k)
            advance()
        return {name: float(value) / self.steps for name, value in sums.items()} | {"lr": lr}

    def train_step(self, batch: Batch) -> Losses:
        """Take one step, with every phase of the objective; return the detached losses."""
        found: Losses = {}
        images = batch.images.to(self.dtype)
        batch, version = replace(batch, images=images, forward_by=self.graphs), images._version
        with repeatable(), autograd_limits():
            for losses, moving in self._optimizer_steps(batch):
                self._step(losses["loss"], moving)
                for name, value in losses.items():
                    found[name] = found[name] + value.detach() if name in found else value.detach()
        if images._version != version:
            raise UserError("the model changes its input in place: let it work on a copy, such as images.clone()")
        self.objective.after_step(batch)
        if self.shadow is not None:
            self._average(self.shadow)
        return found

    @torch.no_grad()
    def _average(self, shadow: AveragedModel) -> None:
        # AveragedModel.update_parameters sends the number of averages to the device, for which the host waits.
        decay, number = self.recipe.ema, int(shadow.n_averaged)
        assert decay is not None
        decay = min(decay, (1 + number) / (10 + number)) if self.recipe.ema_warmup else decay
        decay = decay if number else 0.0
        means = [*shadow.module.parameters(), *shadow.module.buffers()]
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        weights = len(list(self.model.parameters()))
        averaged: list[tuple[torch.Tensor, torch.Tensor]] = []
        for k, ((name, value), mean) in enumerate(zip(named, means, strict=True)):
            # Only running statistics have a mean: that of the unit vectors of spectral_norm is shorter than they are.
            if decay and (k < weights or name.endswith(("running_mean", "running_var"))):
                averaged.append((mean, value))
            else:
                mean.copy_(value)
        if averaged:
            into, values = map(list, zip(*averaged, strict=True))
            torch._foreach_lerp_(into, values, 1 - decay)
        shadow.n_averaged += 1

    def _watch(self, total: torch.Tensor, epoch: int, k: int) -> None:
        """Stop a training that has diverged; checked rarely, because it synchronises with the device."""
        if not torch.isfinite(total):
            kept = f"; {self.out} keeps the state after epoch {epoch}" if self.out is not None and epoch else ""
            raise DivergedError(
                f"the loss became NaN or infinite in epoch {epoch}, between steps {k - k % _WATCH} and {k}: lower the "
                f"learning rate ({self.recipe.lr:g}) or eps{kept}"
            )

    def _optimizer_steps(self, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        optimizer_steps = self.objective.optimizer_steps(self.model, batch)
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                phase = next(optimizer_steps, None)
            if phase is None:
                return
            yield phase

    def _step(self, loss: torch.Tensor, moving: set[nn.Parameter] | None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.graphs is not None:
            self.graphs.close()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if moving is not None:
            for parameter in parameters:
                if parameter not in moving:
                    parameter.grad = None  # skipped by the optimiser: no decay, no momentum
        # After the backward and explicitly: objectives use parts of the model, several times, and double backwards,
        # while a data-parallel wrapper assumes a single forward of the whole.
        average([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.optimizer.step()

    @property
    def _carried(self) -> nn.Module:
        carried = nn.ModuleDict({"objective": self.objective})
        return carried if self.shadow is None else nn.ModuleDict({**carried, "shadow": self.shadow})

    @property
    def _state(self) -> Path | None:
        return None if self.out is None else self.out / "state" / "latest.safetensors"

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides the weights, as plain data."""
        defense = {"name": name_of(self.defense), **self.defense.plain()}
        recipe = {key: value for key, value in self.recipe.plain().items() if key != "track"}
        return {"defense": defense, "recipe": recipe, "seed": self.seed, **self._begun}

    def _origin(self, out: Path) -> dict[str, Any]:
        """What a training in a folder begins with: the data and, unless its ``run.yaml`` tells them, the weights."""
        data: dict[str, Any] = {"data": self.data.signs}
        if (out / RUN).is_file():
            return data
        folder, known = _BEGUN.get(self.model, (None, ""))
        if self._state is None or not self._state.is_file() or folder != out.resolve():
            share_first([*self.model.parameters(), *self.model.buffers()])  # each process has drawn its own
            known = fingerprint(self.model)
            _BEGUN[self.model] = (out.resolve(), known)
        return data | {"initial weights": known}

    def _resume(self) -> int:
        if self._state is None or self._held is None:
            return 0
        state, self._held = self._held, None
        load_state(self._state, state, self.model, self.optimizer, self._carried)
        self.history, self.seconds = state[1]["history"], state[1]["seconds"]
        return len(self.history)

    def _checkpoint(self) -> None:
        """Write all outputs of an epoch, the state last, so that it never refers to missing files."""
        if self.out is None or self._state is None or not self.accelerator.is_main_process:
            return
        if self.recipe.select != "last" and is_best(self.history, self.recipe, self.defense):
            save_tensors(self.out / "state" / "best.safetensors", self.result.state_dict(), {})
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in self.history]
        write_text(self.out / "metrics.jsonl", "".join(lines))
        write_json(self.out / "timing.json", {"seconds_per_epoch": self.seconds})
        about = {"history": self.history, "seconds": self.seconds, "settings": self._settings}
        save_state(self._state, self.model, self.optimizer, self._carried, about)
        if self.recipe.track != "none":
            self.accelerator.log(self.history[-1], step=len(self.history))


def _trainable(model: nn.Module, data: Dataset) -> tuple[torch.device, torch.dtype]:
    """Return where, and in which type, a model computes.

    Raises:
        UserError: it cannot be trained as it is.
    """
    victim = Victim(model)
    if victim.dtype in (torch.float16, torch.bfloat16):
        raise UserError(
            f"the model's weights are {victim.dtype}, in which small steps are lost: train model.float(), for speed "
            "with precision='bfloat16'"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"the {type(model).__name__} has no weights that require a gradient: train the module it was made from"
        )
    with victim:
        images, _ = data.train.take(slice(0, 2), victim.device)
        traits = victim.inspect(images)
    if traits.writes:
        raise UserError("the model changes its input in place: let it work on a copy, such as images.clone()")
    if not traits.bare:
        raise UserError(
            "the model returns something that holds its logits, or logits of a coarser grid than its images: train "
            "gb.models.as_logits(model, KEY), with the KEY of the logits in it, or 'logits' for a tensor"
        )
    for split in (data.train, data.validation):
        split.check_logits(traits.shape)
    try:
        model.train()
    except NotImplementedError:
        raise UserError("the model is an exported program, which cannot be trained: train the module itself") from None
    return victim.device, victim.dtype


def tracking(recipe: Recipe, out: Path | None) -> dict[str, Any]:
    """Return the tracking arguments of an ``Accelerator``; empty without a tracker.

    Raises:
        UserError: there is no run folder, or the tracker is not installed.
    """
    if recipe.track == "none":
        return {}
    if out is None or importlib.util.find_spec(recipe.track) is None:
        raise UserError(
            f"track {recipe.track!r} needs a run folder and the package {recipe.track}: give out, and "
            "pip install gambeson[track]"
        )
    return {"log_with": recipe.track, "project_dir": str(out / "track")}


def finish(accelerator: Accelerator) -> None:
    """Close the trackers; the process group stays open for a later run."""
    for tracker in getattr(accelerator, "trackers", []):
        tracker.finish()
