"""What an audit found, as data: the schema of ``result.json``, which reports read and nothing else computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from gambeson.auditing.slope_results import Slopes
from gambeson.base import Config, UserError, read_json, write_json
from gambeson.data import Dataset
from gambeson.evaluation import Rate
from gambeson.evaluation.cascade import Round
from gambeson.evaluation.results import Control, Cost, EpsAdv, EpsUni

SCHEMA: Final = "gambeson/audit-3"


class Subject(Config):
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


class Material(Config):
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
    def of(cls, data: Dataset) -> Material:
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


class Universal(Config):
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


class PerImage(Config):
    """Accuracy under an attack that makes one perturbation an image, or under a row of them."""

    attack: str
    """Its name, such as ``pgd``; ``standard`` for the row of :func:`gambeson.evaluation.standard_attacks`."""
    settings: dict[str, Any]
    """Every setting of the attack; of every attack of a row, by its name."""
    eps: float
    norm: str
    accuracy: Rate
    """Share of test images still right; of a row, under the worst of its attacks for each image."""
    rounds: list[Round] = Field(default_factory=list)
    """What each attack of a row broke; empty for a single attack."""
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


class Transferred(Config):
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


class Draws(Config):
    """A random model's accuracy over many draws."""

    draws: int
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

    schema_: Literal["gambeson/audit-3"] = SCHEMA
    subject: Subject
    material: Material
    seed: int
    settings: dict[str, Any]
    """Every setting of the suite."""
    clean: Rate
    """Accuracy on clean test images."""
    temperature: float = 1.0
    """What the logits that attacks climbed were divided by (see :mod:`gambeson.auditing.scale`)."""
    per_image: list[PerImage]
    universal: list[Universal]
    """In order of eps."""
    eps_uni: EpsUni
    eps_adv: EpsAdv | None = None
    """The same for attacks on each image by itself, on the sample; None for a black box or where it was left out."""
    transfer: list[Transferred] = Field(default_factory=list)
    surrogate: Surrogate | None = None
    corruption: list[Corruption] = Field(default_factory=list)
    draws: Draws | None = None
    """For a random model."""
    slopes: Slopes | None = None
    """Jacobian analysis; None for a black box."""
    checks: list[Check]
    notes: list[str] = Field(default_factory=list)
    """What was left out or made smaller, and why; what a black box does not show. Whole sentences."""
    verdict: Verdict
    cost: Cost
    environment: dict[str, str]
    """Versions and device, the same for every run on one machine."""

    @property
    def middle(self) -> Universal:
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
