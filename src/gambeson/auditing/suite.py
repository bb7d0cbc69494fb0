"""How thorough an audit is: every setting of its attacks, by name of suite."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from gambeson.attacks import (
    CONTROLS,
    MORE_CONTROLS,
    PGD,
    ClasswiseStochasticPGD,
    CosPGD,
    StochasticPGD,
    TargetedAutoPGD,
    UniversalNES,
)
from gambeson.base import Config, Number, unknown_name
from gambeson.base.registry import canonical
from gambeson.data import Dataset
from gambeson.evaluation.edits import STANDARD_EDITS
from gambeson.threat import Eps, Norm, eps_in_norm
from gambeson.threat.edits import EditText
from gambeson.victim import DEFAULT_VOTES, EOT_SAMPLES

_GREY = (0.05, 0.1, 0.15, 0.2, 0.3)
_COLOUR = (4 / 255, 8 / 255, 12 / 255, 16 / 255, 26 / 255)


def middle_of(eps: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return so many radii around the middle one, which stays the middle one."""
    first = max(0, len(eps) // 2 - count // 2)
    return eps[first : first + count]


class Suite(Config):
    """Settings of an audit. The papers fix none of these numbers; all defaults are ours."""

    eps: tuple[Eps, ...] = ()
    """Radii of the curve, ascending; empty: a default grid for grey or colour images. Pictures, per-image attacks and
    the verdict use the middle one."""
    eps_points: Annotated[int, Field(ge=1, le=len(_GREY))] = len(_GREY)
    """How many radii the default grid has, the middle ones."""
    norm: Norm = "inf"
    """Norm of the ball."""
    universal_steps: Annotated[int, Field(ge=1)] = 400
    """Gradient steps of stochastic PGD per restart."""
    universal_restarts: Annotated[int, Field(ge=1)] = 4
    """Starts of stochastic PGD that run to the end."""
    universal_batch: Annotated[int, Field(ge=1)] = 64
    """Training images per step of stochastic PGD."""
    universal_probe_starts: Annotated[int, Field(ge=0)] = 8
    """Number of random starts that stochastic PGD probes."""
    pgd_steps: Annotated[int, Field(ge=1)] = 40
    """Gradient steps of PGD per restart."""
    pgd_restarts: Annotated[int, Field(ge=1)] = 2
    """Starts of PGD per image."""
    test_images: Annotated[int, Field(ge=1)] | None = None
    """Test images that are reported on, a stratified sample; None: all."""
    validation_images: Annotated[int, Field(ge=1)] | None = None
    """Validation images for selection, a stratified sample; None: all."""
    sample: Annotated[int, Field(ge=1)] = 200
    """Test images for the diagnostics."""
    suite_images: Annotated[int, Field(ge=0)] = 500
    """Test images that the standard attack suite is tried on; 0 leaves it out."""
    suite_queries: Annotated[int, Field(ge=1)] = 5000
    """Queries per image of Square, the last attack of the suite."""
    queries: Annotated[int, Field(ge=0)] = 500
    """Queries of Square, the attack that needs no gradient, per image of the sample; 0 leaves it out."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of images sent to a black box over the whole audit; None: no limit. What does not fit is reduced
    or omitted, and the result says so."""
    minutes: Annotated[Number, Field(gt=0)] | None = None
    """Time for the whole audit: a few batches are timed, what does not fit is reduced or omitted, what tells least for
    its time first, and the result says so. Its own settings are those that were chosen, without a limit."""
    universal_queries: Annotated[int, Field(ge=0)] = 100_000
    """Images that :class:`gambeson.attacks.UniversalNES`, the universal attack that needs no gradient, asks about at
    the middle eps; 0 leaves it out. Not for black boxes, which have patterns."""
    patterns: Annotated[int, Field(ge=1)] = 100
    """Black boxes: noise patterns of each kind (Perlin, Gabor) per eps."""
    pattern_images: Annotated[int, Field(ge=1)] = 200
    """Black boxes: training images per pattern, and validation images for selection."""
    surrogate: str = "auto"
    """The model that transferred perturbations are crafted on: ``auto`` trains a small net on the train split, where
    images are 64 pixels wide at most; ``none`` leaves transfer out; or a run folder, a weights file, an architecture
    with weights, as the model of an audit is named."""
    surrogate_epochs: Annotated[int, Field(ge=1)] = 10
    """Epochs of the surrogate's training; more if there are few images."""
    surrogate_images: Annotated[int, Field(ge=1)] = 20_000
    """Maximum number of training images of the surrogate."""
    transfer_images: Annotated[int, Field(ge=1)] = 1000
    """Maximum number of test images for per-image transfer attacks."""
    noise_sizes: tuple[Annotated[Number, Field(gt=0)], ...] = (0.5, 1.0, 2.0, 4.0)
    """Sizes of corruption noise, as multiples of the middle eps."""
    edits: tuple[EditText, ...] = STANDARD_EDITS
    """Edits that the perturbation of the middle eps is tried under (:func:`gambeson.evaluation.under_edits`); those
    that do not fit the data are left out, and the result says so. Empty: none."""
    edit_images: Annotated[int, Field(ge=1)] = 1000
    """Maximum number of test images for them, a stratified sample."""
    class_wise: bool = False
    """Whether a perturbation is crafted for each class too, at the middle eps; not for black boxes and label maps."""
    jacobian_backwards: Annotated[int, Field(ge=0)] = 4000
    """Backward passes that each exact part of the Jacobian analysis may take; 0 leaves the analysis out."""
    targeted: bool = True
    """Whether perturbations with a target are crafted at the middle eps, where labels are maps."""
    votes: Annotated[int, Field(ge=1)] = DEFAULT_VOTES
    """Votes per image of a random model; with one, a diagnostic fails."""
    eot_samples: Annotated[int, Field(ge=1)] = EOT_SAMPLES
    """Draws of a random model that a gradient is averaged over by every attack."""
    checks: Literal["all"] | tuple[str, ...] = "all"
    """Which of the built-in diagnostics run, by name. With fewer than all no verdict is *trusted*."""
    middle_first: bool = False
    """Whether the curve begins at its middle eps and goes on outwards, so that an audit that is cut short has the
    number of the verdict. Else every eps begins from the perturbation of a smaller one. A limit on the time sets it."""
    auto_pgd: bool = True
    """Whether every test image is attacked by targeted Auto-PGD too (:meth:`targeted_auto_pgd`)."""
    rescoring: bool = True
    """Whether perturbed images are asked for again in other batches and inside their ball, where the worst counts."""
    certified: bool = False
    """Whether lower bounds on the accuracy stand beside what the perturbations leave, at every eps, on 100 test images:
    :func:`gambeson.analysis.certified_accuracy`, for small chains of affine layers, ReLU and max-pooling, in the norm
    inf. Other models are then refused."""
    eps_uni_delta: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """The error of eps_uni."""
    eps_uni_tolerance: Annotated[Number, Field(gt=0, lt=1)] = 0.02
    """Width of the last bracket as a share of eps."""
    eps_uni_runs: Annotated[int, Field(ge=0)] | None = None
    """Maximum number of perturbations crafted in that search; 0: read off the curve; None: no limit."""
    eps_adv: bool = True
    """Whether to search eps_adv on the sample (not for black boxes)."""
    controls: tuple[str, ...] = tuple(CONTROLS)
    """Patterns that know nothing of the model, tried at each eps: see :func:`gambeson.attacks.control`. One that does
    more harm on validation than what was crafted takes its place."""

    @field_validator("controls")
    @classmethod
    def _known(cls, controls: tuple[str, ...]) -> tuple[str, ...]:
        for name in controls:
            if name not in CONTROLS | MORE_CONTROLS:
                raise unknown_name("control", name, CONTROLS | MORE_CONTROLS)
        return controls

    @property
    def patterns_of_controls(self) -> int:
        """Number of patterns of the controls."""
        return sum((CONTROLS | MORE_CONTROLS)[name] for name in self.controls)

    diagnostics: tuple[Annotated[str, AfterValidator(canonical)], ...] = ()
    """Additional diagnostics: registered names of installed packages, or ``FILE.py:FUNCTION``. Their cost is not part
    of estimates."""

    attacks: tuple[Annotated[str, AfterValidator(canonical)], ...] = ()
    """Additional attacks at the middle eps, by name or as ``FILE.py:CLASS``: per image, on all test images, or
    universal. Not for black boxes. Estimates take their cost from settings such as ``steps``, ``restarts``, ``queries``
    and ``batch_size``."""

    map_share: Annotated[Number, Field(gt=0, le=1)] = 0.4
    """What part of every number of images above, of a batch too, and of starts to probe is used where labels are maps:
    the thousands of pixels of a map tell more than one label, so that fewer images give as narrow an interval."""

    @field_validator("eps")
    @classmethod
    def _ascending(cls, eps: tuple[float, ...]) -> tuple[float, ...]:
        if list(eps) != sorted(set(eps)):
            raise ValueError(f"eps must be ascending without repeats, got {', '.join(f'{e:g}' for e in eps)}")
        if len({f"{one:.4g}" for one in eps}) < len(eps):  # files and tables name them so
            raise ValueError(f"expected radii that differ in their first four digits, got {', '.join(map(str, eps))}")
        return eps

    def runs(self, check: str) -> bool:
        """Whether a built-in diagnostic is one of :attr:`checks`."""
        return self.checks == "all" or check in self.checks

    def on(self, data: Dataset) -> Suite:
        """The suite with a default grid of eps for this data, if none was given, and :attr:`map_share` applied."""
        update: dict[str, object] = {}
        if self.class_wise:
            data.test.task.require_classification("a class-wise attack")
        if not self.eps:
            side = middle_of(_GREY if data.in_channels == 1 else _COLOUR, self.eps_points)
            update["eps"] = tuple(eps_in_norm(eps, data.test.shape, self.norm) for eps in side)
        if not data.test.task.per_image_label and self.map_share < 1:
            asked = {name: getattr(self, name) for name in _OF_IMAGES}
            update |= {name: max(1, round(self.map_share * number)) for name, number in asked.items() if number}
            starts = round(self.map_share * self.universal_probe_starts)
            update |= {"universal_probe_starts": starts if starts > 1 else 0, "map_share": 1.0}  # one is no choice
        return self.model_copy(update=update)

    def universal(self, eps: float, *, restarts: int | None = None) -> StochasticPGD:
        """The universal attack at one eps."""
        return StochasticPGD(
            eps=eps,
            norm=self.norm,
            steps=self.universal_steps,
            restarts=restarts or self.universal_restarts,
            batch_size=self.universal_batch,
            probe_starts=self.universal_probe_starts,
            truncate_margin=0.4,
        )

    def universal_nes(self, eps: float) -> UniversalNES | None:
        """The universal attack without gradients at one eps; None if it is left out."""
        return UniversalNES(eps=eps, norm=self.norm, queries=self.universal_queries) if self.universal_queries else None

    def inside(self, eps: float) -> StochasticPGD | None:
        """The universal attack that goes on inside the ball; None in other norms than inf.

        It keeps off the corners, at which the steps of :meth:`universal` end and which a model may single out: from
        what that made, and from zero, for a twentieth of its steps each, one more tenth of a restart (ours).
        """
        if self.norm != "inf":
            return None
        update = {"steps": max(1, self.universal_steps // 20), "probe_starts": 0, "shrink": 0.06}
        return self.universal(eps, restarts=1).model_copy(update=update)

    def class_wise_attack(self, eps: float) -> ClasswiseStochasticPGD:
        """The attack that crafts one perturbation for each class, on its default batch, at one eps."""
        return ClasswiseStochasticPGD(
            eps=eps,
            norm=self.norm,
            steps=self.universal_steps,
            restarts=min(2, self.universal_restarts),
            truncate_margin=0.4,
        )

    def pgd(self, eps: float, *, of_maps: bool = False) -> PGD:
        """The per-image attack at one eps.

        Of label maps it climbs the cross-entropy of the pixels that are still right (``mce``), since the others' share
        of a step is lost, in long steps that become short ones, twice as many up to 40; the point of the fewest right
        pixels counts. The schedule is ours: see ``docs/segmentation.md`` for what others leave.
        """
        if not of_maps:
            return PGD(eps=eps, norm=self.norm, steps=self.pgd_steps, restarts=self.pgd_restarts)
        ball = {"eps": eps, "norm": self.norm, "restarts": self.pgd_restarts}
        return PGD(loss="mce", keep="best", steps=self._longer, **ball, **_FALLING)

    def cospgd(self, eps: float) -> CosPGD:
        """The second per-image attack on label maps, in as many steps as :attr:`pgd_steps`, which become shorter."""
        return CosPGD(eps=eps, norm=self.norm, steps=self.pgd_steps, restarts=self.pgd_restarts, **_FALLING)

    @property
    def _longer(self) -> int:
        return max(self.pgd_steps, min(40, 2 * self.pgd_steps))

    def targeted_auto_pgd(self, eps: float, *, random: bool = False) -> TargetedAutoPGD:
        """The targeted Auto-PGD that goes on from what PGD left.

        It takes as many steps as PGD, or twice as many up to 40; it is probed for a quarter of them towards the nine
        likeliest wrong classes and run in full towards the nearest, on the margin, which two classes have as well
        (ours; ``benchmarks/strength.py`` holds it against AutoAttack).

        Args:
            eps: radius in pixel units.
            random: whether it goes through the draws of a random model: in as many steps as PGD, with half as many
                draws per gradient as checks take, since votes choose among what all attacks found (ours).
        """
        steps = self.pgd_steps if random else self._longer
        return TargetedAutoPGD(
            eps=eps,
            norm=self.norm,
            loss="margin",
            steps=steps,
            targets=9,
            probe_steps=max(1, steps // 4),
            targets_kept=1,
            eot_samples=max(1, self.eot_samples // 2) if random else None,
        )

    def white_box(self, eps: float) -> dict[str, PGD | TargetedAutoPGD]:
        """The strongest attack with gradients that every image gets, in turn: a short PGD, and targeted Auto-PGD."""
        short = PGD(eps=eps, norm=self.norm, steps=max(1, self.pgd_steps // 4))
        return {"pgd": short, "auto-pgd-targeted": self.targeted_auto_pgd(eps)}


_FALLING = {"rel_step_size": 0.5, "final_step": 0.01}
"""Size of the first and of the last step on label maps, as shares of eps."""
_OF_IMAGES = (
    "test_images",
    "validation_images",
    "sample",
    "suite_images",
    "pattern_images",
    "surrogate_images",
    "transfer_images",
    "edit_images",
    "universal_batch",
    "universal_queries",
)
_GLANCE = (
    "better than majority class",
    "perturbation budget used",
    "crafted beats controls",
    "deterministic or majority vote",
    "input unchanged",
    "UER monotone in eps",
    "no EOT gap",
    "no noise-off gap",
    "no vanishing gradients",
    "gradient matches finite differences",
    "independent of the batch",
    "stateless",
    "re-scoring reproducible",
    "unbounded attack succeeds",
)
"""What looks at numbers that are there anyway, or at random models; and the six cheapest checks that ask the model."""
SUITES = {
    "glance": Suite(
        universal_steps=25,
        universal_restarts=1,
        universal_batch=32,
        universal_probe_starts=0,
        pgd_steps=10,
        pgd_restarts=1,
        test_images=200,
        validation_images=100,
        sample=30,
        suite_images=0,
        eps_uni_runs=0,
        eps_adv=False,
        targeted=False,
        jacobian_backwards=0,
        queries=0,
        universal_queries=0,
        surrogate="none",
        noise_sizes=(),
        edits=(),
        checks=_GLANCE,
        auto_pgd=False,
        rescoring=False,
        eps_points=1,
        minutes=10.0,
    ),
    "quick": Suite(
        universal_steps=100,
        universal_restarts=1,
        universal_batch=32,
        universal_probe_starts=3,
        pgd_steps=20,
        pgd_restarts=1,
        test_images=500,
        validation_images=500,
        sample=100,
        suite_images=0,
        eps_uni_tolerance=0.05,
        eps_uni_runs=1,
        jacobian_backwards=1500,
        queries=200,
        patterns=40,
        pattern_images=100,
        surrogate_epochs=6,
        surrogate_images=8000,
        transfer_images=500,
        noise_sizes=(1.0, 3.0),
        edits=("jpeg:75", "resize:0.5", "shift:1"),
        edit_images=300,
    ),
    "standard": Suite(),
    "full": Suite(
        universal_steps=500,
        universal_restarts=8,
        universal_batch=128,
        universal_probe_starts=16,
        pgd_steps=100,
        pgd_restarts=5,
        suite_images=2000,
        jacobian_backwards=20_000,
        queries=5000,
        universal_queries=500_000,
        patterns=200,
        pattern_images=500,
        surrogate_epochs=20,
        surrogate_images=50_000,
        transfer_images=10_000,
        edit_images=5000,
        eps_uni_tolerance=0.01,
    ),
}
"""The built-in suites, from minutes to hours."""
