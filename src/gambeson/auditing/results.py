"""What an audit's Jacobian analysis found, as data: part of ``result.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field

from gambeson.analysis import (
    BoundTable,
    GradientSharing,
    GradientStatistics,
    JacobianNorms,
    PairMetric,
    PairSharing,
    Spread,
)
from gambeson.base import Config, UserError, read_json, write_json
from gambeson.data import Dataset
from gambeson.evaluation import Rate
from gambeson.evaluation.attack_suite import AttackRound
from gambeson.evaluation.rates import Control, Cost, EpsAdv, EpsUni

RANGES: dict[PairMetric, tuple[float, float]] = {"cos_F": (-1, 1), "ratio_s": (0.5, 1), "rank1": (0, 1), "cka": (0, 1)}
"""What values each pair metric can have; the bounds of its histogram, so that models can be compared."""
_BINS = 40


class Bounds(Config):
    """What the linearised model allows one perturbation to do, against what the crafted ones did."""

    eps: list[float]
    """One for every row of the table."""
    table: BoundTable


class PairHistogram(Config):
    """How alike the Jacobians of two images are, for pairs within a class and between two."""

    metric: PairMetric
    """``cos_F`` is the primary one; see :func:`gambeson.analysis.pair_metrics`."""
    within: Spread | None
    between: Spread | None
    edges: list[float]
    """Bounds of the bins, over the metric's own range."""
    within_counts: list[int]
    """Pairs of one class in every bin."""
    between_counts: list[int]
    """Pairs of two classes in every bin."""

    @classmethod
    def of(cls, found: PairSharing, metric: PairMetric) -> PairHistogram:
        """Count one metric's values in bins; pairs with a Jacobian of zero have none."""
        low, high = RANGES[metric]
        value = found.values[metric].double()

        def counts(same: bool) -> list[int]:
            chosen = value[(found.same_class == same) & value.isfinite()]
            return [int(n) for n in torch.histc(chosen.clamp(low, high), _BINS, low, high)]  # rounding may step outside

        return cls(
            metric=metric,
            within=found.spread(metric, True),
            between=found.spread(metric, False),
            edges=[low + (high - low) * k / _BINS for k in range(_BINS + 1)],
            within_counts=counts(True),
            between_counts=counts(False),
        )


class LossSurface(Config):
    """Cross-entropy on x + e1 g + e2 g_perp, g the sign of the gradient and g_perp random signs orthogonal to it."""

    images: int
    """A subset of the sample."""
    steps: list[float]
    """Values of e1 and of e2, in pixel units."""
    loss: list[list[float]]
    """Mean over the images, [e1][e2]."""
    wrong: list[list[float]]
    """Share of images that the model gets wrong, [e1][e2]."""
    singles: list[list[list[float]]]
    """The same loss for the first of them alone, [image][e1][e2]."""
    ridge: Spread
    """How much of the loss's rise along g at its highest is lost again at the far end; 0 where it only rises."""


class Subspace(Config):
    """How many orthogonal directions break the model at an image (GAAS; Tramer et al. 2017, and 2018 section 4.2)."""

    norm: str
    eps: float
    """Length of every direction; in the norm that the audit does not use, that of its usual grid at the same place."""
    orders: list[int]
    """The k directions that were tried at once."""
    shares: list[float]
    """Share of the eligible images of which at least k directions break the model, for every order."""
    eligible: int
    """Images that the model has right and that have a gradient."""
    dead: int
    """Images that it has right but whose gradient is zero."""
    dimension: Spread | None
    """Largest number of breaking directions of an image; None where no image is eligible."""
    cosine: list[float]
    """Largest |cosine| of two directions after the clip to [0, 1], by order; before it they are orthogonal."""


