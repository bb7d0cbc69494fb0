"""Universal perturbations under edits of the images: what JPEG, resizing, shifts, rounding, blur and colours leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from gambeson.attacks import PATCH_CONTROLS, AdversarialPatch, UniversalPerturbation
from gambeson.base import Config, eps_text, notebook
from gambeson.data import Split
from gambeson.evaluation.rates import Control, Cost, strongest_control
from gambeson.evaluation.universal import controls_beside, scorable
from gambeson.tasks import Counts, Difference, Rate
from gambeson.threat.edits import NONE, Edit, check_edits
from gambeson.victim import Shared, Victim, as_victim, score_batches

STANDARD_EDITS = (
    "bits:8",
    "jpeg:90",
    "jpeg:75",
    "jpeg:50",
    "resize:2",
    "resize:0.75",
    "resize:0.5",
    "shift:1",
    "shift:2",
    "blur:0.5",
    "blur:1",
    "colour:0.1",
    "screenshot:75",
    "print:1",
)
"""Edits of a curve, each kind from weak to strong (ours)."""
PATTERNS = 3
"""Patterns of each control that are tried under every edit, of those that are drawn (ours)."""


class EditedRates(Config):
    """Errors on images that are edited after a perturbation was added, or not, and clipped."""

    edit: str
    clean: Rate
    """Error on clean images under the edit."""
    uer: Rate
    """Error under the perturbation and then the edit."""
    harm: Difference
    """What the perturbation adds to the error on clean images, both edited alike: paired on the same images."""
    controls: list[Control]
    """Errors under controls and then the edit."""

    @property
    def control(self) -> Rate | None:
        """The worst of all controls; None without one."""
        found = strongest_control(self.controls)
        return None if found is None else found.worst


class EditsResult(notebook.ShownAsTable, Config):
    """A universal perturbation under edits."""

    attack: str
    eps: float
    """Bounds the perturbation before the edit."""
    norm: str
    rates: list[EditedRates]
    """In the order asked for, after that without an edit."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Edits of the standard list, or of an audit's, that do not fit the data, with the reason."""
    cost: Cost = Field(default_factory=Cost)

    def _lines(self) -> tuple[str, dict[str, str]]:
        lines = {
            one.edit: f"UER {one.uer}, clean error {one.clean}" + (f", control {one.control}" if one.control else "")
            for one in self.rates
        }
        return f"{self.attack} at eps {eps_text(self.eps)} under edits, {self.rates[0].uer.n:,} images", lines

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per edit and rate."""
        rows: list[dict[str, Any]] = []
        for one in self.rates:
            found = {"clean error": one.clean, "UER": one.uer, **{c.name: c.worst for c in one.controls}}
            rows += [{"edit": one.edit, "what": what, **rate.plain()} for what, rate in found.items()]
        return notebook.frame(rows)

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the UER, the clean error and the strongest control by edit."""
        edits = [one.edit for one in self.rates]
        lines: dict[str, tuple[Sequence[float | str], Sequence[Any]]] = {
            "perturbed": (edits, [one.uer for one in self.rates]),
            "clean": (edits, [one.clean for one in self.rates]),
        }
        worst = [one.control for one in self.rates if one.control is not None]
        if len(worst) == len(edits):
            lines["strongest control"] = edits, worst
        return notebook.curves(lines, f"Error under edits, eps {eps_text(self.eps)} ({self.norm})", "edit", "error (%)")


def under_edits(
    model: nn.Module,
    data: object,
    uap: UniversalPerturbation,
    edits: Iterable[str | Edit] | None = None,
    *,
    controls: Iterable[str] | None = None,
    seed: int = 0,
) -> EditsResult:
    """Measure whether a universal perturbation survives edits, beside clean images and controls under the same edits.

    The perturbation is added and clipped to [0, 1] first, so that its eps holds before the edit, which then changes the
    whole image. An edit that harms clean images as much says nothing of the perturbation.

    Args:
        model: any module from pixels to logits; black boxes too.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used. Images that the
            perturbation was crafted on are left out.
        uap: the perturbation.
        edits: as text such as ``jpeg:75``; None: :data:`STANDARD_EDITS`, without those that do not fit the data.
        controls: names in :data:`gambeson.attacks.CONTROLS`, of each :data:`PATTERNS` patterns at most; None: random
            signs, or of a patch all of :data:`gambeson.attacks.PATCH_CONTROLS`.
        seed: of the edits, the controls and a random model's votes.

    Raises:
        UserError: an unknown edit or control, a strength out of range, an edit that does not fit the data (one that
            moves pixels does not fit label maps), or as :func:`gambeson.evaluation.universal_evasion`.
    """
    split = scorable(data, uap)
    with as_victim(model) as victim:
        return edited_rates(victim, split, uap, edits, controls=controls, seed=seed)


def edited_rates(
    victim: Victim,
    split: Split,
    uap: UniversalPerturbation,
    edits: Iterable[str | Edit] | None = None,
    *,
    controls: Iterable[str] | None = None,
    seed: int = 0,
) -> EditsResult:
    """As :func:`under_edits`, of a victim inside its context and a split without images of the crafting."""
    before, left_out = (victim.forwards, victim.backwards), dict[str, str]()
    if edits is None:
        found, left_out = fitting(STANDARD_EDITS, split)
    else:
        found = check_edits(edits, split.shape, split.task, split.name)
    if controls is None:
        controls = PATCH_CONTROLS if isinstance(uap, AdversarialPatch) else ("random-sign",)
    patterns = {name: some[:PATTERNS] for name, some in controls_beside(uap, split, seed, controls).items()}
    every = {edit.text: edit for edit in (Edit.parse(NONE), *found)}

    def rates(edit: Edit) -> EditedRates:
        def counts(delta: Shared | None) -> Counts:
            moved = None if delta is None else delta.to(victim.device)
            return score_batches(victim, split, moved, seed=seed, edit=edit).counts

        clean, under = counts(None), counts(uap.shared(victim.device))
        drawn = {name: [counts(one).error_rate for one in some] for name, some in patterns.items()}
        return EditedRates(
            edit=edit.text,
            clean=clean.error_rate,
            uer=under.error_rate,
            harm=Difference.of(under.rows, clean.rows, clean.of_sums, clean.images, seed=seed),
            controls=[Control.of(name, some) for name, some in drawn.items()],
        )

    about = uap.about
    return EditsResult(
        attack=about.attack,
        eps=about.eps,
        norm=about.norm,
        rates=[rates(edit) for edit in every.values()],
        left_out=left_out,
        cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
    )


def fitting(edits: Iterable[str | Edit], split: Split) -> tuple[list[Edit], dict[str, str]]:
    """Return the edits that fit a split, and why each of the others does not."""
    every = [Edit.parse(edit) for edit in edits]
    faults = {edit.text: edit.misfit(split.shape, split.task) for edit in every}
    return [edit for edit in every if not faults[edit.text]], {text: why for text, why in faults.items() if why}
