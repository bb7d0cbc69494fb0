"""Stochastic PGD: one perturbation for all images, or one for each class, over a stream of mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from gambeson.attacks.losses import MASKED, Loss, LossName
from gambeson.attacks.registry import register
from gambeson.attacks.solver import cosine, require_finite
from gambeson.attacks.universal.base import Candidate, UniversalAttack
from gambeson.attacks.universal.context import CraftingContext, passes
from gambeson.attacks.universal.perturbation import UniversalPerturbation
from gambeson.attacks.universal.target import OMEGA, TAU, LabelSource, Target, TargetSetting
from gambeson.base import Number, UserError, generator, seeded, tracked
from gambeson.data import Split
from gambeson.threat import Ball, BoxGradient
from gambeson.victim import Source, Temperature, auto_batch_size

_VALUES_PER_STEP, _VALUES_PER_STEP_ON_CPU = 2**21, 2**19
"""Input values that climbs which run together send forward per step: 682 colour images of 32 x 32; on a CPU, whose
caches larger batches exceed, 170."""


@register(
    "stochastic-pgd",
    source="Shafahi et al. 2020; Mummadi et al. 2019",
    cost="(probe_starts x probe_start_steps x probe_start_batch) + (restarts x steps x batch_size)",
)
class StochasticPGD(UniversalAttack):
    """Stochastic projected gradient descent for universal perturbations.

    Maximises mean_i min(CE(f(clip(x_i + delta)), y_i), kappa) over the ball by steps on mini-batches (Shafahi et
    al., arXiv 1811.11304; the attack of Mummadi et al. 2019). Neither paper's schedule or number of restarts is
    known: all defaults here are ours, but for the truncation kappa = -log 0.2 of Mummadi et al.

    Where a run ends depends on its start far more than on its length or its batch, so many starts are run a
    little, on small batches with long steps, and only the best goes on (``studies/universal-budget.yaml``). The
    papers' one long run is ``probe_starts=0, steps=200, batch_size=128, box_gradient="exact", temperature=1``.

    Crafted on ``data.train``; ``data.validation`` chooses among starts; ``data.test`` is never looked at. It costs
    ``probe_starts * probe_start_steps * probe_start_batch + restarts * steps * batch_size`` forwards and as many
    backwards, 25,600 by default, and a forward of ``probe_start_images`` per start probed, of all validation per
    restart, and of 200 images for the temperature. Starts are probed together, in one forward and backward per step, as
    far as it pays, and so are restarts and the radii of :meth:`craft_curve`. No climb depends on which others it runs
    with; but each restart of a random model, or of edits, runs alone, as its draws would.
    """

    name: ClassVar[str] = "stochastic-pgd"

    steps: Annotated[int, Field(ge=1)] = 400
    """Gradient steps per restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per step."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Length of the first step as a share of eps."""
    final_step: Annotated[Number, Field(gt=0)] = 0.01
    """Length of the last step as a share of eps; the lengths between follow a cosine."""
    shrink: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Norm inf only: stay inside a box whose half-width is drawn for each value from [1 - shrink, 1] eps, as with
    :attr:`gambeson.attacks.PGD.shrink` (ours)."""
    truncate: Number | None = -math.log(0.2)
    """Truth less likely than exp(-truncate): the image is fooled and has no more say. None: plain cross-entropy.
    With ``loss="margin"``, an image whose margin is beyond it has no more say."""
    truncate_margin: Number | None = None
    """By how much the truth's logit must also lie behind the likeliest wrong one's, for an image to have no more say
    (:attr:`gambeson.attacks.Loss.truncate_margin`); None: as in the paper. 0.4 suits models that are seldom sure of
    anything, as those of many classes or of low accuracy, and costs others nothing; audits use it."""
    tau: Annotated[Number, Field(gt=0, le=1)] = TAU
    """Targeted only: an image, or a pixel, whose target has a probability above this has no more say (Metzen et al.
    2017)."""
    restarts: Annotated[int, Field(ge=1)] = 1
    """Runs of ``steps``; without ``probe_starts`` the first starts from zero, the others from random signs."""
    probe_starts: Annotated[int, Field(ge=0)] = 8
    """Starts (zero, then random signs) that are run for ``probe_start_steps`` first; the best ``restarts`` of them
    on validation go on for ``steps``. 0: every restart goes its whole way, as in the papers."""
    probe_start_steps: Annotated[int, Field(ge=1)] = 100
    """Steps of that first run, which follow a cosine of their own."""
    probe_start_batch: Annotated[int, Field(ge=1)] = 16
    """Images per step of that first run."""
    probe_rel_step_size: Annotated[Number, Field(gt=0)] = 0.5
    """Length of its first step as a share of eps."""
    probe_start_images: Annotated[int, Field(ge=1)] = 1000
    """Validation images that rank the starts probed; the last choice is on all of them."""
    target: TargetSetting = None
    """What should be predicted, such as a class for every image (:class:`gambeson.attacks.Target`); None: anything
    wrong."""
    omega: Annotated[Number, Field(ge=0, le=1)] = OMEGA
    """Where a class is to be hidden: weight of its pixels; all others have 1 - omega (Metzen et al. 2017)."""
    tile: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Height and width of a tile that the perturbation repeats, from the top left (Metzen et al. 2017); None: none."""
    box_gradient: BoxGradient = "straight-through"
    """See :data:`gambeson.threat.BoxGradient`; ``exact`` is the papers'."""
    loss: LossName = "cross-entropy"
    """What is maximised (:data:`gambeson.attacks.LossName`). Those that weigh pixels by whether they are right, and
    ``js``, which is bounded, are not truncated as well."""
    momentum: Annotated[Number, Field(ge=0)] = 0.0
    """Decay of the gradients summed over the steps, each divided by its mean absolute value (Dong et al. 2018)."""
    normalise: Literal["batch", "sample"] = "batch"
    """``batch``: the steepest step of the mean gradient. ``sample``: the mean of every image's own steepest step
    (Perolat et al., arXiv 1809.07802), so that no image has more say than another."""
    labels: LabelSource = "truth"
    """See :data:`gambeson.attacks.universal.target.LabelSource`; a target other than a class has ``prediction`` as its
    default, as in Metzen et al. 2017."""
    temperature: Temperature = "auto"
    """See :data:`gambeson.victim.Temperature`."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.shrink and self.norm != "inf":
            raise ValueError(f"shrink is for norm 'inf', and the norm is {self.norm!r}; leave it out")
        if self.tile is not None and self.norm == "1":
            raise ValueError("a step in norm 1 moves single pixels, no tiles; choose norm inf or 2")
        if isinstance(self.target, Target) and self.target.kind != "class" and "labels" not in self.model_fields_set:
            self.__dict__["labels"] = "prediction"
        return self

    @property
    def lengths(self) -> list[float]:
        """Length of each step in pixel units: a cosine from ``rel_step_size`` to ``final_step``, times eps."""
        return [self.eps * share for share in cosine(self.steps, self.rel_step_size, self.final_step)]

    @property
    def objective(self) -> Loss:
        """What is maximised, one value per image."""
        if self.target is not None:
            return Loss(kind=self.loss, targeted=True, tau=self.tau)
        truncate = None if self.loss in (*MASKED, "js") else self.truncate
        return Loss(kind=self.loss, truncate=truncate, truncate_margin=self.truncate_margin)

    def craft_curve(
        self, model: Source, data: object, eps: Sequence[float | str], *, seed: int = 0
    ) -> list[UniversalPerturbation]:
        """Craft a perturbation at each of several eps, whose climbs run together.

        As :meth:`craft` at one eps after another, from the smallest, with the perturbation of the next smaller eps as
        ``start``. Climbs from drawn starts do not depend on each other: those of all eps share their images, forwards
        and backwards. Only those from the smaller eps follow one another. In float32 on a CPU, the perturbations of a
        model that draws nothing are the same, bit by bit.

        Args:
            model: as in :meth:`craft`.
            data: as in :meth:`craft`.
            eps: radii in pixel units, instead of the attack's own.
            seed: of every draw, the same at each eps.

        Returns:
            A perturbation per eps, ascending. Forwards and backwards in the provenance of the first include those that
            do not divide evenly among all.
        """
        curve = [
            self.model_copy(update={"eps": radius})
            for radius in sorted({Ball(eps=one, norm=self.norm).eps for one in eps})
        ]
        if not curve:
            raise UserError("craft_curve got no eps: expected one or more radii in pixel units")
        found: list[UniversalPerturbation] = []
        with self._crafting(model, data, seed) as context, seeded(seed, "noise"):
            drawn = self._climbed(context, curve)
            shared = [now - old for now, old in zip(passes(context.victims), context.before, strict=True)]
            for number, (attack, candidates) in enumerate(zip(curve, drawn, strict=True)):
                own = [count // len(curve) + (0 if number else count % len(curve)) for count in shared]
                forwards, backwards = (now - old for now, old in zip(passes(context.victims), own, strict=True))
                here = replace(context, ball=attack.ball, before=(forwards, backwards))
                if found:
                    start = attack._scaled(found[-1].delta.to(context.device), context)
                    candidates.append(attack._from_given(here, start))
                found.append(attack._chosen(here, candidates))
        return found

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        yield from self._climbed(context, [self])[0]
        if start is not None:
            yield self._from_given(context, start)

    def _climbed(self, context: CraftingContext, curve: Sequence[StochasticPGD]) -> list[list[Candidate]]:
        """Return the ends of the climbs from drawn starts at each eps; the attacks differ in their eps alone."""
        count, starts = self.probe_starts or self.restarts, []
        for attack in curve:
            own = replace(context, ball=attack.ball).starts(count, None)
            starts.append([(kind, attack._tiled(delta)) for kind, delta in own])
        if self.probe_starts:
            starts = self._best(context, curve, starts)
        numbers = range(self.probe_starts, self.probe_starts + len(starts[0]))
        apart = bool(context.edits) or any(
            victim.batch_norm != "eval" or (victim.traits is not None and victim.traits.stochastic)
            for victim in context.victims
        )
        ends = self._together(context, curve, starts, numbers, apart=apart)
        return [
            [Candidate(start=kind, delta=end) for (kind, _), end in zip(own, found.split(1), strict=True)]
            for own, found in zip(starts, ends, strict=True)
        ]

    def _from_given(self, context: CraftingContext, start: torch.Tensor) -> Candidate:
        """Climb from a start that was given, always the whole way."""
        number = self.probe_starts + min(self.restarts, self.probe_starts or self.restarts)
        return Candidate(start="warm", delta=self._run(context, self._tiled(start), [number], label="given start"))

    def _tiled(self, start: torch.Tensor) -> torch.Tensor:
        """Repeat the tile at the top left of a start."""
        if self.tile is None:
            return start
        height, width = self.tile
        return self.ball.project(repeat_tile(start[..., :height, :width], start.shape[2:]))

    def _best(
        self,
        context: CraftingContext,
        curve: Sequence[StochasticPGD],
        starts: Sequence[Sequence[tuple[str, torch.Tensor]]],
    ) -> list[list[tuple[str, torch.Tensor]]]:
        """Run every start for a few steps, and return the best on validation, for each eps."""
        settings = {
            "steps": self.probe_start_steps,
            "batch_size": self.probe_start_batch,
            "rel_step_size": self.probe_rel_step_size,
        }
        brief = [attack.model_copy(update=settings) for attack in curve]
        ends = brief[0]._together(context, brief, starts, range(self.probe_starts), "probe starts")
        judge, best = context.validation.sample(self.probe_start_images, seed=context.seed), []
        for own, found in zip(starts, ends, strict=True):
            probed = [(f"{kind}, probed", end) for (kind, _), end in zip(own, found.split(1), strict=True)]
            best.append(sorted(probed, key=lambda entry: -context.rate(entry[1], judge))[: self.restarts])
        return best

    def _together(
        self,
        context: CraftingContext,
        curve: Sequence[StochasticPGD],
        starts: Sequence[Sequence[tuple[str, torch.Tensor]]],
        numbers: Sequence[int],
        label: str = "",
        *,
        apart: bool = False,
    ) -> torch.Tensor:
        """Run the starts of every eps, as many at once as pay; return their ends, (E, R, C, H, W).

        Args:
            context: the models and images.
            curve: the attacks, which differ in their eps alone.
            starts: R kinds and (1, C, H, W) each, for each of them.
            numbers: of the R restarts.
            label: what progress calls them; by default the numbers of the restarts.
            apart: each start by itself.
        """
        first = torch.stack([torch.cat([delta for _, delta in own]) for own in starts])
        (radii, restarts), ends = first.shape[:2], torch.empty_like(first)
        values = _VALUES_PER_STEP_ON_CPU if context.device.type == "cpu" else _VALUES_PER_STEP
        images = 1 if apart else auto_batch_size(context.train.shape, radii * restarts * self.batch_size, values)
        most = max(1, images // self.batch_size)
        for rows in torch.arange(restarts).split(most):
            for own in torch.arange(radii).split(max(1, most // len(rows))):
                last = "" if len(rows) == 1 else f" to {int(rows[-1]) + 1}"
                told = label or f"restart {int(rows[0]) + 1}{last} of {restarts}"
                part = first[own][:, rows]
                found = self._run(
                    context,
                    part.flatten(0, 1),
                    [numbers[row] for row in rows.tolist()],
                    curve=[curve[k] for k in own.tolist()],
                    label=told,
                )
                ends[own[:, None], rows] = found.view_as(part)
        return ends

    def _run(
        self,
        context: CraftingContext,
        delta: torch.Tensor,
        restarts: Sequence[int],
        *,
        curve: Sequence[StochasticPGD] = (),
        label: str = "probe starts",
        classwise: bool = False,
    ) -> torch.Tensor:
        """Run several starts at once, each on mini-batches of its own: one forward and backward per step.

        Args:
            context: the models and images.
            delta: (R, C, H, W), a start per restart; with ``classwise``, one perturbation per class. With a curve, as
                many for each eps, one after another.
            restarts: their numbers, which say in what order each sees the images.
            curve: attacks that differ in their eps alone; each restart sees the same images at each. By default this
                one.
            label: what progress calls them.
            classwise: every image carries the perturbation of its own class.
        """
        curve = curve or [self]
        solver, memory, heaps = context.solver(self.objective), torch.zeros_like(delta), len(delta) // len(curve)
        if self.shrink:
            boxes = [
                solver.within(self.shrink, delta, generator(context.seed, "box", restart, device=delta.device)).sizes
                for restart in restarts
            ]
            solver = replace(solver, sizes=torch.cat([box for box in boxes if box is not None]))
        climbs = [(replace(solver, ball=attack.ball), attack.lengths) for attack in curve]
        sums: list[torch.Tensor] = []
        streams = zip(*(context.batches(self.batch_size, restart) for restart in restarts), strict=True)
        for step, batches in enumerate(tracked(islice(streams, self.steps), label, self.steps)):
            images, labels, places = (torch.cat(parts) for parts in zip(*batches, strict=True))
            targets, weights = context.aims(images, labels, places)
            # Mini-batches differ in size where images without a label that counts were left out.
            sizes = [len(part) for part, _, _ in batches]
            alone = self.normalise == "sample" or classwise or len(set(sizes)) > 1
            # The row of each image: its own class's perturbation, or that of the restart whose mini-batch it is in.
            own = [labels.new_full((size,), row) for row, size in enumerate(sizes)] if alone and not classwise else []
            rows = torch.cat(own) if own else labels
            if len(curve) > 1:
                images, targets = torch.cat([images] * len(curve)), torch.cat([targets] * len(curve))
                weights = None if weights is None else torch.cat([weights] * len(curve))
                rows = torch.cat([rows + k * heaps for k in range(len(curve))]) if alone else rows
            guide, moving = solver.at(step + 1, self.steps), delta[rows] if alone else delta
            direction, logits = guide.gradient(moving, images, targets, weights=weights, sums=sums)
            direction = direction if self.tile is None else mean_over_tiles(direction, self.tile)
            if self.normalise == "sample":
                direction = context.ball.steepest(direction)
            if alone:
                direction = torch.zeros_like(delta).index_add_(0, rows, direction)
            if self.normalise == "sample":
                direction = direction / rows.bincount(minlength=len(delta)).clamp(min=1).view(-1, 1, 1, 1)
            if self.momentum:
                size = direction.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
                direction = memory = self.momentum * memory + direction / size
            moved = []
            for (inside, lengths), part, way in zip(climbs, delta.split(heaps), direction.split(heaps), strict=True):
                if self.normalise == "batch" or self.momentum:
                    moved.append(inside.step_along(part, images, way, lengths[step]))
                else:  # a mean of steps is one already
                    moved.append(inside.project(part + lengths[step] * way, images))
            delta = torch.cat(moved)
        require_finite(sums, done=partial(solver.done, logits, targets))
        return delta


class ClasswiseStochasticPGD(StochasticPGD):
    """Stochastic PGD with one perturbation for every true class, all of them crafted at once.

    After class-wise universal attacks (Zhang et al. 2020) and class-wise UAT (Benz et al. 2021, arXiv 2104.03000):
    in a batch every image carries its own class's perturbation, x_i + delta[y_i], so that one backward serves all
    classes. An image informs its own class only: at equal cost a class sees ``batch_size / K`` images per step, and
    the default batch is larger for that reason.

    ``craft_classes`` returns a perturbation for every class, each chosen on the validation images of its class.
    To apply them one has to know the true class, so ``craft`` is refused.
    """

    name: ClassVar[str] = "classwise-stochastic-pgd"

    probe_starts: Literal[0] = 0
    """Not for class-wise perturbations."""

    steps: Annotated[int, Field(ge=1)] = 200
    """Gradient steps per restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 512
    """Images per step, over all classes."""
    restarts: Annotated[int, Field(ge=1)] = 2
    """The first starts from zero, the others from random signs."""

    def craft(
        self, model: Source, data: object, *, seed: int = 0, start: torch.Tensor | None = None
    ) -> UniversalPerturbation:
        """Refuse: there is one perturbation per class, see :meth:`craft_classes`."""
        raise UserError(
            "a class-wise attack makes one perturbation per class: call craft_classes, which returns them by class"
        )

    def craft_curve(
        self, model: Source, data: object, eps: Sequence[float | str], *, seed: int = 0
    ) -> list[UniversalPerturbation]:
        """Refuse, as :meth:`craft` does."""
        return [self.craft(model, data, seed=seed)]

    def craft_classes(self, model: Source, data: object, *, seed: int = 0) -> dict[int, UniversalPerturbation]:
        """Craft one perturbation for each class; arguments as in :meth:`StochasticPGD.craft`.

        Returns:
            Class index to its perturbation. A class without validation images is judged on its training images;
            one that has none of these either is left out.
            Forwards and backwards in each provenance are those of all classes together.

        Raises:
            UserError: label maps, which have no class per image; or data and model that do not fit.
        """
        with self._crafting(model, data, seed) as context, seeded(seed, "noise"):
            context.task.require_classification("a class-wise attack")
            classes = len(context.train.classes)
            kinds, outcomes = [], []
            for restart in range(self.restarts):
                kinds.append("sign" if restart else "zero")
                first = self._tiled(context.start(kinds[-1], restart, classes))
                outcomes.append(self._run(context, first, [restart], classwise=True))
            table = {k: [context.rate(delta[[k]], part) for delta in outcomes] for k, part in _parts(context, classes)}
            found = {}
            for k, rates in table.items():
                best = max(range(len(rates)), key=rates.__getitem__)
                delta = outcomes[best][[k]].cpu()
                restarts = list(zip(kinds, rates, strict=True))
                chosen = Candidate(start=kinds[best], delta=delta)
                about = self._about(context, restarts, self._status(delta, chosen), source_class=k)
                found[k] = UniversalPerturbation(delta, about, self._seen(context))
        return found


