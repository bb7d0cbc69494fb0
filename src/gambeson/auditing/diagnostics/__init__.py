"""Signs that a robustness number cannot be trusted; each can turn an audit's verdict.

A file here is a family of diagnostics; :data:`DIAGNOSTICS` is all of them, in the order in which an audit looks.
"""

from gambeson.auditing.diagnostics import (
    convergence,
    gradients,
    randomness,
    single_step,
    state,
    transferred,
    universal,
    unseen,
)
from gambeson.auditing.diagnostics.diagnostic import Diagnostic, Finding

DIAGNOSTICS: tuple[Diagnostic, ...] = (
    *randomness.DIAGNOSTICS,
    *state.DIAGNOSTICS,
    *gradients.DIAGNOSTICS,
    *single_step.DIAGNOSTICS,
    *convergence.DIAGNOSTICS,
    *transferred.DIAGNOSTICS,
    *universal.DIAGNOSTICS,
    *unseen.DIAGNOSTICS,
)
"""Every diagnostic, in order."""

__all__ = ["DIAGNOSTICS", "Diagnostic", "Finding"]
