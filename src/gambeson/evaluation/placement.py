"""Patches by placement: what a patch does at each place, scale and angle, beside controls of the same mask there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from pydantic import Field
from torch import nn

from gambeson.attacks import PATCH_CONTROLS, AdversarialPatch, patch_control
from gambeson.base import Config, UserError, notebook
from gambeson.data import Split, as_split
from gambeson.evaluation.rates import Control, Cost, strongest_control
from gambeson.evaluation.universal import scorable
from gambeson.tasks import Counts, Difference, Rate
from gambeson.threat import Placement
from gambeson.threat.patch import require_room
from gambeson.victim import Shared, as_victim, predict

GRID = 5
"""Places along each side (ours)."""
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Scales of a curve (ours)."""
ROTATIONS = (0.0, 15.0, 30.0, 45.0, 90.0, 180.0)
"""Angles of a curve in degrees (ours)."""
IMAGES = 1000
"""Images of a curve at most, a stratified sample (ours)."""
PATTERNS = 2
"""Patterns of each control at every placement, of those that are drawn (ours)."""


class PlacedRate(Config):
    """What a patch does at one placement."""

    at: float | tuple[float, float]
    """The scale, the angle in degrees, or the place (y, x)."""
    rate: Rate
    """The error; of a patch with a target, the share of images that are taken for it."""
    controls: list[Control]
    """The same of controls at this placement."""
    lead: Difference | None = None
    """The rate minus that of the control's pattern which reaches most, paired on the same images at the same places.
    That pattern is picked on these images, so that what is left of the lead is rather too little. None without one."""

    @property
    def comparison(self) -> str:
        """Whether the patch does more than its strongest control, in a sentence; empty without one."""
        found = strongest_control(self.controls)
        if found is None or self.lead is None:
            return ""
        points = f"{{}} {100 * self.lead.low:+.1f} to {100 * self.lead.high:+.1f} points ({found.name}; 95 % interval)"
        if self.lead.low > 0:
            return points.format("The patch beats its strongest control, by") + "."
        if self.lead.high < 0:
            return points.format("The patch is behind its strongest control, by") + "."
        return points.format("The patch is not clearly ahead of its strongest control:") + "."

    @property
    def control(self) -> Rate | None:
        """The worst of all controls; None without one."""
        found = strongest_control(self.controls)
        return None if found is None else found.worst


class PlacementResult(notebook.ShownAsTable, Config):
    """A patch at every place, scale and angle of a grid; what does not vary is as it was crafted for."""

    attack: str
    placement: Placement
    """What it was crafted for."""
    area: float
    """Share of an image that it covers at scale 1."""
    target: str | None
    """What images should be taken for, of which no rate counts those of that class; None: anything wrong."""
    clean: Rate
    """The rate of clean images."""
    whole: PlacedRate
    """At the placements it was crafted for, beside every pattern of each control."""
    harm: Difference
    """What the patch adds there to clean images, paired on the same images."""
    places: list[list[PlacedRate]]
    """One list per row, from the top, of places from the left."""
    scales: list[PlacedRate]
    rotations: list[PlacedRate]
    left_out: list[str] = Field(default_factory=list)
    """Scales and angles at which the patch is larger than an image."""
    cost: Cost = Field(default_factory=Cost)

    @property
    def what(self) -> str:
        """The name of the rate."""
        return "UER" if self.target is None else f"taken for {self.target}"

    @property
    def every(self) -> dict[str, PlacedRate]:
        """Every placement by name."""
        found = {f"place {y:g}, {x:g}": one for row in self.places for one in row for y, x in [_pair(one.at)]}
        found |= {f"scale {one.at:g}": one for one in self.scales}
        return {"as crafted": self.whole} | found | {f"rotation {one.at:g}": one for one in self.rotations}

    def _lines(self) -> tuple[str, dict[str, str]]:
        title = f"{self.what} of a patch of {100 * self.area:.2g} % by placement, {self.clean.n:,} images"
        return title, {
            name: f"{one.rate}" + (f", control {one.control}" if one.control else "")
            for name, one in self.every.items()
        }

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per placement and rate."""
        rows = [{"placement": "none", "what": "clean", **self.clean.plain()}]
        for name, one in self.every.items():
            found = {self.what: one.rate, **{control.name: control.worst for control in one.controls}}
            rows += [{"placement": name, "what": what, **rate.plain()} for what, rate in found.items()]
        return notebook.frame(rows)

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the rate over places, as a heat map."""
        rows = [[one.rate for one in row] for row in self.places]
        shares = [f"{_pair(one.at)[1]:.0%}" for one in self.places[0]]
        return notebook.heat_maps({"by place, from the top left": rows}, shares, f"{self.what} by place")


def _pair(at: float | tuple[float, float]) -> tuple[float, float]:
    assert isinstance(at, tuple)
    return at


