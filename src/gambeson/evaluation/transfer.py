"""Transfer tables: the error of every model on examples crafted on another (Tramèr et al. 2018, table 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson import attacks
from gambeson.attacks import Name as AttackName
from gambeson.base import (
    Config,
    UserError,
    check_run,
    close_run,
    derive,
    environment,
    eps_text,
    notebook,
    open_run,
    read_json,
    seeded,
    task,
    user_code,
    writable,
    write_json,
)
from gambeson.data import Name, Split
from gambeson.evaluation.outcome import ImageAttack, at_once, attacked, averaged
from gambeson.evaluation.universal import error_rate
from gambeson.models.black_box.http import StoredHttp
from gambeson.models.loading import LoadedModel, asking, load_model
from gambeson.tasks import Rate
from gambeson.threat import Eps, Norm, default_eps
from gambeson.victim import as_victim, nothing_counts, predict, score


class TransferRun(Config):
    """Settings of a run: models, attacks and number of images."""

    kind: Literal["transfer"] = "transfer"
    models: Annotated[tuple[str, ...], Field(min_length=2)]
    """Models as in ``gambeson attack``. A black box can only be a target."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of images sent to each black box."""
    http: StoredHttp = None
    """How servers are asked."""
    data: Name | None = None
    """Name of a data set; None: that of the first training run."""
    attacks: tuple[AttackName, ...] = ("fgsm", "r-fgsm", "step-ll", "pgd", "mi-fgsm")
    """Per-image attacks, by name or as ``FILE.py:CLASS``, which is stored with the hash of the file."""
    eps: Eps | None = None
    """Radius in pixel units; None: :func:`gambeson.threat.default_eps`."""
    norm: Norm = "inf"
    eot_samples: Annotated[int, Field(ge=1)] | None = None
    """Samples of a random source that every gradient is averaged over, for gradient attacks; None:
    :data:`gambeson.victim.averaged.EOT_SAMPLES`."""
    images: Annotated[int, Field(ge=1)] = 1000
    """Maximum number of test images, a stratified sample drawn from the seed."""
    seed: int = 0
    device: str = "cpu"


class TransferTable(Config):
    """Errors in the order of the models: ``errors[source][target]``; the diagonal is the white box."""

    attack: str
    errors: list[list[Rate | None]]
    """Error rates; the row of a black box is None."""

    @property
    def worst(self) -> list[Rate | None]:
        """Highest error of each target under the other models' examples, with a simultaneous interval."""
        found: list[Rate | None] = []
        for target in range(len(self.errors)):
            others = [row[target] for k, row in enumerate(self.errors) if k != target]
            known = [rate for rate in others if rate is not None]
            found.append(Rate.highest(known) if known else None)
        return found


