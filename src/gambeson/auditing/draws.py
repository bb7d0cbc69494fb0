"""The audit's draws: what a random model answers over many passes."""

from __future__ import annotations

from gambeson.auditing.evidence import Evidence
from gambeson.auditing.results import Draws


def measure(evidence: Evidence) -> Draws | None:
    """Nothing yet."""
    return None