def by_placement(
    model: nn.Module,
    data: object,
    patch: AdversarialPatch,
    *,
    grid: int = GRID,
    scales: Sequence[float] | None = None,
    rotations: Sequence[float] | None = None,
    images: int | None = IMAGES,
    controls: Iterable[str] = tuple(PATCH_CONTROLS),
    seed: int = 0,
) -> PlacementResult:
    """Measure a patch at every place of a grid, and over scales and angles, beside controls at the same placements.

    One thing is varied at a time: at each place, scale and angle are drawn as they were in crafting, and likewise for
    the others. Each placement is scored as :func:`gambeson.evaluation.universal_evasion` scores a patch, or by success
    where it has a target.

    Args:
        model: any module from pixels to logits; black boxes too.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used. Images that the patch
            was crafted on are left out, and those of its target's class.
        patch: the patch.
        grid: places along each side, from one edge to the other.
        scales: factors of its sides; None: those of :data:`SCALES` at which it fits into an image.
        rotations: angles in degrees; None: those of :data:`ROTATIONS` at which it fits.
        images: a stratified sample of so many at most; None: all.
        controls: names in :data:`gambeson.attacks.PATCH_CONTROLS`; on the grid and the curves of each
            :data:`PATTERNS` patterns at most.
        seed: of the sample, the places, the controls and a random model's votes.

    Raises:
        UserError: no patch, a placement at which it does not fit, or as :func:`gambeson.evaluation.universal_evasion`.
    """
    if not isinstance(patch, AdversarialPatch):
        raise UserError(f"by_placement got a {type(patch).__name__}: expected an AdversarialPatch, which has a place")
    if grid < 1:
        raise UserError(f"grid = {grid}: expected 1 or more places along each side")
    whole, split = as_split(data, "test"), scorable(data, patch)
    split = split if images is None or images >= len(split) else split.sample(images, seed=seed)
    steps = [k / (grid - 1) if grid > 1 else 0.5 for k in range(grid)]
    own, left_out = patch.placement, []

    def varied(name: str, given: Sequence[float] | None, default: Sequence[float]) -> dict[float, Placement]:
        """Return the placements with other scales or angles; of the default ones those at which the patch fits."""
        found = {}
        for value in default if given is None else given:
            placement = Placement(**own.plain() | {name: (value, value)})
            try:
                require_room(patch.mask.shape[2:], split.shape[1:], placement)
            except UserError:
                if given is not None:
                    raise
                left_out.append(f"{name} {value:g}")
                continue
            found[value] = placement
        return found

    moved = {(y, x): own.model_copy(update={"place": (y, x)}) for y in steps for x in steps}
    scaled, turned = varied("scale", scales, SCALES), varied("rotation", rotations, ROTATIONS)
    beside = {name: patch_control(name, patch, whole, seed=seed) for name in controls}
    target = None if patch.target is None else patch.target.within(whole).index
    with as_victim(model) as victim:
        before = victim.forwards, victim.backwards

        def counts(shared: Shared | None) -> Counts:
            found = predict(victim, split, None if shared is None else shared.to(victim.device), seed=seed)
            return split.counts(found) if target is None else _taken(found, split, target)

        def placed(
            at: float | tuple[float, float], placement: Placement, patterns: int | None = PATTERNS
        ) -> PlacedRate:
            drawn = {
                name: [counts(patch.placed(one, placement)) for one in some[:patterns].split(1)]
                for name, some in beside.items()
            }
            under = counts(patch.placed(placement=placement))
            best = max(chain.from_iterable(drawn.values()), key=lambda one: one.error, default=None)
            return PlacedRate(
                at=at,
                rate=under.error_rate,
                controls=[Control.of(name, [one.error_rate for one in some]) for name, some in drawn.items()],
                lead=None if best is None else paired(under, best),
            )

        def paired(first: Counts, second: Counts) -> Difference:
            return Difference.of(first.rows, second.rows, first.of_sums, first.images, seed=seed)

        clean, under = counts(None), counts(patch.placed())
        return PlacementResult(
            attack=patch.about.attack,
            placement=own,
            area=patch.area,
            target=None if target is None else whole.classes[target],
            clean=clean.error_rate,
            whole=placed(1.0, own, None),
            harm=paired(under, clean),
            places=[[placed((y, x), moved[y, x]) for x in steps] for y in steps],
            scales=[placed(scale, placement) for scale, placement in scaled.items()],
            rotations=[placed(angle, placement) for angle, placement in turned.items()],
            left_out=left_out,
            cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
        )


def _taken(predictions: Any, split: Split, target: int) -> Counts:
    """Count an image that is taken for the target as an error, as a measure that grows with the attack needs it."""
    valid = split.task.valid(split.labels.cpu())
    return Counts(((predictions != target) & valid).long(), valid.long())
