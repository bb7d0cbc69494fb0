"""What is measured of a trained model in a study: accuracy, single attacks, attack suites, eps_uni."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from gambeson.analysis import jacobian_norms, pair_sharing, sharing_factor
from gambeson.attacks import StochasticPGD, UniversalAttack, UniversalPerturbation
from gambeson.attacks.registry import ATTACKS, create, kind_of
from gambeson.base import Config, Number, UserError, unknown_name
from gambeson.data import Dataset
from gambeson.evaluation.attack_suite import run_suite, suite_for
from gambeson.evaluation.eps_uni import eps_uni
from gambeson.evaluation.outcome import accuracy_under
from gambeson.evaluation.universal import accuracy, strongest, universal_evasion
from gambeson.models import PixelModel, noise_off
from gambeson.models.storage import load as load_model
from gambeson.tasks import Rate
from gambeson.threat import Ball
from gambeson.victim import EOT_SAMPLES, Victim

Size = Annotated[int, Field(ge=1)]
LOSSES = "mean of losses"


class Meaning(NamedTuple):
    """What the last part of a metric's name stands for."""

    words: str
    better: int
    """1: the more the better; -1: the less."""
    share: bool = True
    """Whether it is a share, which tables show in per cent."""
    least: float = 0.0
    """No value is lower."""


METRICS = {
    "clean": Meaning("clean accuracy", 1),
    "accuracy": Meaning("accuracy", 1),
    "uer": Meaning("UER", -1),
    "eps_uni": Meaning("eps_uni", 1, share=False),
    "eps_adv": Meaning("eps_adv", 1, share=False),
    "attacked": Meaning("accuracy under the worst per-image attack", 1),
    "trusted": Meaning("verdict trusted", 1),
    "sharing": Meaning("sharing factor of the Jacobians", -1, share=False),
    "jacobian": Meaning("mean Frobenius norm of the Jacobians", -1, share=False),
    "pairs": Meaning("mean cosine of the Jacobians of two images", -1, share=False, least=-1.0),
    "validation_accuracy": Meaning("clean accuracy on validation", 1),
    "validation_uer": Meaning("UER on validation", -1),
    "learnt": Meaning("better than the most frequent class", 1),
    "seconds": Meaning("seconds of training", -1, share=False),
    "steps": Meaning("optimiser steps", -1, share=False),
}
"""The last parts of metrics' names; the first part is the measurement's label, or ``train``."""


def _metric(name: Any) -> str:
    label, _, last = str(name).partition(".")
    if not label or last not in METRICS:
        raise unknown_name("metric", str(name), [f"{label or 'MEASURE'}.{known}" for known in METRICS])
    return str(name)


Metric = Annotated[str, BeforeValidator(_metric)]
"""A measurement's label, or ``train``, and one of :data:`METRICS`: ``audit.uer``."""


def meaning(metric: str) -> Meaning:
    """What the last part of a metric's name stands for."""
    return METRICS[metric.partition(".")[2]]


class Value(Config):
    """A measured number."""

    value: float
    low: float | None = None
    """Ends of the 95 % interval over test images, where there is one."""
    high: float | None = None
    n: int = 0
    """Test images behind it; 0: not counted in images."""
    step: float = 0.0
    """Of a number that is not counted in images: how far apart the numbers are that the measurement can tell from each
    other, such as the width of a search's last bracket."""
    censored: bool = False
    """Whether the true number is larger, such as an eps_uni that no attack reached."""

    @classmethod
    def of(cls, rate: Rate) -> Value:
        """Take a rate."""
        return cls(value=rate.value, low=rate.low, high=rate.high, n=rate.n)


class Measured(Config):
    """The result of a measurement."""

    metrics: dict[str, Value]
    """By the last part of their names."""
    verdict: dict[str, Any] = Field(default_factory=dict)
    """Of an audit: its verdict, and the checks that failed."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What is measured."""

    model: PixelModel
    data: Dataset
    eps: float
    seed: int
    folder: Path
    """Of the training."""
    out: Path
    """For files of the measurement."""
    source: PixelModel | None
    """The model that examples are made on, if it is another one."""


class Measure(Config):
    """Base of every measurement."""

    without_eps: ClassVar[bool] = False
    """Whether no eps decides what is measured."""
    times_eps: Annotated[Number, Field(gt=0)] = 1.0
    """The radius, as a multiple of the eps of the data."""
    defenses: tuple[str, ...] = ()
    """Labels of the defences whose models are measured; empty: all."""
    seeds: tuple[int, ...] = ()
    """Seeds of those models; empty: all."""

    @model_validator(mode="after")
    def _has_eps(self) -> Measure:
        if self.without_eps and self.times_eps != 1:
            raise ValueError("no eps decides what it measures; leave times_eps out")
        return self

    def modules(self) -> tuple[str, ...]:
        """The modules that it needs in addition to this one."""
        return ()

    def measure(self, trained: TrainedModel) -> Measured:
        """Measure it."""
        raise NotImplementedError

    def radius(self, trained: TrainedModel) -> float:
        """The radius."""
        return self.times_eps * trained.eps

    def check(self, eps: float) -> None:
        """Refuse data of an eps, with which it cannot be measured."""
        Ball(eps=self.times_eps * eps)


