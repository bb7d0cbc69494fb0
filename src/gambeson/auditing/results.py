"""The results of an audit, as stored in ``result.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field

from gambeson.analysis.certified import CertifiedAccuracy
from gambeson.auditing import display
from gambeson.auditing.gates import GateReport, judge_gates, parse_gates
from gambeson.auditing.jacobian_results import JacobianResult
from gambeson.base import Config, Label, UserError, notebook, read_json, read_settings, write_json
from gambeson.base.errors import some
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate
from gambeson.evaluation.attack_suite import AttackRound
from gambeson.evaluation.classes import ClassView
from gambeson.evaluation.edits import EditsResult
from gambeson.evaluation.rates import Control, Cost, EpsAdv, EpsUni
from gambeson.evaluation.segmentation_suite import MapResult
from gambeson.evaluation.targeted import TargetSuccess
from gambeson.tasks import Confusion

SCHEMA: Final = "gambeson/audit-4"


class ModelInfo(Config):
    """The audited model."""

    label: Label
    """Its name in tables, such as ``shared-adversarial``."""
    name: str
    """Its architecture, such as ``lenet``."""
    parameters: int
    """Number of parameters; 0 for a black box."""
    fingerprint: str
    """Hash of its weights; for a black box, of its outputs."""
    black_box: bool = False
    """Whether it returns scores without gradients."""
    random: bool = False
    """Whether two calls with the same images differ by what decides answers, or in the gradient."""
    defense: dict[str, Any] | None = None
    """The defence it was trained with, with every setting; None if unknown."""
    epochs: int | None = None
    """Epochs of its training; None if unknown."""


class DataInfo(Config):
    """The data of an audit, and the use of each split."""

    name: str
    classes: list[str]
    shape: list[int]
    """C, H, W of an image."""
    train: int
    """Number of images for crafting."""
    validation: int
    """Number of images for selection."""
    test: int
    """Number of images for the reported numbers."""
    unit: str = "image"
    """What has a label and is right or wrong, which rates are shares of: ``image``, or ``pixel`` of label maps."""

    @classmethod
    def of(cls, data: Dataset) -> DataInfo:
        """Describe a data set whose test split is reported on."""
        return cls(
            name=data.name,
            classes=list(data.classes),
            shape=list(data.test.shape),
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
            unit=data.test.task.unit,
        )


class IoU(Config):
    """Intersection over union on label maps, from one confusion matrix of all test images."""

    mean: Rate
    """The mean over the classes that occur among the labels."""
    classes: dict[str, Rate]
    """Of each of these classes, by its name."""

    @classmethod
    def of(cls, predictions: torch.Tensor, split: Split) -> IoU | None:
        """Measure it, from predictions (N, H, W) on the CPU; None where labels are no maps."""
        if split.task.per_image_label:
            return None
        found = Confusion(split.task.confusion(predictions, split.labels.cpu(), len(split.classes)), split.classes)
        return cls(mean=found.mean_iou, classes=found.iou)


class Rescored(Config):
    """What is right of stored images asked for once more in another way (:mod:`gambeson.auditing.rescoring`)."""

    way: str
    """Such as ``one by one``."""
    images: int
    """Images asked for."""
    reported: float
    """Share right of these as reported."""
    right: float
    """Share right now."""
    flipped: int
    """Images of which more or less is right now."""
    differs: bool
    """Whether that is a clear difference."""


class Steadiness(Config):
    """Whether the gradient of the same images is the same in every batch (:mod:`gambeson.auditing.rescoring`)."""

    passed: bool
    images: int
    """Images whose gradients were compared."""
    most: int | None = None
    """Where larger batches have another gradient, the largest tried that has that of single images, which attacks then
    keep to; None: no limit."""
    detail: str
    numbers: dict[str, float] = Field(default_factory=dict)


class Restart(Config):
    """One start of a universal attack, with its rate on validation."""

    start: str
    validation_uer: float


class UniversalResult(Config):
    """The universal perturbation of one eps, its rates on the test split, and the controls at the same eps.

    It is the one that does most harm on validation: the crafted one, a control, or the one crafted on the surrogate.
    Since no test image took part in the selection, its rates have plain intervals; but where the crafted one is clearly
    stronger on test than what validation chose, it is taken, and ``uer`` has the interval of the higher of two.
    """

    attack: str = "stochastic-pgd"
    """Name of the attack that crafted it, or of the control."""
    eps: float
    norm: str
    uer: Rate
    """Universal evasion rate: the error on test images."""
    fooling: Rate
    """Fooling rate: the share of predictions that change."""
    iou: IoU | None = None
    """Under the perturbation; None where labels are no maps."""
    crafted: Rate | None = None
    """UER of the perturbation crafted on the model itself, if another one was selected; else None."""
    controls: list[Control]
    restarts: list[Restart]
    rescored: list[Rescored] = Field(default_factory=list)
    """At the middle eps: the same images answered again in other ways. A rate that is clearly worse in one of them is
    the one that counts, at every eps."""
    file: str
    """The perturbation's file, relative to the result."""
    status: Literal["done", "weak", "zero", "target not reached"]
    """``weak``: the perturbation stayed below 5 % of eps; ``zero``: it is zero; ``target not
    reached``: the attack's own stopping rule was not met."""
    cost: Cost


