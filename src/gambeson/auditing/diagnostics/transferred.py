"""White box against the others: an attack that sees less must not do more."""

from __future__ import annotations

from gambeson.auditing.diagnostics.diagnostic import Diagnostic

DIAGNOSTICS: tuple[Diagnostic, ...] = ()
