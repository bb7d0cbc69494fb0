"""When a training has collapsed."""

from __future__ import annotations

from itertools import pairwise

from gambeson.data import Split
from gambeson.training.loop import History
from gambeson.training.validation import ACCURACY, chance_level

_ROW, _FALL, _LOST = 3, 0.1, 0.15
"""A collapse: epochs in a row that lose accuracy, how much of it in all, and of that under PGD between two looks."""


def collapsed(history: History, base: float, split: Split) -> str:
    """Return how a training has collapsed, as a sentence without its full stop; empty if it has not.

    Args:
        history: of the training so far.
        base: accuracy on clean validation images at its beginning.
        split: the validation split.
    """
    last = history[-1]
    if how := chance_level(last, split):
        return f"its answers have become constant or random: {how}"
    clean = [base, *(entry[ACCURACY] for entry in history)][-_ROW - 1 :]
    if len(clean) > _ROW and all(b < a for a, b in pairwise(clean)) and base - clean[-1] > _FALL:
        return (
            f"accuracy on clean {split.name} images fell {_ROW} epochs in a row, from {100 * base:.1f} % at the "
            f"beginning to {100 * clean[-1]:.1f} %"
        )
    looks = [entry["validation_pgd_accuracy"] for entry in history if "validation_pgd_accuracy" in entry]
    if looks and max(looks) - looks[-1] > _LOST and looks[-1] < max(looks) / 2:
        return (
            f"accuracy under PGD on {split.name} fell from {100 * max(looks):.1f} % to {100 * looks[-1]:.1f} %, which "
            "the single steps of the training do not see: its gradients are being masked (catastrophic overfitting)"
        )
    return ""
