"""Runs of ``gambeson train``: settings, execution in a run folder, and cost estimates."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gambeson import data, models
from gambeson.base import Config, UserError, check_run, close_run, derive, environment, open_run, seeded, user_code
from gambeson.data import Dataset
from gambeson.defenses import AnyDefense, Defense, Standard, name_of
from gambeson.models import normalisation, zoo
from gambeson.models.loading import input_shape, scale_for
from gambeson.models.storage import FILE_NAME, load_weights, read_weights
from gambeson.training.batches import Epoch, member_seeds
from gambeson.training.loop import Run, train
from gambeson.training.recipe import Recipe
from gambeson.victim import copied

_WARM_UP, _TIMED = 2, 5


class TrainingCost(Config):
    """The expected cost of a training run."""

    steps: int
    """Total number of steps."""
    seconds_a_step: float
    """Median over measured steps of the last epoch, in which every part of the objective is active."""
    seconds: float
    """Time of all steps, without validation."""
    plain_ratio: float
    """Time of a step relative to one of standard training of one network, measured alternately; on one thread, that of
    the processor. A step of an ensemble trains all its members."""
    networks: int = 1
    """Networks of the model: the members of an ensemble."""
    weights: int
    """Bytes of weights, their gradients and the optimiser's moments."""
    activations: int
    """Maximum bytes kept for a backward pass."""
    data: int
    """Bytes of the training images, if they are on the device."""
    device: str

    @property
    def memory(self) -> int:
        """Total bytes."""
        return self.weights + self.activations + self.data


def plan(model: nn.Module, data: Dataset, defense: Defense, recipe: Recipe, seed: int = 0) -> TrainingCost:
    """Measure a few steps of a training on a copy of ``model``, which stays as it is.

    Args:
        model: on the device of the training.
        data: the data set.
        defense: the objective, with its source models loaded.
        recipe: optimiser and schedule.
        seed: of the run.
    """
    voters = model.voters if isinstance(model, models.PixelModel) else [model]
    runs = [
        Run(copied(one), data, objective, recipe.model_copy(update={"track": "none"}), seed, None)
        for one, objective in ((model, defense), (voters[0], Standard()))
    ]
    ours = runs[0]
    # Of one thread, the processor's own time, which others on the machine do not lengthen.
    alone = ours.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[list[float]] = [[], []]
    work: list[list[float]] = [[], []]
    kept = 0
    for k in range(_WARM_UP + _TIMED):
        for run, found, spent in zip(runs, times, work, strict=True):
            epoch = Epoch(run.train, recipe, run.defense.num_orders, seed, recipe.epochs - 1, run.device)
            run.model.train()
            batch = epoch[k % len(epoch)]
            with seeded(seed, "plan", k):
                if run is ours and k == 0:
                    kept = _kept(lambda run=run, batch=batch: run.train_step(batch))  # type: ignore[misc]
                    continue
                began, before = time.perf_counter(), clock()
                run.train_step(batch)
                if run.device.type != "cpu":
                    torch.accelerator.synchronize(run.device)
                if k >= _WARM_UP:
                    found.append(time.perf_counter() - began)
                    spent.append(clock() - before)
    second, steps = statistics.median(times[0]), ours.steps * recipe.epochs
    values = sum(parameter.numel() * parameter.element_size() for parameter in ours.model.parameters())
    return TrainingCost(
        steps=steps,
        seconds_a_step=second,
        seconds=second * steps,
        plain_ratio=statistics.median(work[0]) / statistics.median(work[1]),
        networks=len(voters),
        weights=values * (3 if recipe.optimizer == "sgd" else 4),
        activations=kept,
        data=len(ours.train) * math.prod(ours.train.shape),
        device=str(ours.device),
    )


def step_of(run: TrainRun, dataset: data.Dataset) -> Callable[[], None]:
    """Return a step of the last epoch of ``run`` on untrained networks, for those who count what it does.

    Args:
        run: the settings.
        dataset: the data of ``run.data``, or a part of two batches: the last step of an epoch has more to log.
    """
    model, dataset, defense = _built(run, dataset)
    job = Run(model, dataset, defense, run.recipe.model_copy(update={"track": "none"}), run.seed, None)
    job.model.train()
    epoch = Epoch(job.train, run.recipe, defense.num_orders, run.seed, run.recipe.epochs - 1, job.device)

    def step() -> None:
        with seeded(run.seed, "plan"):
            job.train_step(epoch[0])

    return step


