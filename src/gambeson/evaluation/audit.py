"""An audit: every measurement of a suite on one model, the checks, and a verdict that a failed check overturns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.base import UserError, environment, task, unknown_name
from gambeson.data import Dataset, as_dataset
from gambeson.evaluation import checks
from gambeson.evaluation.eps_uni import eps_uni
from gambeson.evaluation.examples import save_examples
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.results import (
    AuditResult,
    Check,
    Cost,
    EpsUni,
    Material,
    PerImage,
    Restart,
    Subject,
    Universal,
    Verdict,
)
from gambeson.evaluation.stages import Stages
from gambeson.evaluation.suite import SUITES, Suite
from gambeson.evaluation.universal import (
    accuracy_rate,
    accuracy_under,
    change_rate,
    control_rates,
    error_rate,
)
from gambeson.evaluation.verdict import judge
from gambeson.models import count_parameters, fingerprint
from gambeson.victim import Victim, predict, score


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` returns."""

    results: AuditResult
    """Every number, with its interval, settings and cost."""
    perturbations: list[UniversalPerturbation]
    """The crafted perturbations, in order of eps."""

    @property
    def verdict(self) -> Verdict:
        """``.trusted``, ``.summary`` and ``.reasons``."""
        return self.results.verdict


def audit(
    model: nn.Module,
    data: object,
    suite: str | Suite = "standard",
    out: str | Path | None = None,
    *,
    seed: int = 0,
    label: str = "model",
    defense: dict[str, Any] | None = None,
    epochs: int | None = None,
) -> Audit:
    """Find out whether one pattern breaks a model, and whether the answer can be trusted.

    Universal perturbations are crafted on train, chosen on validation and reported on test, at every eps of the
    suite's curve and with controls beside them; eps_uni is searched; PGD perturbs image by image; the checks of
    :mod:`gambeson.evaluation.checks` look for reasons not to believe any of it.

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits; it comes back as it was.
        data: a ``Dataset``, or a split or (images, labels) pair, which are split by a fixed rule.
        suite: ``quick``, ``standard``, ``full``, or a :class:`Suite`.
        out: folder for ``result.json``, the perturbations and ``examples.safetensors``; an audit that was cut goes
            on there after its last complete stage.
        seed: of every draw.
        label: what tables call the model.
        defense: the settings it was trained with, where they are known.
        epochs: how long it was trained, where that is known.

    Raises:
        UserError: unknown suite, or a model and data that do not fit each other.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise unknown_name("suite", suite, SUITES)
        suite = SUITES[suite]
    dataset = as_dataset(data)
    folder = None if out is None else Path(out)
    with Victim(model, fast=True) as victim:
        subject = Subject(
            label=label,
            name=getattr(getattr(model, "card", None), "name", type(model).__name__),
            parameters=count_parameters(model),
            fingerprint=fingerprint(model),
            defense=defense,
            epochs=epochs,
        )
        return _Auditor(victim, dataset, suite.on(dataset), folder, seed).run(subject)


class _Auditor:
    def __init__(self, victim: Victim, data: Dataset, suite: Suite, folder: Path | None, seed: int) -> None:
        self.victim, self.data, self.suite, self.folder, self.seed = victim, data, suite, folder, seed
        self.test = data.test.to(victim.device)
        self.stages = Stages(folder)
        self.uaps: dict[float, UniversalPerturbation] = {}

    def run(self, subject: Subject) -> Audit:
        with task(f"audit {subject.label}", len(self.suite.eps) + 3) as advance:
            clean_predictions = predict(self.victim, self.test)
            clean = accuracy_rate(score(clean_predictions, self.test))
            points = []
            for eps in self.suite.eps:
                points.append(self._universal(eps, clean_predictions))
                advance()
            middle = points[len(points) // 2]
            per_image = self.stages.do("per-image", PerImage, lambda: self._per_image(middle.eps))
            advance()
            found = self.stages.do("eps-uni", EpsUni, lambda: self._eps_uni(points))
            advance()
            verdicts = self._checks(clean, points, middle, per_image)
            advance()
        uaps = [self.uaps[point.eps] for point in points]
        result = AuditResult(
            subject=subject,
            material=Material(
                name=self.data.name,
                classes=list(self.data.classes),
                shape=list(self.test.shape),
                train=len(self.data.train),
                validation=len(self.data.validation),
                test=len(self.test),
            ),
            seed=self.seed,
            settings=self.suite.plain(),
            clean=clean,
            per_image=[per_image],
            universal=points,
            eps_uni=found,
            checks=verdicts,
            verdict=judge(clean, points, found, verdicts),
            cost=sum((point.cost for point in points), per_image.cost + found.cost),
            environment=environment(self.victim.device),
        )
        if self.folder is not None:
            save_examples(self.folder, self.victim, self.data, self.uaps[middle.eps])
            result.save(self.folder)
        return Audit(result, uaps)

    def _universal(self, eps: float, clean: torch.Tensor) -> Universal:
        name = f"uap-{eps:.4g}.safetensors"
        point = self.stages.do(name, Universal, lambda: self._craft(eps, clean, name))
        if eps not in self.uaps:
            if self.folder is None:
                raise AssertionError("a stage can only be kept in a folder")
            self.uaps[eps] = UniversalPerturbation.load(self.folder / name)
            if self.uaps[eps].about.model != fingerprint(self.victim.model):
                raise UserError(f"{self.folder} holds the audit of another model: choose another --out")
        return point

    def _craft(self, eps: float, clean: torch.Tensor, name: str) -> Universal:
        before = self._spent()
        attack = self.suite.universal(eps)
        smaller = max((known for known in self.uaps if known < eps), default=None)
        start = None if smaller is None else self.uaps[smaller].delta
        uap = attack.craft(self.victim, self.data, seed=self.seed, start=start)
        found = score(predict(self.victim, self.test, uap.delta.to(self.victim.device)), self.test, clean)
        self.uaps[eps] = uap
        if self.folder is not None:
            uap.save(self.folder / name)
        return Universal(
            eps=eps,
            norm=self.suite.norm,
            uer=error_rate(found),
            fooling=change_rate(found),
            controls=control_rates(self.victim, self.test, attack.ball, self.seed),
            restarts=[Restart(start=kind, validation_uer=rate) for kind, rate in uap.about.restarts],
            file=name,
            status=uap.about.status,
            cost=self._since(before),
        )

    def _per_image(self, eps: float) -> PerImage:
        before = self._spent()
        attack = self.suite.pgd(eps)
        accuracy = accuracy_under(self.victim, self.test, attack, self.seed)
        return PerImage(
            attack="pgd",
            settings=attack.plain(),
            eps=eps,
            norm=self.suite.norm,
            accuracy=accuracy,
            cost=self._since(before),
        )

    def _eps_uni(self, points: list[Universal]) -> EpsUni:
        known = {point.eps: (point.uer.value, self.uaps[point.eps].delta) for point in points}
        return eps_uni(
            self.victim,
            self.data,
            self.suite.universal(points[0].eps, restarts=1),  # the best perturbation so far is one more start
            delta=self.suite.eps_uni_delta,
            tolerance=self.suite.eps_uni_tolerance,
            seed=self.seed,
            known=known,
        )

    def _checks(self, clean: Rate, points: list[Universal], middle: Universal, per_image: PerImage) -> list[Check]:
        victim, test, norm = self.victim, self.test, self.suite.norm
        return [
            checks.is_deterministic(victim, test),
            checks.has_learnt(clean, self.data),
            checks.gradients_are_alive(victim, test),
            checks.multi_step_is_stronger(victim, test, middle.eps, norm, per_image.accuracy, self.seed),
            checks.whole_box_breaks(victim, test, norm, self.seed),
            checks.crafting_beats_controls(points),
            checks.perturbations_are_used(points),
            checks.rescoring_agrees(victim, test, middle, self.uaps[middle.eps]),
        ]

    def _spent(self) -> Cost:
        return Cost(forwards=self.victim.forwards, backwards=self.victim.backwards)

    def _since(self, before: Cost) -> Cost:
        now = self._spent()
        return Cost(forwards=now.forwards - before.forwards, backwards=now.backwards - before.backwards)
