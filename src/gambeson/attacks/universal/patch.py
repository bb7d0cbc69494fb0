"""Universal patches and stickers: stochastic PGD over pixels that are replaced at a place drawn for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from gambeson.attacks.losses import Loss, LossName
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient
from gambeson.attacks.universal.adversarial_patch import AdversarialPatch
from gambeson.attacks.universal.base import Candidate
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.controls import image_pieces
from gambeson.attacks.universal.perturbation import Provenance, Status, UniversalPerturbation
from gambeson.attacks.universal.stochastic_pgd import StochasticPGD
from gambeson.base import Number, UserError, generator
from gambeson.data import Split
from gambeson.threat import Eps, Patch, Placement
from gambeson.threat.patch import Angles, Place, Scales, mask_of
from gambeson.victim import Source

GREY = 0.5


@dataclass(frozen=True, kw_only=True)
class PatchContext(CraftingContext):
    """The context of crafting a patch, whose perturbation is its pattern less mid-grey."""

    mask: torch.Tensor
    """(1, 1, h, w), on the models' device."""
    placement: Placement
    placements: int
    restart: int = 0
    """Number of the restart, of which the places are drawn."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, C, h, w) of the pattern."""
        return (1, self.train.shape[0], *self.mask.shape[2:])

    def starts(self, restarts: int, start: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`CraftingContext.starts`, but every other random start is a piece of a training image.

        Pieces of images do more harm than noise, and climbing from noise does not always find what they are.
        """
        draw, target = generator(self.seed, "pieces"), None if self.target is None else self.target.index
        size = (int(self.mask.shape[2]), int(self.mask.shape[3]))
        pieces = iter(image_pieces(self.train, size, restarts, draw, target).to(self.device).split(1))
        for number, (kind, delta) in enumerate(super().starts(restarts, start)):
            piece = next(pieces, None) if kind == "sign" and number % 2 == 0 else None
            yield (kind, delta) if piece is None else ("image-piece", self.ball.project(piece - GREY))

    def carried(self, delta: torch.Tensor) -> Patch:
        """Return the patch."""
        return Patch(GREY + delta, self.mask, self.placement)

    def batches(self, batch_size: int, restart: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As :meth:`CraftingContext.batches`, each image once per placement."""
        for batch in super().batches(batch_size, restart):
            images, labels, rows = (part.repeat_interleave(self.placements, 0) for part in batch)
            yield images, labels, rows

    def reach(self, split: Split, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`CraftingContext.reach`; an image of the target's class has no target."""
        assert self.target is not None
        targets, hidden = super().reach(split, rows)
        labels = split.labels.cpu() if rows is None else split.labels.cpu()[rows]
        return targets.where(labels != self.target.index, -1), hidden

    def solver(self, loss: Loss) -> ProjectedGradient:
        """As :meth:`CraftingContext.solver`, of patches at fresh places at every step."""
        draw = generator(self.seed, "placements", self.restart)

        def carry(images: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
            patch = self.carried(delta)
            return patch(images, patch.draw(len(images), draw))

        return replace(super().solver(loss), carry=carry)


@register(
    "universal-patch",
    source="Brown et al. 2017",
    cost="((probe_starts x probe_start_steps x probe_start_batch) + (restarts x steps x batch_size)) x placements",
)
class UniversalPatch(StochasticPGD):
    """A patch, or a sticker, that is put on every image at a place, scale and angle drawn for each.

    Adversarial patches (Brown et al., arXiv 1712.09665) in one corner or at fixed places are those of LaVAN (Karmon et
    al., arXiv 1801.02608); with a mask of its own, a sticker (Eykholt et al., arXiv 1707.08945). The expectation over
    placements is maximised by stochastic PGD, with its probed starts and selection on validation, where the papers use
    their own loops. Values under the mask are free in [0, 1]: the ball of norm inf and radius 1/2
    around mid-grey. Starts are the grey patch, then in turn a random black and white one and a piece of a training
    image, of the target's class if there is one (ours).

    Each restart draws its own placements, and runs alone. Validation selects at placements of its own, the same for all
    candidates.
    """

    name: ClassVar[str] = "universal-patch"

    loss: LossName = "margin"
    """As of :class:`StochasticPGD`, but for the default (ours): a small patch fools few images, and cross-entropy
    truncated where they are fooled loses those that one place of many has only just fooled."""
    truncate: Number | None = None
    """As of :class:`StochasticPGD`, but for the default (ours)."""
    momentum: Annotated[Number, Field(ge=0)] = 0.9
    """As of :class:`StochasticPGD`, but for the default (ours)."""
    eps: Annotated[Eps, Field(gt=0, le=0.5)] = 0.5
    """Largest difference of a value of the patch from mid-grey, 1/2: 0.5 is all of [0, 1]; less suits printers, whose
    black and white are grey."""
    area: Annotated[Number, Field(gt=0, le=1)] = 0.05
    """Share of the image that the patch covers at scale 1; the nearest whole number of pixels along each side counts
    (the default is ours)."""
    shape: str = "square"
    """``square``, ``circle``, or a sticker: the file of a picture with transparency, whose opaque part it has."""
    place: Place = "random"
    """See :data:`gambeson.threat.patch.Place`."""
    scale: Scales = (1.0, 1.0)
    """See :data:`gambeson.threat.patch.Scales`."""
    rotation: Angles = (0.0, 0.0)
    """See :data:`gambeson.threat.patch.Angles`."""
    placements: Annotated[int, Field(ge=1)] = 1
    """Placements drawn per image and step (expectation over transformation, Athalye et al. 2018), a forward and a
    backward each; one suffices (the default is ours), because the images of a batch differ in theirs."""

    @model_validator(mode="after")
    def _is_a_patch(self) -> Self:
        own = {"norm": "inf", "tile": None, "shrink": 0.0, "box_gradient": "straight-through"}
        for setting, only in own.items():
            if getattr(self, setting) != only:
                raise ValueError(f"a patch has values that are free under its mask: leave {setting} out")
        return self

    @property
    def placement(self) -> Placement:
        """How the patch is placed."""
        return Placement(place=self.place, scale=self.scale, rotation=self.rotation)

    def craft_curve(
        self, model: Source, data: object, eps: Sequence[float | str], *, seed: int = 0
    ) -> list[UniversalPerturbation]:
        """Refuse: eps does not bound what a patch changes."""
        raise UserError("a patch has no curve over eps: craft one per area, or measure by_placement")

    def _prepare(self, victims: list[Any], data: object, seed: int) -> PatchContext:
        context = super()._prepare(victims, data, seed)
        image = context.train.shape[1:]
        mask = mask_of(self.shape, self.area, image)
        pattern = torch.zeros(1, context.train.shape[0], *mask.shape[2:])
        Patch(pattern, mask, self.placement).require_fit(context.train.shape, context.task)
        known = {one.name: getattr(context, one.name) for one in fields(context) if one.init}
        return PatchContext(**known, mask=mask.to(context.device), placement=self.placement, placements=self.placements)

    def _run(
        self, context: CraftingContext, delta: torch.Tensor, restarts: Sequence[int], **keywords: Any
    ) -> torch.Tensor:
        assert isinstance(context, PatchContext)
        keywords = {key: value for key, value in keywords.items() if key != "curve"}  # of this attack alone
        ends, label = [], keywords.pop("label", "start")
        for number, (one, restart) in enumerate(zip(delta.split(1), restarts, strict=True), 1):
            told = label if len(delta) == 1 else f"{label}, {number} of {len(delta)}"
            ends.append(super()._run(replace(context, restart=restart), one, [restart], label=told, **keywords))
        return torch.cat(ends)

    def _scaled(self, start: torch.Tensor, context: CraftingContext) -> torch.Tensor:
        """Return a start from a pattern in [0, 1]."""
        super()._scaled(torch.zeros_like(start), context)
        return self.ball.project(start - GREY)

    def _made(self, context: CraftingContext, delta: torch.Tensor, about: Provenance) -> AdversarialPatch:
        assert isinstance(context, PatchContext)
        pattern, mask = (GREY + delta).clamp(0, 1), context.mask.cpu()
        return AdversarialPatch(pattern, mask, context.train.shape, about, self._seen(context))

    def _status(self, delta: torch.Tensor, chosen: Candidate) -> Status:
        return "done" if chosen.reached else "target not reached"
