"""A training run as one object: what YAML, flags and Python all build, and what its folder can be run again from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from gambeson import data, models
from gambeson.base import Config, close_run, derive, environment, open_run, seeded, user_code
from gambeson.defenses import AnyDefense, Standard, name_of
from gambeson.models.init_weights import init_weights
from gambeson.training.batches import member_seeds
from gambeson.training.loop import train
from gambeson.training.plan import Plan, plan
from gambeson.training.recipe import Recipe


class TrainRun(Config):
    """What to train, on what, and how."""

    kind: Literal["train"] = "train"
    data: data.Name
    """Name of a data set, such as ``fashion-mnist``, ``image-folder:PATH?size=64`` or ``torchvision:NAME``."""
    model: str
    """Name of an architecture, such as ``lenet``, ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME_OR_PATH`` or
    ``FILE.py:FUNCTION``."""
    defense: AnyDefense
    """The objective: its name, or ``FILE.py:CLASS``, with its settings."""
    recipe: Recipe = Recipe()
    """Length, optimiser, schedule."""
    init: str | None = None
    """Weights to start from, of the whole model or of the architecture alone; None: a fresh initialisation from the
    seed, or what the name of the model brings."""
    seed: int = 0
    device: str = "cpu"


def run_training(run: TrainRun, out: Path, dataset: data.Dataset | None = None) -> models.PixelModel:
    """Carry out ``run`` in the folder ``out``, or go on with it there; a finished one is only loaded.

    Args:
        run: the settings.
        out: the run folder.
        dataset: the data of ``run.data``, where it is loaded already.

    Raises:
        UserError: the folder holds another run, or a name is unknown.
    """
    dataset = data.load(run.data) if dataset is None else dataset
    model = _model(run, dataset)
    run.defense.check(run.recipe.batch_size)
    if open_run(out, run, environment(run.device)):
        return models.load(out).to(torch.device(run.device))
    model = model.to(torch.device(run.device))
    train(
        model,
        dataset,
        run.defense.supplied(lambda name: _source(run, name, out, dataset)),
        recipe=run.recipe,
        seed=run.seed,
        out=out,
        label=f"train {user_code.short(name_of(run.defense))}",
    )
    close_run(out)
    return model


def plan_training(run: TrainRun, dataset: data.Dataset | None = None) -> Plan:
    """Measure what ``run`` will cost, on a few steps; nothing is written.

    Models that a defence names and that would be trained first stand in untrained.
    """
    dataset = data.load(run.data) if dataset is None else dataset

    def stand_in(name: str) -> models.PixelModel:
        return models.load(Path(name)) if Path(name).exists() else models.create(name, dataset)

    model = _model(run, dataset).to(torch.device(run.device))
    run.defense.check(run.recipe.batch_size)
    return plan(model, dataset, run.defense.supplied(stand_in), run.recipe, run.seed)


def _model(run: TrainRun, dataset: data.Dataset) -> models.PixelModel:
    drawn = []
    for seed in member_seeds(run.seed, run.defense.num_members):  # each member as a run of its own would draw it
        with seeded(seed, "model"):
            drawn.append(models.create(run.model, dataset))
    model = models.ensemble(drawn)
    if run.init is not None:
        init_weights(model, Path(run.init))
    return model


def _source(run: TrainRun, name: str, out: Path, dataset: data.Dataset) -> models.PixelModel:
    """Load a model that a defence names: a run or a file; or an architecture, trained first and kept beside the run."""
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
