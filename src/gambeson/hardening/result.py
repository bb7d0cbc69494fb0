"""What a hardening returns, and its sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gambeson.auditing import Audit, Comparison
from gambeson.auditing.display import doubt_of
from gambeson.base import eps_text
from gambeson.training.loop import History
from gambeson.training.validation import ACCURACY


@dataclass(frozen=True, repr=False)
class Hardened:
    """Result of :func:`harden`."""

    model: nn.Module
    """The hardened model, in evaluation mode."""
    before: Audit
    after: Audit
    comparison: Comparison
    """Of the two audits, image by image."""
    history: History
    """One entry per epoch of the training."""
    epoch: int
    """The one that was chosen, counted from 1."""
    keep_accuracy: float
    """Points of clean accuracy that could be lost on validation."""
    original: dict[str, float] = field(default_factory=dict)
    """What an entry of the history would be of the original."""
    notes: tuple[str, ...] = ()
    """What else has to be known. Whole sentences."""

    @property
    def summary(self) -> str:
        """What was gained and lost on the test split, in a few sentences."""
        changes, middle = {change.name: change for change in self.comparison.changes}, self.before.results.middle
        radii = {f"uer@{point.eps:.4g}": point.eps for point in self.before.results.universal}
        clean, uer = changes["clean"], changes[f"uer@{middle.eps:.4g}"]
        said = (
            f"One pattern of eps {eps_text(middle.eps)} fools the hardened model on {100 * uer.second.value:.1f} % of "
            f"test images, and the original on {100 * uer.first.value:.1f} %."
        )
        if uer.outcome != "better":
            said += " That is no clear gain." if uer.outcome != "worse" else " That is clearly worse."
        for change in [one for name, one in changes.items() if one.outcome == "worse" and one not in (clean, uer)]:
            what = change.name
            if what in radii:
                what = f"the error under one pattern of eps {eps_text(radii[what])}"
            now, before = 100 * change.second.value, 100 * change.first.value
            said += f" Clearly worse is {what}: {now:.1f} %, and {before:.1f} % before."
        if attacks := [change for name, change in changes.items() if name.startswith("per_image:")]:
            one, other = (100 * min(getattr(change, side).value for change in attacks) for side in ("first", "second"))
            said += f" Attacked image by image, {other:.1f} % stay right, and {one:.1f} % before."
        lost = -100 * clean.difference.value
        said += f" Clean accuracy is {100 * clean.second.value:.1f} %, and {100 * clean.first.value:.1f} % before"
        if lost > self.keep_accuracy + 1e-9:
            said += f": {lost:.1f} points were lost on test, although at most {self.keep_accuracy:g} on validation"
        if doubt := doubt_of(self.after.results):
            said += f". The numbers of the hardened model are {doubt}: it may be weaker than they say"
        return f"{said}."

    @property
    def choice(self) -> str:
        """Which epoch was selected on validation, and beside what, in a sentence."""
        was = f"; the original has {validated(self.original)}" if self.original else ""
        return (
            f"Epoch {self.epoch} of {len(self.history)} was selected on validation, where at most "
            f"{self.keep_accuracy:g} points of clean accuracy could be lost: it has "
            f"{validated(self.history[self.epoch - 1])}{was}."
        )

    def __repr__(self) -> str:
        return self.summary

    def plain(self) -> dict[str, Any]:
        """Everything but the model and the audits, as plain data."""
        return {
            "schema": "gambeson/harden-1",
            "summary": self.summary,
            "epoch": self.epoch,
            "keep_accuracy": self.keep_accuracy,
            "history": self.history,
            "original": self.original,
            "choice": self.choice,
            "comparison": self.comparison.plain(),
            "trusted": self.after.verdict.trusted,
            "notes": list(self.notes),
        }


def validated(entry: dict[str, float]) -> str:
    """Return the rates of an epoch that was attacked on validation, as a phrase."""
    clean, uer, pgd = (100 * entry[name] for name in (ACCURACY, "validation_uer", "validation_pgd_accuracy"))
    return f"{clean:.1f} % right, {uer:.1f} % wrong under one pattern and {pgd:.1f} % right under PGD"
