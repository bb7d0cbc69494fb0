"""The trainings of a study: what a step costs, the search of its settings, and the training itself."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from gambeson.base import Config, UserError, check_run, read_json, seeded, write_json
from gambeson.data import Dataset
from gambeson.defenses.pgd_adversarial import PGDAdversarial
from gambeson.models import PixelModel
from gambeson.studies.trials import Choice, Range, propose
from gambeson.training.loop import DivergedError
from gambeson.training.run import TrainRun, plan_training, run_training
from gambeson.training.validation import chance_level, validate, validate_robustly


class Candidate(Config):
    """One training of a search, scored on validation."""

    lr: float
    warmup: float
    epochs: int
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Other fields of the recipe that a trial chose."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the defence that it chose."""
    accuracy: float | None
    """On clean validation images; None: the training diverged."""
    uer: float | None
    """Under one universal perturbation."""
    attacked: float | None = None
    """Accuracy under PGD, where it counts."""

    @property
    def score(self) -> float:
        """Mean of the accuracies."""
        if self.accuracy is None or self.uer is None:
            return -math.inf
        return statistics.mean([self.accuracy, 1 - self.uer, *([] if self.attacked is None else [self.attacked])])


_ROUNDS = 5
_HALVINGS = 2
"""How often a training that diverges or learns nothing is begun again with half of its learning rate (ours)."""


