"""Stochastic PGD: one perturbation for all images, or one for each class, over a stream of mini-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
from gambeson.attacks.universal.context import CraftingContext
from gambeson.attacks.universal.perturbation import UniversalPerturbation
from gambeson.attacks.universal.target import OMEGA, TAU, LabelSource, Target, TargetSetting
from gambeson.base import Number, UserError, tracked
from gambeson.data import Split
from gambeson.threat import BoxGradient
from gambeson.victim import Source, Temperature, auto_batch_size

_VALUES_PER_STEP = 2**21
"""Input values that the starts which are probed together send forward per step: 128 images of 64 pixels in colour."""


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
    far as memory allows.
    """

    name: ClassVar[str] = "stochastic-pgd"

    steps: Annotated[int, Field(ge=1)] = 400
    """Gradient steps per restart, one mini-batch each."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images a step."""
    rel_step_size: Annotated[Number, Field(gt=0)] = 0.25
    """Length of the first step as a share of eps."""
    final_step: Annotated[Number, Field(gt=0)] = 0.01
    """Length of the last step as a share of eps; the lengths between follow a cosine."""
    truncate: Number | None = -math.log(0.2)
    """Truth less likely than exp(-truncate): the image is fooled and has no more say. None: plain cross-entropy.
    With ``loss="margin"``, an image whose margin is beyond it has no more say."""
    truncate_correct: bool = True
    """Whether so unlikely a truth has no more say also where the image is still right, as in the paper. False suits
    models of many classes or of a high temperature, which are seldom sure of anything; audits use it."""
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
        return Loss(kind=self.loss, truncate=truncate, truncate_correct=self.truncate_correct)

    def _search(self, context: CraftingContext, start: torch.Tensor | None) -> Iterable[Candidate]:
        starts = [(kind, self._tiled(one)) for kind, one in context.starts(self.probe_starts or self.restarts, start)]
        if self.probe_starts:
            starts = self._best(context, starts)
        for restart, (kind, delta) in enumerate(starts):
            label = f"restart {restart + 1} of {len(starts)}"
            yield Candidate(start=kind, delta=self._run(context, delta, [self.probe_starts + restart], label=label))

    def _tiled(self, start: torch.Tensor) -> torch.Tensor:
        """Repeat the tile at the top left of a start."""
        if self.tile is None:
            return start
        height, width = self.tile
        return self.ball.project(repeat_tile(start[..., :height, :width], start.shape[2:]))

    def _best(self, context: CraftingContext, starts: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Run every start for a few steps, and return the best on validation; one that was given is always kept."""
        settings = {
            "steps": self.probe_start_steps,
            "batch_size": self.probe_start_batch,
            "rel_step_size": self.probe_rel_step_size,
        }
        brief = self.model_copy(update=settings)
        drawn, given = starts[: self.probe_starts], starts[self.probe_starts :]
        kinds, first = [kind for kind, _ in drawn], torch.cat([delta for _, delta in drawn])
        most = auto_batch_size(context.train.shape, len(first) * self.probe_start_batch, _VALUES_PER_STEP)
        together = torch.arange(len(first)).split(max(1, most // self.probe_start_batch))
        ends = torch.cat([brief._run(context, first[part], part.tolist()) for part in together])
        probed = list(zip(kinds, ends.split(1), strict=True))
        judge = context.validation.sample(self.probe_start_images, seed=context.seed)
        ranked = sorted(probed, key=lambda entry: -context.rate(entry[1], judge))
        return [(f"{kind}, probed", delta) for kind, delta in ranked[: self.restarts]] + given

    def _run(
        self,
        context: CraftingContext,
        delta: torch.Tensor,
        restarts: Sequence[int],
        *,
        label: str = "probe starts",
        classwise: bool = False,
    ) -> torch.Tensor:
        """Run several starts at once, each on mini-batches of its own: one forward and backward per step.

        Args:
            context: the models and images.
            delta: (R, C, H, W), a start per restart; with ``classwise``, one perturbation per class.
            restarts: their numbers, which say in what order each sees the images.
            label: what progress calls them.
            classwise: every image carries the perturbation of its own class.
        """
        solver, memory = context.solver(self.objective), torch.zeros_like(delta)
        sums: list[torch.Tensor] = []
        streams = zip(*(context.batches(self.batch_size, restart) for restart in restarts), strict=True)
        steps = zip(islice(streams, self.steps), self.lengths, strict=True)
        for step, (batches, length) in enumerate(tracked(steps, label, self.steps), 1):
            images, labels, places = (torch.cat(parts) for parts in zip(*batches, strict=True))
            targets, weights = context.aims(images, labels, places)
            # Mini-batches differ in size where images without a label that counts were left out.
            sizes = [len(part) for part, _, _ in batches]
            alone = self.normalise == "sample" or classwise or len(set(sizes)) > 1
            # The row of each image: its own class's perturbation, or that of the restart whose mini-batch it is in.
            own = [labels.new_full((size,), row) for row, size in enumerate(sizes)] if alone and not classwise else []
            rows = torch.cat(own) if own else labels
            guide, moving = solver.at(step, self.steps), delta[rows] if alone else delta
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
            if self.normalise == "batch" or self.momentum:
                delta = solver.step_along(delta, images, direction, length)
            else:  # a mean of steps is one already
                delta = solver.project(delta + length * direction, images)
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
    """Images a step, of all classes."""
    restarts: Annotated[int, Field(ge=1)] = 2
    """The first starts from zero, the others from random signs."""

    def craft(
        self, model: Source, data: object, *, seed: int = 0, start: torch.Tensor | None = None
    ) -> UniversalPerturbation:
        """Refuse: there is one perturbation per class, see :meth:`craft_classes`."""
        raise UserError(
            "a class-wise attack makes one perturbation per class: call craft_classes, which returns them by class"
        )

    def craft_classes(self, model: Source, data: object, *, seed: int = 0) -> dict[int, UniversalPerturbation]:
        """Craft one perturbation for each class; arguments as in :meth:`StochasticPGD.craft`.

        Returns:
            Class index to its perturbation. A class without validation images is judged on its training images;
            one that has none of these either is left out.
            Forwards and backwards in each provenance are those of all classes together.

        Raises:
            UserError: label maps, which have no class per image; or data and model that do not fit.
        """
        with self._crafting(model, data, seed) as context:
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
