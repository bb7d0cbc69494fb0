"""The audit's attacks on single images: PGD on every test image, and the standard row on some."""

from __future__ import annotations

from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import PerImage
from gambeson.evaluation.universal import accuracy_under


def measure(evidence: Evidence) -> list[PerImage]:
    """Attack image by image at the middle eps."""
    before = evidence.spent
    attack = evidence.suite.pgd(evidence.eps)
    accuracy = accuracy_under(evidence.victim, evidence.test, attack, evidence.seed)
    pgd = PerImage(
        attack="pgd",
        settings=attack.plain(),
        eps=evidence.eps,
        norm=evidence.suite.norm,
        accuracy=accuracy,
        cost=evidence.since(before),
    )
    return [pgd]