def repeat_tile(tile: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Repeat tiles (R, C, h, w) from the top left over ``size``, height and width; the last copies may be cut."""
    copies = [-(-side // own) for side, own in zip(size, tile.shape[2:], strict=True)]
    return tile.repeat(1, 1, *copies)[..., : size[0], : size[1]]


def mean_over_tiles(gradient: torch.Tensor, tile: Sequence[int]) -> torch.Tensor:
    """Return the gradient of a repeated tile: at every pixel the mean over the copies of its place in the tile.

    The gradient of the tile itself is the sum over its copies. The mean is the projection onto perturbations that
    repeat a tile, so that its direction is the steepest one among them also where the last copies are cut.

    Args:
        gradient: (R, C, H, W).
        tile: height and width.
    """
    size = gradient.shape[2:]
    spare = [-side % own for side, own in zip(size, tile, strict=True)]

    def summed(values: torch.Tensor) -> torch.Tensor:
        padded = F.pad(values, (0, spare[1], 0, spare[0]))
        return padded.unflatten(3, (-1, tile[1])).unflatten(2, (-1, tile[0])).sum((2, 4))

    return repeat_tile(summed(gradient) / summed(torch.ones_like(gradient[:1, :1])), size)


def _parts(context: CraftingContext, classes: int) -> Iterator[tuple[int, Split]]:
    for k in range(classes):
        for split in (context.validation, context.train):
            own = split.labels == k
            if bool(own.any()):
                yield k, split.subset(own)
                break