class JacobianResult(Config):
    """The Jacobian analysis, on a sample of test images. Parts that are None are explained in ``left_out``."""

    images: int
    """Test images of the sample; parts that cost more look at some of them, and say at how many."""
    fixed_draw: bool = False
    """The model is random, and every forward here began from one seed."""
    norms: JacobianNorms | None = None
    """Exact Frobenius and spectral norms of single images' Jacobians."""
    frobenius: Spread | None = None
    """Estimated Frobenius norms, where exact ones cost too much."""
    gradients: GradientStatistics | None = None
    gradient_sharing: GradientSharing | None = None
    sharing: float | None = None
    """The sharing factor: 1 where all images share one worst direction, 1/n where theirs are orthogonal."""
    bounds: Bounds | None = None
    pairs: list[PairHistogram] = Field(default_factory=list)
    surface: LossSurface | None = None
    subspaces: list[Subspace] = Field(default_factory=list)
    left_out: dict[str, str] = Field(default_factory=dict)
    """Parts that were not measured, with the reason."""
    file: str = ""
    """File with the tensors: ``direction``, the best shared L2 direction of the linearised model, (C, H, W);
    ``surface`` and ``wrong``, each image's, (N, S, S); ``pairs`` with their metrics."""
    cost: Cost


SCHEMA: Final = "gambeson/audit-4"


class ModelInfo(Config):
    """The model that was audited."""

    label: str
    """What to call it in tables, such as ``shared-adversarial``."""
    name: str
    """Its architecture, such as ``lenet``."""
    parameters: int
    """Number of trainable values; 0 for a black box."""
    fingerprint: str
    """Hash of its weights; of its answers for a black box."""
    black_box: bool = False
    """Only scores could be had of it, no gradient."""
    random: bool = False
    """Two calls with the same images differ."""
    defense: dict[str, Any] | None = None
    """The defence it was trained with, with every setting; None when that is not known."""
    epochs: int | None = None
    """Epochs it was trained for; None when that is not known."""


class DataInfo(Config):
    """The data behind an audit: which split did what."""

    name: str
    classes: list[str]
    shape: list[int]
    """C, H, W of an image."""
    train: int
    """Images the perturbations were crafted on."""
    validation: int
    """Images that chose among restarts."""
    test: int
    """Images the numbers are reported on."""

    @classmethod
    def of(cls, data: Dataset) -> DataInfo:
        """Say what a data set's splits did, where its test split holds the images that are reported on."""
        return cls(
            name=data.name,
            classes=list(data.classes),
            shape=list(data.test.shape),
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
        )


class Restart(Config):
    """One start of a universal attack and how the validation split judged its outcome."""

    start: str
    validation_uer: float


class UniversalResult(Config):
    """The universal perturbation of one eps, its rates on the test split, and the controls at the same eps.

    It is the one that does most harm on validation: what was crafted or, where that does less, a control or what was
    crafted on the surrogate. Its rates have the plain intervals of a choice that no test image took part in.
    """

    attack: str = "stochastic-pgd"
    """Name of the attack that crafted it, or of the control."""
    eps: float
    norm: str
    uer: Rate
    """Universal evasion rate: share of test inputs that the model gets wrong."""
    fooling: Rate
    """Share of test inputs whose prediction changes."""
    crafted: Rate | None = None
    """UER of what was crafted on the model itself, where another perturbation took its place; None elsewhere."""
    controls: list[Control]
    restarts: list[Restart]
    file: str
    """The perturbation's file, relative to the result."""
    status: Literal["done", "weak", "zero", "target not reached"]
    """``weak``: the perturbation stayed below 5 % of eps; ``zero``: it is no perturbation at all; ``target not
    reached``: the attack's own stopping rule was not met."""
    cost: Cost


class PerImageResult(Config):
    """Accuracy under an attack that makes one perturbation per image, or under a suite of them."""

    attack: str
    """Its name, such as ``pgd``; ``standard`` for the suite of :func:`gambeson.evaluation.standard_suite`."""
    settings: dict[str, Any]
    """Every setting of the attack; of every attack of a suite, by its name."""
    eps: float
    norm: str
    accuracy: Rate
    """Share of test images still right; of a suite, under the worst of its attacks for each image."""
    rounds: list[AttackRound] = Field(default_factory=list)
    """What each attack of a suite broke; empty for a single attack."""
    cost: Cost


class Surrogate(Config):
    """The model that transferred perturbations were crafted on."""

    name: str
    """Its architecture, or what the suite named; empty where there was none."""
    accuracy: Rate | None = None
    """On the clean test images: a poor surrogate says little."""
    images: int = 0
    """Training images it was trained on here; 0 where it came trained."""
    epochs: int = 0
    file: str = ""
    """Its weights, relative to the result; empty where it came trained."""
    left_out: str = ""
    """Why there was none."""


