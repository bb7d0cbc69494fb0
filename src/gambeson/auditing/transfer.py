"""The audit's transferred perturbations: crafted on a surrogate, tried on the model."""

from __future__ import annotations

from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Transferred


def measure(evidence: Evidence) -> list[Transferred]:
    """Nothing yet."""
    return []