class AccuracyMeasure(Measure):
    """Clean accuracy on all test images."""

    kind: Literal["accuracy"] = "accuracy"
    without_eps = True

    def check(self, eps: float) -> None:
        """Take any: there is no attack."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Count it."""
        return Measured(metrics={"accuracy": Value.of(accuracy(trained.model, trained.data, seed=trained.seed))})


def named(value: Any) -> Any:
    """Return what a name alone stands for, a name without settings; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


class AttackMeasure(Measure):
    """One attack: the accuracy under it, or the UER of a universal one, crafted on train and chosen on validation."""

    kind: Literal["attack"] = "attack"
    attack: Annotated[dict[str, Any], BeforeValidator(named)]
    """Its name, or its name and settings. The eps is that of the data, times ``times_eps``."""
    test_images: Size = 1000
    """Test images of a per-image attack, a stratified sample."""
    source: str = ""
    """The defence whose model of another seed the examples are made on: a transfer attack. Empty: the model itself."""
    adaptive: bool = False
    """Of an ensemble: the worst case over attacks through its own output, the mean of its members' logits, the mean of
    their losses, all members but one, and each member. Of a single model, the attack itself."""
    votes: Size | None = None
    """Passes that decide an image of a random model; 1 and ``eot_samples: 1`` in the attack: one noisy pass, as
    published protocols have it. None: as everywhere in this library."""
    noise: Literal["on", "off"] = "on"
    """Whether the noise modules of the model draw."""

    @model_validator(mode="after")
    def _exists(self) -> AttackMeasure:
        self.build(0.1)
        if self.source and self.adaptive:
            raise ValueError("adaptive attacks follow the model itself; leave source out")
        if kind_of(ATTACKS.get(self.attack["name"])) == "universal":
            for name in ("test_images", "votes"):  # a study that was stored has the defaults too
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"one perturbation is scored on all test images, as everywhere; leave {name} out")
        return self

    def build(self, eps: float) -> Any:
        """Return the attack."""
        given = dict(self.attack)
        if "name" not in given:
            raise UserError("an attack of a study has no name: expected one, as in {name: pgd, steps: 20}")
        name = given.pop("name")
        return create(name, **({"eps": eps} if "eps" in ATTACKS.get(name).settings else {}), **given)

    def check(self, eps: float) -> None:
        """Refuse an eps that the attack does not take in its norm."""
        self.build(self.times_eps * eps)

    def modules(self) -> tuple[str, ...]:
        """The attack's module."""
        return (ATTACKS.get(self.attack["name"]).target.__module__,)

    def measure(self, trained: TrainedModel) -> Measured:
        """Attack, and count on the model itself."""
        attack, universal = self.build(self.radius(trained)), kind_of(ATTACKS.get(self.attack["name"])) == "universal"
        with noise_off(trained.model) if self.noise == "off" else nullcontext():
            sources = self._sources(trained)
            if universal:
                return Measured(metrics={"uer": Value.of(self._universal(trained, attack, sources))})
            few = trained.data.test.sample(self.test_images, seed=trained.seed)
            with Victim(trained.model, fast=True) as victim:
                if victim.inspect(few.take(slice(0, 8), victim.device)[0]).stochastic and self.votes is not None:
                    victim.votes = self.votes
                if len(sources) == 1 and sources["model"] is trained.model:
                    found = accuracy_under(victim, few, attack, trained.seed)
                else:
                    made = {name: _MadeOn(self._through(attack, name), one) for name, one in sources.items()}
                    found = run_suite(victim, few, made, seed=trained.seed).result.robust
        return Measured(metrics={"accuracy": Value.of(found)})

    def _sources(self, trained: TrainedModel) -> dict[str, Any]:
        if trained.source is not None:
            return {"model": trained.source}
        voters = trained.model.voters
        if not self.adaptive or len(voters) == 1:
            return {"model": trained.model}
        others = {f"without {k}": [one for j, one in enumerate(voters) if j != k] for k in range(len(voters))}
        each = {f"member {k}": one for k, one in enumerate(voters)} if len(voters) > 2 else {}
        averages = {"mean of logits": voters}
        if "average" in ATTACKS.get(self.attack["name"]).settings:
            averages[LOSSES] = voters
        return {"model": trained.model, **averages, **others, **each}

    def _through(self, attack: Any, name: str) -> Any:
        return attack.model_copy(update={"average": "losses"}) if name == LOSSES else attack

    def _universal(self, trained: TrainedModel, attack: UniversalAttack, sources: Mapping[str, Any]) -> Rate:
        crafted = [attack.craft(source, trained.data, seed=trained.seed) for source in sources.values()]
        if len(crafted) == 1 and trained.source is not None:
            best: UniversalPerturbation = crafted[0]
        else:
            best, _ = strongest(
                trained.model, trained.data.validation, crafted[0], seed=trained.seed, others=crafted[1:]
            )
        return universal_evasion(trained.model, trained.data, best, seed=trained.seed)