class TransferredResult(Config):
    """Error under perturbations that were crafted on another model."""

    source: str
    """What they were crafted on, such as ``surrogate (lenet5)``."""
    attack: str
    """Name of the attack."""
    universal: bool
    """One perturbation for all images; else one for each."""
    eps: float
    norm: str
    error: Rate
    cost: Cost


class Corruption(Config):
    """Error under plain noise, drawn anew for every image: what chance does, without an adversary."""

    noise: str
    """``gaussian``, ``uniform`` or ``salt-and-pepper``."""
    size: float
    """Standard deviation, half-width, or share of pixels; in pixel units."""
    error: Rate


class RandomnessResult(Config):
    """A random model's accuracy over many draws."""

    votes: int
    """Passes over the same test images."""
    mean: float
    """Mean accuracy of a pass."""
    spread: float
    """Standard deviation of the accuracy between passes."""
    lowest: float
    highest: float
    majority: Rate
    """Accuracy of the majority of the passes, image by image."""
    noise_off: Rate | None
    """Accuracy with the randomness turned off; None where that cannot be done from outside."""
    noise_off_by: str
    """How it was turned off, or why it was not."""


class Check(Config):
    """One condition under which the numbers could not be trusted."""

    name: str
    passed: bool | None
    """None: the check does not apply to this model, for the reason in ``detail``."""
    detail: str
    """What was compared, with the numbers."""
    condition: str = ""
    """When the check fails."""
    explanation: str = ""
    """What a failure means."""
    remedy: str = ""
    """What to do then."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """What was measured, by name."""


class Verdict(Config):
    """The answer in plain words, and every reason it may not be trusted."""

    trusted: bool
    summary: str
    """One or two sentences with the number that supports them and its interval."""
    reasons: list[str]
    """Why the numbers are not to be trusted; empty when they are."""


class AuditResult(Config):
    """Everything that ``result.json`` holds. Same seed, same machine, same bytes."""

    schema_: Literal["gambeson/audit-4"] = SCHEMA
    subject: ModelInfo
    material: DataInfo
    seed: int
    settings: dict[str, Any]
    """Every setting of the suite."""
    clean: Rate
    """Accuracy on clean test images."""
    temperature: float = 1.0
    """What the logits that attacks climbed were divided by (see :mod:`gambeson.auditing.temperature`)."""
    per_image: list[PerImageResult]
    universal: list[UniversalResult]
    """In order of eps."""
    eps_uni: EpsUni
    eps_adv: EpsAdv | None = None
    """The same for attacks on each image by itself, on the sample; None for a black box or where it was left out."""
    transfer: list[TransferredResult] = Field(default_factory=list)
    surrogate: Surrogate | None = None
    corruption: list[Corruption] = Field(default_factory=list)
    randomness: RandomnessResult | None = None
    """For a random model."""
    jacobian: JacobianResult | None = None
    """Jacobian analysis; None for a black box."""
    checks: list[Check]
    notes: list[str] = Field(default_factory=list)
    """What was left out or made smaller, and why; what a black box does not show. Whole sentences."""
    verdict: Verdict
    cost: Cost
    environment: dict[str, str]
    """Versions and device, the same for every run on one machine."""

    @property
    def middle(self) -> UniversalResult:
        """The perturbation at the middle eps, the one that pictures and headlines use."""
        return self.universal[len(self.universal) // 2]

    def save(self, folder: Path) -> None:
        """Write ``result.json``."""
        write_json(folder / "result.json", self.plain())

    @classmethod
    def load(cls, folder: Path) -> AuditResult:
        """Read ``result.json`` from the folder of a finished audit.

        Raises:
            UserError: there is none, or it is of another kind or of an earlier form.
        """
        content = read_json(folder / "result.json")
        form = content.get("schema_", "another kind") if isinstance(content, dict) else "another kind"
        if form != SCHEMA:
            raise UserError(f"{folder / 'result.json'} is of {form}, expected {SCHEMA}: run the audit again")
        return cls(**content)
