"""The audit's attacks on single images: PGD on every test image, and the standard row on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gambeson.attacks import Square
from gambeson.auditing.context import Evidence
from gambeson.auditing.results import PerImage
from gambeson.evaluation import run_cascade, standard_attacks
from gambeson.evaluation.outcome import ImageAttack, accuracy_under


def left_out(evidence: Evidence) -> str:
    """Return why there is no row of attacks; empty where there can be one."""
    if evidence.suite.norm != "1" and evidence.test.labels.ndim == 1:
        return ""
    return "No row of attacks was tried on single images: it is for one label an image and the norms inf and 2."


def measure(evidence: Evidence) -> list[PerImage]:
    """Attack image by image at the middle eps.

    PGD on all test images, then the standard row on ``suite.row_images`` of them. The row is for one label
    an image and the norms inf and 2, and is left out elsewhere. A black box is attacked by Square alone, on the images
    that diagnostics look at, with ``suite.queries`` of each; nothing is tried on one in the norm 1.
    """
    suite, norm = evidence.suite, evidence.suite.norm
    rows = not left_out(evidence)
    if evidence.subject.black_box:
        if not rows or suite.queries == 0:
            return []
        square = Square(eps=evidence.eps, norm=norm, queries=suite.queries)
        return [_row(evidence, "square", len(evidence.sample), {"square": square}, square.plain())]
    found = [_pgd(evidence)]
    if rows and suite.row_images:
        attacks = standard_attacks(
            eps=evidence.eps,
            norm=norm,
            queries=suite.row_queries,
            draws=suite.gradient_draws if evidence.subject.random else None,
        )
        settings = {name: attack.plain() for name, attack in attacks.items() if hasattr(attack, "plain")}
        found.append(_row(evidence, "standard", suite.row_images, attacks, settings))
    return found


def _pgd(evidence: Evidence) -> PerImage:
    before = evidence.spent
    attack = evidence.suite.pgd(evidence.eps)
    return PerImage(
        attack="pgd",
        settings=attack.plain(),
        eps=evidence.eps,
        norm=evidence.suite.norm,
        accuracy=accuracy_under(evidence.victim, evidence.test, evidence.averaged(attack), evidence.seed),
        cost=evidence.since(before),
    )


def _row(
    evidence: Evidence, name: str, images: int, attacks: Mapping[str, ImageAttack], settings: dict[str, Any]
) -> PerImage:
    before = evidence.spent
    split = evidence.few(images)
    found = run_cascade(evidence.victim, split, attacks, norm=evidence.suite.norm, seed=evidence.seed).result
    return PerImage(
        attack=name,
        settings=settings,
        eps=evidence.eps,
        norm=evidence.suite.norm,
        accuracy=found.robust,
        rounds=found.rounds,
        cost=evidence.since(before),
    )