class PerImageResult(Config):
    """Accuracy under a per-image attack or an attack suite."""

    attack: str
    """Its name, such as ``pgd``; ``standard`` for the suite of :func:`gambeson.evaluation.standard_suite`."""
    settings: dict[str, Any]
    """Every setting of the attack; of every attack of a suite, by its name."""
    eps: float
    norm: str
    accuracy: Rate
    """Accuracy; of a suite, under the worst of its attacks per image."""
    rounds: list[AttackRound] = Field(default_factory=list)
    """Results of the attacks of a suite; empty for a single attack."""
    maps: MapResult | None = None
    """Of a suite on label maps: the mean IoU under its attacks."""
    rescored: list[Rescored] = Field(default_factory=list)
    """The perturbed images answered again in other ways; what is clearly worse in one of them counts."""
    cost: Cost


class TargetedResult(Config):
    """One perturbation for all label maps that aims at a target, crafted at the middle eps."""

    target: str
    """As :class:`gambeson.attacks.Target` has it: ``static:IMAGE`` of validation, or ``hide:CLASS``."""
    eps: float
    norm: str
    reached: TargetSuccess
    """What of its target it reaches on test, beside clean images and controls."""
    file: str
    """The perturbation's file, relative to the result."""
    cost: Cost


class Surrogate(Config):
    """The surrogate for transfer."""

    name: str
    """Its architecture, or the name in the suite; empty without one."""
    accuracy: Rate | None = None
    """Its accuracy on clean test images; a poor surrogate tells little."""
    images: int = 0
    """Number of training images; 0 if it was already trained."""
    epochs: int = 0
    file: str = ""
    """File of its weights, relative to the result; empty if it was already trained."""
    left_out: str = ""
    """Why there is none."""


class TransferredResult(Config):
    """Error under perturbations crafted on another model."""

    source: str
    """Source model, such as ``surrogate (lenet5)``."""
    attack: str
    """Name of the attack."""
    universal: bool
    """Whether it is a universal perturbation, or one per image."""
    eps: float
    norm: str
    error: Rate
    cost: Cost


class AdaptiveResult(Config):
    """How well the gradient agrees with differences along random directions, and what attacks without it reached."""

    images: int
    """Images of the sample that it was decided on."""
    median: float
    """Median cosine of the gradient's promises and the differences."""
    below: int
    """Images on which it is below :data:`gambeson.auditing.stages.adaptive.AGREES`."""
    false: int
    """Images on which it is below ``WRONG`` there, though differences over several steps agree with each other."""
    inner: int
    """Backward passes inside one forward of the model."""
    attacked: PerImageResult | None = None
    """Worst case of the white-box attacks and the adaptive ones, where the gradient was suspect."""
    gain: float | None = None
    """Lower limit of the share of images that the adaptive ones broke beyond the others; with inner gradients, that
    PGD without them broke beyond PGD."""
    universal: TransferredResult | None = None
    """Error under one perturbation that was crafted without the model's own gradient."""


class CertifiedResult(Config):
    """Lower bounds on the accuracy at one eps, and what the perturbation of that eps leaves of the same images."""

    bounds: CertifiedAccuracy
    attacked: Rate
    """Accuracy under the perturbation: what no bound can exceed."""


class Corruption(Config):
    """Error under corruption noise, drawn per image."""

    noise: str
    """``gaussian``, ``uniform`` or ``salt-and-pepper``."""
    size: float
    """Standard deviation, half-width, or share of pixels; in pixel units."""
    error: Rate


class RandomnessResult(Config):
    """Accuracy of a random model over several passes."""

    votes: int
    """Number of passes over the test images."""
    mean: float
    """Mean accuracy over the passes."""
    spread: float
    """Standard deviation of the accuracy between passes."""
    lowest: float
    highest: float
    majority: Rate
    """Accuracy of the majority vote."""
    noise_off: Rate | None
    """Accuracy with the randomness turned off; None if that is impossible from outside."""
    noise_off_by: str
    """How it was turned off, or why it was not."""


NOT_RUN = ("it was left out", "the budget was spent")
"""Details of checks that were not run."""


class Check(Config):
    """Result of one diagnostic."""

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
    """What to do about it."""
    numbers: dict[str, float] = Field(default_factory=dict)
    """What was measured, by name."""

    @property
    def outcome(self) -> Literal["passed", "failed", "does not apply", "not run"]:
        """Its outcome in words."""
        if self.passed is None:
            return "not run" if self.detail in NOT_RUN else "does not apply"
        return "passed" if self.passed else "failed"


class Verdict(Config):
    """The conclusion in words, and the reasons not to trust it."""

    trusted: bool
    """Whether every check was run and none has failed."""
    summary: str
    """One or two sentences with the number that supports them and its interval."""
    reasons: list[str]
    """Why the numbers are not to be trusted; empty if they are."""
    unchecked: list[str] = Field(default_factory=list)
    """Checks that did not run."""