def cost(run: TrainRun, data: Dataset, searched: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Measure a step, relative to one of standard training: the median over a few rounds, on machines with others.

    Args:
        run: the training.
        data: the data.
        searched: the result of a :func:`search` whose choices may change the cost.
    """
    run = run if searched is None else _as_chosen(run, searched)
    found = [plan_training(run, data) for _ in range(_ROUNDS)]
    return {
        "ratio": statistics.median(one.plain_ratio for one in found),
        "seconds a step": statistics.median(one.seconds_a_step for one in found),
    }


def search(run: TrainRun, data: Dataset, eps: float, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Train every candidate and choose the one with the best score; nothing of their weights is kept.

    Args:
        run: the training, with the recipe that candidates change.
        data: the data.
        eps: the radius of the score's perturbation.
        settings: ``lr``, ``warmup`` and ``share`` of :class:`gambeson.studies.study.Search`; with ``trials`` and
            ``space`` the number of trials and what else they choose.
        out: for the candidates' runs, which resume there.

    Raises:
        UserError: every candidate diverged, or Optuna is missing.
    """
    epochs, per_image = _epochs(run, settings["share"]), settings["per_image"]
    if settings.get("trials"):
        tried = _by_trials(run, data, eps, settings, epochs, out)
    else:
        tried = [
            _candidate(run, data, eps, {"lr": lr, "warmup": min(warmup, epochs / 2), "epochs": epochs}, out, per_image)
            for lr, warmup in itertools.product(settings["lr"], settings["warmup"])
        ]
    best = max(tried, key=lambda one: one.score)
    if best.score == -math.inf:
        rates = ", ".join(f"{rate:g}" for rate in sorted({one.lr for one in tried}))
        raise UserError(f"every training of the search diverged, at learning rates {rates}: give lower ones")
    shutil.rmtree(out, ignore_errors=True)
    chosen = {name: getattr(best, name) for name in ("lr", "warmup", "recipe", "settings")}
    return {**chosen, "tried": [one.plain() for one in tried]}


def _by_trials(
    run: TrainRun, data: Dataset, eps: float, settings: Mapping[str, Any], epochs: int, out: Path
) -> list[Candidate]:
    """Train what :func:`gambeson.studies.trials.propose` names, one after the other."""
    recipe, defense = (settings["space"][part] for part in ("recipe", "settings"))
    space: dict[str, Choice] = {"lr": settings["lr"], "warmup": settings["warmup"]}
    space |= {f"recipe.{name}": choice for name, choice in recipe.items()}
    space |= {f"settings.{name}": choice for name, choice in defense.items()}
    space = {name: Range(**one) if isinstance(one, dict) else tuple(one) for name, one in space.items()}
    plain = run.plain()
    now = {"lr": plain["recipe"]["lr"], "warmup": plain["recipe"]["warmup"]}
    now |= {f"recipe.{name}": plain["recipe"][name] for name in recipe}
    now |= {f"settings.{name}": plain["defense"].get(name) for name in defense}
    done: list[tuple[dict[str, Any], float]] = []
    tried = []
    for number in range(settings["trials"]):
        params = propose(space, now, done, run.seed)
        parts = {
            part: {name: params[f"{part}.{name}"] for name in names}
            for part, names in (("recipe", recipe), ("settings", defense))
        }
        update = {"lr": params["lr"], "warmup": min(params["warmup"], epochs / 2), "epochs": epochs}
        tried.append(_candidate(run, data, eps, update, out / f"trial{number}", settings["per_image"], **parts))
        done.append((params, max(0.0, tried[-1].score)))  # one that diverged is as bad as can be
    return tried


def lengths(
    run: TrainRun, data: Dataset, eps: float, settings: Mapping[str, Any], searched: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Train the chosen candidate for several numbers of epochs, to see from where on its score is flat.

    Args:
        run: the training, with the recipe that candidates change.
        data: the data.
        eps: the radius of the score's perturbation.
        settings: ``lengths`` and ``tolerance`` of :class:`gambeson.studies.study.Search`.
        searched: the result of :func:`search`.
        out: for the runs, which resume there.
    """
    run = _as_chosen(run, searched)
    tried = [
        _candidate(
            run,
            data,
            eps,
            {"lr": searched["lr"], "warmup": min(searched["warmup"], n / 2), "epochs": n},
            out,
            settings["per_image"],
        )
        for n in (_epochs(run, length) for length in settings["lengths"])
    ]
    steps = itertools.pairwise(tried)
    flat = next((one.epochs for one, more in steps if more.score - one.score < settings["tolerance"]), None)
    shutil.rmtree(out, ignore_errors=True)
    return {"lengths": [one.plain() for one in tried], "flat from": flat}


def _epochs(run: TrainRun, share: float) -> int:
    return max(1, round(share * run.recipe.epochs))


def _candidate(
    run: TrainRun,
    data: Dataset,
    eps: float,
    update: dict[str, Any],
    out: Path,
    per_image: bool,
    recipe: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Candidate:
    folder = out / "-".join(f"{key}{value:g}" for key, value in update.items())
    done = folder / "score.json"
    if done.is_file():
        return Candidate(**read_json(done))
    try:
        model = _trained(_with(run, {**(recipe or {}), **update}, settings), data, folder / "run")
        found: dict[str, float | None] = {**_scores(model, data, eps, run.seed)}
        found |= {} if per_image else {"attacked": None}
    except DivergedError:
        found = {"accuracy": None, "uer": None}
    result = Candidate(**update, **found, recipe=dict(recipe or {}), settings=dict(settings or {}))
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(done, result.plain())
    return result


def train(
    run: TrainRun,
    data: Dataset,
    eps: float,
    out: Path,
    *,
    searched: Mapping[str, Any] | None = None,
    costs: Sequence[Mapping[str, float]] = (),
    reference: int = 0,
) -> dict[str, Any]:
    """Train, or resume, in the folder ``out``.

    A learning rate of a search, which is shorter and may take fewer images, can be too high here: where the training
    diverges, or ends no better than chance, it is begun again with half of the rate, up to twice.

    Args:
        run: the settings.
        data: the data.
        eps: the radius of the perturbation that the model is tried with on validation.
        out: the run folder.
        searched: the result of the search of learning rate and warm-up.
        costs: at equal time, of a step of this training and of one of the reference.
        reference: at equal time, the reference's epochs.
    """
    run = run if searched is None else _as_chosen(run, searched)
    update: dict[str, Any] = {}
    if costs:
        update["epochs"] = max(1, round(reference * costs[1]["ratio"] / costs[0]["ratio"]))
        scale = update["epochs"] / run.recipe.epochs
        update["milestones"] = tuple(max(1, round(scale * epoch)) for epoch in run.recipe.milestones)
        update["warmup"] = min(run.recipe.warmup, update["epochs"] / 2)
    run = _with(run, update)
    run, model = (run, _trained(run, data, out)) if searched is None else _halved(run, data, out)
    scores = _scores(model, data, eps, run.seed)
    history = _history(out)
    return {
        "values": {
            "validation_accuracy": scores["accuracy"],
            "validation_uer": scores["uer"],
            "learnt": float(not chance_level(history[-1], data.validation)),
            "seconds": sum(read_json(out / "timing.json")["seconds_per_epoch"]),
            "steps": run.recipe.epochs * (len(data.train) // run.recipe.batch_size),
        },
        "recipe": run.recipe.plain(),
        "settings": {} if searched is None else searched["settings"],
        "validation curve": [entry["validation_accuracy"] for entry in history],
    }


def _with(run: TrainRun, recipe: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> TrainRun:
    """The run with another recipe, and other settings of its defence, validated."""
    plain = run.plain()
    return TrainRun(
        **{**plain, "recipe": {**plain["recipe"], **recipe}, "defense": {**plain["defense"], **(settings or {})}}
    )


def _as_chosen(run: TrainRun, searched: Mapping[str, Any]) -> TrainRun:
    """The run with what a search chose."""
    recipe = {"lr": searched["lr"], "warmup": searched["warmup"], **searched["recipe"]}
    return _with(run, recipe, searched["settings"])


def _trained(run: TrainRun, data: Dataset, out: Path) -> PixelModel:
    try:
        check_run(out, run)
    except UserError:  # begun on another device, or damaged: nothing of it is known to be right
        shutil.rmtree(out, ignore_errors=True)
    return run_training(run, out, data)


def _halved(run: TrainRun, data: Dataset, out: Path) -> tuple[TrainRun, PixelModel]:
    """Train; where it diverges or learns nothing, with half of the learning rate."""
    runs = [_with(run, {"lr": run.recipe.lr / 2**k}) for k in range(_HALVINGS + 1)]
    begun = next((k for k, one in enumerate(runs) if _has_begun(one, out)), 0)
    for one in runs[begun:-1]:
        with suppress(DivergedError):
            model = _trained(one, data, out)
            if not chance_level(_history(out)[-1], data.validation):
                return one, model
    return runs[-1], _trained(runs[-1], data, out)


def _history(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _has_begun(run: TrainRun, out: Path) -> bool:
    try:
        return check_run(out, run) is not None
    except UserError:
        return False


def _scores(model: PixelModel, data: Dataset, eps: float, seed: int) -> dict[str, float]:
    """Accuracy on clean validation images, and of short attacks of radius ``eps`` there UER and accuracy under PGD."""
    with seeded(seed, "validation"):
        clean = validate(model, data)["validation_accuracy"]
        found = validate_robustly(model, data, PGDAdversarial(eps=eps), seed)
    return {"accuracy": clean, "uer": found["validation_uer"], "attacked": found["validation_pgd_accuracy"]}
