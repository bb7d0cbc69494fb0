"""An audit: every measurement of a suite on one model, the diagnostics, and a verdict that they can overturn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import corruption, draws, per_image, transfer, universal
from gambeson.auditing.diagnostics import DIAGNOSTICS
from gambeson.auditing.evidence import Evidence
from gambeson.auditing.examples import save_examples
from gambeson.auditing.results import (
    AuditResult,
    Check,
    Corruption,
    Draws,
    Material,
    PerImage,
    Subject,
    Transferred,
    Universal,
    Verdict,
)
from gambeson.auditing.stages import Stages
from gambeson.auditing.suite import SUITES, Suite
from gambeson.auditing.verdict import judge
from gambeson.base import UserError, environment, generator, task, unknown_name
from gambeson.data import Dataset, as_dataset
from gambeson.evaluation import BlackBox
from gambeson.evaluation.results import EpsUni
from gambeson.evaluation.universal import accuracy_rate
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
    suite's curve and with controls beside them; eps_uni is searched; images are attacked one by one, with
    perturbations of a surrogate and with plain noise; the diagnostics of :mod:`gambeson.auditing.diagnostics` look
    for reasons not to believe any of it.

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
    suite = suite.on(dataset)
    folder = None if out is None else Path(out)
    black_box = isinstance(model, BlackBox)
    with Victim(model, fast=not black_box) as victim:
        reported = _reported(dataset, suite.test_images, seed, victim.device)
        look = victim.meet(reported.test.take(slice(0, 8), victim.device)[0], scores=black_box)
        predictions = predict(victim, reported.test)
        evidence = Evidence(
            victim=victim,
            data=reported,
            suite=suite,
            seed=seed,
            subject=Subject(
                label=label,
                name=getattr(getattr(model, "card", None), "name", type(model).__name__),
                parameters=count_parameters(model),
                fingerprint=fingerprint(model),
                black_box=black_box,
                random=look.stochastic,
                defense=defense,
                epochs=epochs,
            ),
            clean=accuracy_rate(score(predictions, reported.test)),
            predictions=predictions,
        )
        return _Auditor(evidence, folder).run()


def _reported(data: Dataset, images: int | None, seed: int, device: torch.device) -> Dataset:
    """The data with as many test images as the suite reports on, drawn evenly: folders are in order of class."""
    test = data.test
    if images is not None and images < len(test):
        order = torch.randperm(len(test), generator=generator(seed, "audit", "test"))
        test = test.subset(order[:images].sort().values, test.name)
    return Dataset(data.name, data.train, data.validation, test.to(device), data.classes)


class _Auditor:
    """Goes through the stages, each of which is kept in the folder when it is done."""

    def __init__(self, evidence: Evidence, folder: Path | None) -> None:
        self.evidence, self.folder, self.stages = evidence, folder, Stages(folder)

    def run(self) -> Audit:
        evidence, stages, suite = self.evidence, self.stages, self.evidence.suite
        with task(f"audit {evidence.subject.label}", len(suite.eps) + 5 + len(DIAGNOSTICS)) as advance:
            evidence.draws = stages.do("draws", Draws | None, lambda: draws.measure(evidence))
            advance()
            for eps in suite.eps:
                evidence.universal.append(self._point(eps))
                advance()
            found = stages.do("eps-uni", EpsUni, lambda: universal.search_eps_uni(evidence))
            advance()
            evidence.per_image = stages.do("per-image", list[PerImage], lambda: per_image.measure(evidence))
            advance()
            evidence.transfer = stages.do("transfer", list[Transferred], lambda: transfer.measure(evidence))
            advance()
            noise = stages.do("corruption", list[Corruption], lambda: corruption.measure(evidence))
            advance()
            checks = []
            for diagnostic in DIAGNOSTICS:
                checks.append(stages.do(f"check {diagnostic.name}", Check, partial(diagnostic.check, evidence)))
                advance()
        parts: list[Universal | PerImage | Transferred] = []
        parts += [*evidence.universal, *evidence.per_image, *evidence.transfer]
        result = AuditResult(
            subject=evidence.subject,
            material=self._material(),
            seed=evidence.seed,
            settings=suite.plain(),
            clean=evidence.clean,
            per_image=evidence.per_image,
            universal=evidence.universal,
            eps_uni=found,
            transfer=evidence.transfer,
            corruption=noise,
            draws=evidence.draws,
            checks=checks,
            verdict=judge(evidence.clean, evidence.universal, found, checks),
            cost=sum((part.cost for part in parts), found.cost),
            environment=environment(evidence.victim.device),
        )
        if self.folder is not None:
            save_examples(self.folder, evidence.victim, evidence.data, evidence.uaps[evidence.eps])
            result.save(self.folder)
        return Audit(result, [evidence.uaps[eps] for eps in suite.eps])

    def _point(self, eps: float) -> Universal:
        evidence, name = self.evidence, universal.file_of(eps)
        point = self.stages.do(name, Universal, lambda: universal.craft_point(evidence, eps, self.folder))
        if eps not in evidence.uaps:
            if self.folder is None:
                raise AssertionError("a stage can only be kept in a folder")
            evidence.uaps[eps] = UniversalPerturbation.load(self.folder / name)
            if evidence.uaps[eps].about.model != fingerprint(evidence.victim.model):
                raise UserError(f"{self.folder} holds the audit of another model: choose another --out")
        return point

    def _material(self) -> Material:
        data = self.evidence.data
        return Material(
            name=data.name,
            classes=list(data.classes),
            shape=list(data.test.shape),
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
        )
