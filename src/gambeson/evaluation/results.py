"""What an audit found, as data: the schema of ``result.json``, which reports read and nothing else computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gambeson.base import Config, read_json, write_json
from gambeson.evaluation.rates import Rate

SCHEMA = "gambeson/audit-1"


class Cost(Config):
    """Work that a number took, counted in images."""

    forwards: int = 0
    """Images sent forward through the model."""
    backwards: int = 0
    """Images whose gradient was taken."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(forwards=self.forwards + other.forwards, backwards=self.backwards + other.backwards)


class Subject(Config):
    """The model that was audited."""

    label: str
    """What to call it in tables, such as ``shared-adversarial``."""
    name: str
    """Its architecture, such as ``lenet``."""
    parameters: int
    """Number of trainable values."""
    fingerprint: str
    """Hash of its weights."""
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


class PerImage(Config):
    """Accuracy under an attack that makes one perturbation an image."""

    attack: str
    """Its name, such as ``pgd``."""
    settings: dict[str, Any]
    """Every setting of the attack."""
    eps: float
    norm: str
    accuracy: Rate
    cost: Cost


class Control(Config):
    """What noise of the same size does: the floor that a crafted perturbation has to beat."""

    name: str
    """``random-sign`` or ``chessboard``."""
    mean: float
    """Mean UER over the draws."""
    worst: Rate
    """UER of the worst draw."""
    draws: int


class Restart(Config):
    """One start of a universal attack and how the validation split judged its outcome."""

    start: str
    validation_uer: float


class Universal(Config):
    """One crafted universal perturbation, its rates on the test split, and the controls at the same eps."""

    eps: float
    norm: str
    uer: Rate
    """Universal evasion rate: share of test inputs that the model gets wrong."""
    fooling: Rate
    """Share of test inputs whose prediction changes."""
    controls: list[Control]
    restarts: list[Restart]
    file: str
    """The perturbation's file, relative to the result."""
    status: Literal["done", "weak", "zero", "target not reached"]
    """``weak``: the perturbation stayed below 5 % of eps; ``zero``: it is no perturbation at all; ``target not
    reached``: the attack's own stopping rule was not met."""
    cost: Cost


class EpsUni(Config):
    """eps_uni(delta): the smallest eps at which a universal perturbation was found with a UER of at least delta.

    An attack only ever gives an upper bound of the true value.
    """

    delta: float
    value: float
    """The smallest success, in pixel units; the largest eps tried where ``censored``."""
    censored: bool
    """No success up to ``value``: the truth is larger than it."""
    tolerance: float
    """Width of the last bracket."""
    tried: list[tuple[float, float]]
    """Every (eps, UER) of the search, in order of eps."""
    split: Literal["validation", "test"]
    """The split that judged success."""
    cost: Cost


class Check(Config):
    """One condition under which the numbers could not be trusted."""

    name: str
    passed: bool
    detail: str
    """What was compared, with the numbers, and what to do when it failed."""


class Verdict(Config):
    """The answer in plain words, and every reason it may not be trusted."""

    trusted: bool
    summary: str
    """One or two sentences with the number that supports them and its interval."""
    reasons: list[str]
    """Why the numbers are not to be trusted; empty when they are."""


class AuditResult(Config):
    """Everything that ``result.json`` holds. Same seed, same machine, same bytes."""

    schema_: str = SCHEMA
    subject: Subject
    material: Material
    seed: int
    settings: dict[str, Any]
    """Every setting of the suite."""
    clean: Rate
    """Accuracy on clean test images."""
    per_image: list[PerImage]
    universal: list[Universal]
    """In order of eps."""
    eps_uni: EpsUni
    checks: list[Check]
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
            UserError: there is none, or it is of another kind.
        """
        return cls(**read_json(folder / "result.json"))