def _kept(step: Callable[[], object]) -> int:
    """Return the maximum bytes that autograd keeps for a backward during ``step``, each storage counted once."""
    alive: dict[int, int] = {}
    most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            try:
                self.key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            except RuntimeError:  # inside a function transform, whose tensors show no storage
                self.key, size = id(self), tensor.nbytes
            alive[self.key] = size
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            alive.pop(self.key, None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        step()
    return most


class TrainRun(Config):
    """Settings of a training run: data, model, defence and recipe."""

    kind: Literal["train"] = "train"
    data: data.Name
    """Name of a data set, such as ``fashion-mnist``, ``image-folder:PATH?size=64`` or ``torchvision:NAME``."""
    model: str
    """Name of an architecture, such as ``lenet``, ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME_OR_PATH`` or
    ``FILE.py:FUNCTION``."""
    defense: AnyDefense
    """The objective: its name, or ``FILE.py:CLASS``, with its settings."""
    recipe: Recipe = Recipe()
    """Training length, optimiser and schedule."""
    init: str | None = None
    """Initial weights, of the whole model or of the architecture, which start every member of an ensemble, in a file or
    as ``zoo:NAME``; None: random from the seed, or those in the model's name. How a file's pixels were normalised,
    where it does not say it, may follow as ``?normalise=``, as in the names of models
    (:func:`gambeson.evaluation.load_model`)."""
    seed: int = 0
    device: str = "cpu"


def run_training(run: TrainRun, out: Path, dataset: data.Dataset | None = None) -> models.PixelModel:
    """Execute ``run`` in the folder ``out``, or resume it there; a finished one is only loaded.

    Args:
        run: the settings.
        out: the run folder.
        dataset: the data of ``run.data``, if already loaded.

    Raises:
        UserError: the folder holds another run, or a name is unknown.
    """
    begun = check_run(out, run) is not None
    dataset = data.load(run.data, input_shape=input_shape(run.model, run.data)) if dataset is None else dataset
    if not begun:
        _built(run, dataset)
    model = _model(run, dataset)
    if open_run(out, run, environment(run.device)) and (out / FILE_NAME).is_file():
        return models.load(out).to(torch.device(run.device))
    model = model.to(torch.device(run.device))
    train(
        model,
        dataset,
        run.defense.with_source_models(lambda name: _source(run, name, out, dataset)),
        recipe=run.recipe,
        seed=run.seed,
        out=out,
        label=f"train {user_code.short(name_of(run.defense))}",
    )
    close_run(out)
    return model


def plan_training(run: TrainRun, dataset: data.Dataset | None = None, out: Path | None = None) -> TrainingCost:
    """Measure what ``run`` will cost, on a few steps; nothing is written.

    Source models that would be trained first are used untrained.

    Args:
        run: the settings.
        dataset: the data of ``run.data``, if already loaded.
        out: the folder that it would be run in, which is checked too.

    Raises:
        UserError: as :func:`run_training`.
    """
    if out is not None:
        check_run(out, run)
    dataset = data.load(run.data, input_shape=input_shape(run.model, run.data)) if dataset is None else dataset
    return plan(*_built(run, dataset), run.recipe, run.seed)


def _built(run: TrainRun, dataset: data.Dataset) -> tuple[nn.Module, data.Dataset, Defense]:
    """Return what a run would train, with untrained source models.

    Raises:
        UserError: the parts do not fit.
    """

    def stand_in(name: str) -> models.PixelModel:
        name = zoo.resolved(name)
        return models.load(Path(name)) if Path(name).exists() else models.create(name, dataset)

    model = _model(run, dataset).to(torch.device(run.device))
    run.defense.check(run.recipe.batch_size)
    with seeded(run.seed, "plan"):
        defense = run.defense.with_source_models(stand_in)
        Run(copied(model), dataset, defense, run.recipe.model_copy(update={"track": "none"}), run.seed, None)
    return model, dataset, defense


def _model(run: TrainRun, dataset: data.Dataset) -> models.PixelModel:
    file, normalise = (None, None) if run.init is None else normalisation.split(run.init)
    weights = None if file is None else read_weights(Path(zoo.resolved(file)))
    asked = None if normalise is None else normalisation.read(normalise, file or "", dataset)
    (mean, std), guessed = scale_for(run.model, weights, dataset, asked)
    drawn = []
    for seed in member_seeds(run.seed, run.defense.num_members):  # each member as a separate run would draw it
        drawn.append(models.create(run.model, dataset, mean=mean, std=std, seed=seed))
    model = models.ensemble(drawn)
    if weights is not None:
        try:
            load_weights(model, weights)
        except UserError as unfit:  # weights of one network start every member of an ensemble of it
            if len(drawn) == 1:
                raise
            try:
                for member in drawn:
                    load_weights(member, weights)
            except UserError:
                raise unfit from None
        if guessed is not None:
            normalisation.compare(model, dataset, str(file), guessed=guessed)
    return model


def _source(run: TrainRun, name: str, out: Path, dataset: data.Dataset) -> models.PixelModel:
    """Load a source model of a defence: a run, a file, or an architecture that is trained first, next to the run."""
    name = zoo.resolved(name)
    if Path(name).exists():
        return models.load(Path(name))
    settings = run.model_copy(
        update={
            "model": name,
            "defense": Standard(),
            "init": None,
            "seed": derive(run.seed, "source", name) % 2**31,
        }
    )
    return run_training(settings, out / "sources" / name.replace(":", "-").replace("/", "-"), dataset)