class AuditResult(notebook.ShownAsTable, Config):
    """The contents of ``result.json``. Same seed, same machine, same bytes."""

    schema_: Literal["gambeson/audit-4"] = SCHEMA
    subject: ModelInfo
    material: DataInfo
    seed: int
    settings: dict[str, Any]
    """Every setting of the suite; with a limit on the time, those that were chosen. They can be run again."""
    minutes: float | None = None
    """The time that the settings were chosen for; None: no limit."""
    clean: Rate
    """Accuracy on clean test images."""
    iou: IoU | None = None
    """On clean test images; None where labels are no maps."""
    temperature: float = 1.0
    """Divisor of the logits in attacks (see :mod:`gambeson.victim.temperature`)."""
    per_image: list[PerImageResult]
    universal: list[UniversalResult]
    """In order of eps."""
    eps_uni: EpsUni
    eps_adv: EpsAdv | None = None
    """The same for per-image attacks, on the sample; None for a black box or if omitted."""
    targeted: list[TargetedResult] = Field(default_factory=list)
    """Of label maps: a scene that all images are to be taken for, and a class that is to be hidden."""
    transfer: list[TransferredResult] = Field(default_factory=list)
    surrogate: Surrogate | None = None
    corruption: list[Corruption] = Field(default_factory=list)
    certified: list[CertifiedResult] = Field(default_factory=list)
    """In order of eps; empty where the suite did not ask for bounds."""
    randomness: RandomnessResult | None = None
    """For a random model."""
    edits: EditsResult | None = None
    """The perturbation of the middle eps after edits of the images; None in results without them."""
    classes: ClassView | None = None
    """What that perturbation does to each class; None of label maps."""
    jacobian: JacobianResult | None = None
    """Jacobian analysis; None for a black box."""
    checks: list[Check]
    notes: list[str] = Field(default_factory=list)
    """What was omitted or reduced, and why; limits of a black box. Whole sentences."""
    verdict: Verdict
    cost: Cost
    """Of the whole audit, its checks included: images that the audited model was sent, wherever they were made."""
    environment: dict[str, str]
    """Versions and device, the same for every run on one machine."""

    @property
    def middle(self) -> UniversalResult:
        """The perturbation at the middle eps."""
        return self.universal[len(self.universal) // 2]

    def _lines(self) -> tuple[str, dict[str, str]]:
        return display.main_lines(self)

    def plot(self) -> Any:
        """Return a ``plotly`` figure of the UER against eps, with the strongest control and 95 % intervals."""
        return display.plot_audits([self])

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per rate: what was measured, attack, eps, norm and interval."""
        return notebook.frame(display.rates(self))

    def gate(self, text: str | Sequence[str]) -> GateReport:
        """Judge gates such as ``uer<=0.2, clean>=0.9, trusted``; see :func:`gambeson.auditing.gates.parse_gates`."""
        return judge_gates(parse_gates(text), self)

    def save(self, folder: Path) -> None:
        """Write ``result.json``."""
        write_json(folder / "result.json", self.plain())

    @classmethod
    def load(cls, folder: str | Path) -> AuditResult:
        """Read ``result.json`` from the folder of a finished audit.

        Raises:
            UserError: the file is missing, damaged, or of another kind or version.
        """
        folder = Path(folder)
        if (folder / "run.yaml").is_file():
            read_settings(folder / "run.yaml", "audit")  # a run of another kind is refused
            if not (folder / "result.json").is_file():
                raise UserError(
                    f"the audit in {folder} has no result yet: `gambeson audit --config {folder}/run.yaml --out "
                    f"{folder}` finishes it from where it stopped"
                )
        content = read_json(folder / "result.json")
        form = content.get("schema_", "another kind") if isinstance(content, dict) else "another kind"
        if form != SCHEMA:
            raise UserError(f"{folder / 'result.json'} is of {form}, expected {SCHEMA}: run the audit again")
        try:
            result = cls(**content)
        except UserError as error:
            raise UserError(f"{folder / 'result.json'} is damaged ({error}): run the audit again") from None
        if not result.universal:
            raise UserError(f"{folder} holds no universal perturbation: expected at least one eps; run the audit again")
        if lost := [name for name in _OF_ATTACKS if type(result.settings.get(name)) is not int]:
            raise UserError(f"{folder / 'result.json'} does not hold the settings {some(lost)}: run the audit again")
        return result


_OF_ATTACKS = ("universal_steps", "universal_restarts", "pgd_steps", "pgd_restarts")
"""Settings that are told wherever numbers of an audit are."""


def read_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds that each stage of an audit took; empty where none was timed.

    Raises:
        UserError: its ``timing.json`` is damaged.
    """
    file = folder / "timing.json"
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict) or not all(type(value) in (int, float) for value in found.values()):
        raise UserError(f"{file} does not hold the seconds of each stage: delete it, and times are left out")
    return found