class TransferResult(Config):
    """Contents of ``result.json``."""

    labels: list[str]
    unit: str = "image"
    """What errors are shares of: images, or pixels of label maps."""
    clean: list[Rate]
    """Clean error of each model."""
    tables: list[TransferTable]
    run: TransferRun
    environment: dict[str, str]

    @property
    def eps(self) -> float:
        """The radius of the examples."""
        if self.run.eps is None:
            raise AssertionError("a finished run has an eps")
        return self.run.eps

    def plot(self) -> Any:
        """Return a ``plotly`` figure with a heat map of the errors in per cent for each attack."""
        title = f"Error under transferred examples, eps {eps_text(self.eps)} ({self.run.norm})"
        return notebook.heat_maps({table.attack: table.errors for table in self.tables}, self.labels, title)

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per attack, source and target."""
        return notebook.frame(
            [
                {"attack": table.attack, "source": source, "target": target, **rate.plain()}
                for table in self.tables
                for source, rates in zip(self.labels, table.errors, strict=True)
                for target, rate in zip(self.labels, rates, strict=True)
                if rate is not None
            ]
        )


def run_transfer(run: TransferRun, out: Path) -> TransferResult:
    """Execute ``run``; write ``result.json`` to ``out``.

    Raises:
        UserError: the folder holds another run, a model cannot be loaded, or the models do not fit one data set.
    """
    _attacks_of(run, 0.0)  # what is wrong is said before data and models are loaded
    writable(out) if run.eps is None else check_run(out, run)
    models = _load(run)
    if run.eps is None:
        run = run.model_copy(update={"eps": default_eps(models[0].dataset.test.shape, run.norm)})
    rows = _attacks_of(run)
    if open_run(out, run, environment(run.device)) and (out / "result.json").is_file():
        return TransferResult(**read_json(out / "result.json"))
    split = models[0].dataset.test.sample(run.images, seed=run.seed)
    clean, tables = [], []
    with task("transfer", (len(rows) + 1) * len(models)) as advance:
        for target in models:
            clean.append(error_of(target.model, split, run.seed))
            advance()
        for name, attack in rows.items():
            errors: list[list[Rate | None]] = []
            for number, source in enumerate(models):
                if source.black_box:
                    errors.append([None] * len(models))
                else:
                    moved = perturbed(source.model, split, attack, run.seed, name, number)
                    errors.append([error_of(target.model, moved, run.seed) for target in models])
                advance()
            tables.append(TransferTable(attack=name, errors=errors))
    result = TransferResult(
        labels=_labels(run, models),
        unit=split.task.unit,
        clean=clean,
        tables=tables,
        run=run,
        environment=environment(run.device),
    )
    write_json(out / "result.json", result.plain())
    close_run(out)
    return result


def _attacks_of(run: TransferRun, eps: float | None = None) -> dict[str, ImageAttack]:
    """Return the attacks by name; ``eps`` stands in for that of the run if it has none."""
    ball: dict[str, Any] = {"eps": eps if run.eps is None else run.eps, "norm": run.norm}
    if run.eot_samples is not None:
        ball["eot_samples"] = run.eot_samples
    for name in run.attacks:
        attacks.require_kind(name, "image")
    rows = {user_code.short(name): attacks.create(name, **ball) for name in run.attacks}
    if len(rows) < len(run.attacks):
        raise UserError(f"two of the attacks are called the same ({', '.join(rows)}): give each of them once")
    return rows


def _load(run: TransferRun) -> list[LoadedModel]:
    asked = [asking(source, run.budget, run.http) for source in run.models]
    if run.budget is not None and not any(settings["budget"] for settings in asked):
        raise UserError("a budget limits the queries to black boxes, and none of the models is one: leave --budget out")
    first = load_model(run.models[0], run.data, run.device, **asked[0])
    name = run.data or first.trained.get("data")
    others = [
        load_model(source, name, run.device, first.dataset, **settings)
        for source, settings in zip(run.models[1:], asked[1:], strict=True)
    ]
    return [first, *others]


def _labels(run: TransferRun, models: list[LoadedModel]) -> list[str]:
    """The models' labels, or their sources if two are equal."""
    labels = [subject.label for subject in models]
    return [label if labels.count(label) == 1 else name for label, name in zip(labels, run.models, strict=True)]


def perturbed(model: nn.Module, split: Split, attack: ImageAttack, seed: int, *path: str | int) -> Split:
    """Return the split with every image perturbed on a model; ``path`` names the random stream."""
    if not len(split):
        raise nothing_counts(split)
    parts = []
    with as_victim(model, fast=True) as victim:
        attack = averaged(attack, victim, split.take(slice(0, 8), victim.device)[0])
        for k, (images, labels) in enumerate(split.batches(at_once(split), device=victim.device)):
            with seeded(stream := derive(seed, *path, k), "attack"):
                parts.append(attacked(attack, victim, images, labels, seed=stream, task=split.task))
    return split.with_images(torch.cat(parts).cpu())


def error_of(model: nn.Module, split: Split, seed: int) -> Rate:
    """Return the clean error of a model."""
    with as_victim(model) as victim:
        return error_rate(score(predict(victim, split, seed=seed), split))