class _MadeOn:
    """A per-image attack whose examples are made on another model, or on an average of several."""

    def __init__(self, attack: Any, source: nn.Module | list[nn.Module]) -> None:
        self.attack, self.source = attack, source

    def __call__(
        self, model: Victim, x: torch.Tensor, y: torch.Tensor, *, seed: int = 0, task: Any = None
    ) -> torch.Tensor:
        """Return the perturbed images."""
        moved: torch.Tensor = self.attack(self.source, x, y, seed=seed, task=task)
        return moved


class SuiteMeasure(Measure):
    """Accuracy under the worst attack of the standard suite, image by image."""

    kind: Literal["suite"] = "suite"
    test_images: Size = 250
    """Test images, a stratified sample."""
    queries: Size = 1000
    """Queries of Square per image."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Run the suite."""
        few = trained.data.test.sample(self.test_images, seed=trained.seed)
        with Victim(trained.model, fast=True) as victim:
            random = victim.inspect(few.take(slice(0, 8), victim.device)[0]).stochastic
            settings = {"eps": self.radius(trained), "queries": self.queries}
            attacks = suite_for(
                trained.data, seed=trained.seed, **settings, eot_samples=EOT_SAMPLES if random else None
            )
            found = run_suite(victim, few, attacks, seed=trained.seed).result.robust
        return Measured(metrics={"accuracy": Value.of(found)})


class EpsUniMeasure(Measure):
    """eps_uni(delta): the smallest eps at which one perturbation reaches the error delta."""

    kind: Literal["eps-uni"] = "eps-uni"
    without_eps = True
    delta: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """The error."""
    tolerance: Annotated[Number, Field(gt=0, lt=1)] = 0.05
    """Width of the last bracket as a share of eps."""
    steps: Size = 200
    """Steps of stochastic PGD."""
    restarts: Size = 1
    """Its starts."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Search it."""
        attack = StochasticPGD(eps=self.radius(trained), steps=self.steps, restarts=self.restarts)
        found = eps_uni(
            trained.model, trained.data, attack, delta=self.delta, tolerance=self.tolerance, seed=trained.seed
        )
        value = Value(value=found.value, low=found.low, high=found.high, censored=found.censored, step=found.tolerance)
        return Measured(metrics={"eps_uni": value})


class JacobianMeasure(Measure):
    """Norms of the Jacobians, and how much they share; see :mod:`gambeson.analysis`."""

    kind: Literal["jacobian"] = "jacobian"
    without_eps = True
    test_images: Size = 200
    """Test images of the norms and the sharing factor, a stratified sample."""
    pairs: Annotated[int, Field(ge=2)] = 200
    """Pairs of images."""

    def measure(self, trained: TrainedModel) -> Measured:
        """Measure them."""
        few = trained.data.test.sample(self.test_images, seed=trained.seed)
        pairs = pair_sharing(trained.model, few, pairs=self.pairs, seed=trained.seed)
        found = {
            "jacobian": jacobian_norms(trained.model, few).frobenius.mean,
            "sharing": sharing_factor(trained.model, few, seed=trained.seed),
            "pairs": float(pairs.values["cos_F"].double().mean()),
        }
        return Measured(metrics={name: Value(value=value) for name, value in found.items() if math.isfinite(value)})


def load_trained(
    folder: Path, data: Dataset, eps: float, seed: int, out: Path, device: str, source: Path | None
) -> TrainedModel:
    """Load what is measured.

    Args:
        folder: of the training.
        data: the images.
        eps: the radius of the data.
        seed: of the measurement.
        out: for its files.
        device: of the computations.
        source: the folder of the training that examples are made on, if it is another one.
    """
    place = torch.device(device)
    other = None if source is None else load_model(source).to(place).eval()
    model = load_model(folder).to(place).eval()
    return TrainedModel(model=model, data=data, eps=eps, seed=seed, folder=folder, out=out, source=other)
