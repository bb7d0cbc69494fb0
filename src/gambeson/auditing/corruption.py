"""The audit's plain noise: what chance does to the model, without an adversary."""

from __future__ import annotations

from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Corruption


def measure(evidence: Evidence) -> list[Corruption]:
    """Nothing yet."""
    return []
