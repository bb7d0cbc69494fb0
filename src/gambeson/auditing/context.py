"""The context of an audit: everything measured so far, stored stage by stage, and what further measurements need."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import TypeAdapter
from torch import nn

from gambeson.attacks import PGD, TargetedAutoPGD, UniversalPerturbation
from gambeson.auditing.outcome import EARLY, LEVEL, AsFarAsFinite, InTurn, PairedDifference
from gambeson.auditing.results import (
    AdaptiveResult,
    ModelInfo,
    PerImageResult,
    RandomnessResult,
    Steadiness,
    TransferredResult,
    UniversalResult,
    read_seconds,
)
from gambeson.auditing.suite import Suite
from gambeson.base import UserError, load_tensors, read_json, refuse_other, save_tensors, seeded, write_json, write_text
from gambeson.data import Dataset, Split
from gambeson.evaluation import BlackBox, BudgetSpent, Rate
from gambeson.evaluation.outcome import AttackT, ImageAttack, at_once, averaged, outcome
from gambeson.evaluation.rates import Cost
from gambeson.tasks import Counts
from gambeson.victim import Victim, vote
from gambeson.victim.temperature import temperature
from gambeson.victim.victim import copied

ResultT = TypeVar("ResultT")
Where = Literal["sample", "wider", "unseen", "test"]
"""Images that an attack is tried on: those of :class:`AuditContext` by this name."""

WIDER, WIDER_MAPS = 5, 2
"""Images of a second look, as a multiple of the sample's (ours): in the suite ``quick``, all that it reports on. Of
label maps, whose every image tells thousands of pixels, twice as many."""
MARGIN_STEPS = 5
"""Steps of PGD behind which the margins of test and validation images are compared (ours): their order is what counts.
"""


STAGES = "state/stages.json"
"""File of the results of stages, in the folder of an audit."""


class Checkpoints:
    """Results by name; with a folder they are persistent.

    Inside a stage, torch's global generators depend only on the seed and the stage's name, so that a random model draws
    the same numbers in a resumed run.
    """

    def __init__(self, folder: Path | None, seed: int = 0) -> None:
        self._folder, self._seed = folder, seed
        self._done = self._stored()
        self._seconds = {} if folder is None else read_seconds(folder)
        self.left_out: dict[str, BudgetSpent] = {}
        """Stages that did not fit a black box's budget, or the time, with the reason."""
        self.meter: Callable[[], Cost] = Cost
        """Reads what the model was asked so far, by this process."""
        self.asked = Cost()
        """What the stages of this process asked of it."""

    @property
    def cost(self) -> Cost:
        """What the model was asked by all finished stages, and around them."""
        return sum((Cost(**one) for one in self._done.get("costs", {}).values()), Cost())

    def charge(self, name: str, cost: Cost) -> None:
        """Count what was asked outside of stages: once, although every resumed audit asks it again."""
        self._done.setdefault("costs", {}).setdefault(name, cost.plain())

    def begin(self, **settings: Any) -> None:
        """Note what decides the results, which goes with the next of them.

        Raises:
            UserError: the folder holds results of other settings.
        """
        held = self._done.setdefault("begun", {})
        if self._folder is not None:
            refuse_other(self._folder, {key: held.get(key, value) for key, value in settings.items()}, settings)
        held |= settings

    def do(self, name: str, kind: Any, work: Callable[[], ResultT]) -> ResultT:
        """Return the stored result of this stage, or compute and store it.

        A result whose ``file`` is missing from the folder is computed again.

        Args:
            name: of the stage.
            kind: type of the result, for writing and reading.
            work: computes the result.
        """
        form: TypeAdapter[ResultT] = TypeAdapter(kind)
        if self.has(name):
            return form.validate_python(self._done[name])
        began, before = time.perf_counter(), self.meter()
        with seeded(self._seed, "stage", name):
            result = work()
        spent = self.meter() - before
        self.asked += spent
        self._done.setdefault("costs", {})[name] = spent.plain()
        self._seconds[name] = time.perf_counter() - began
        self.keep(name, form.dump_python(result, mode="json"))  # first, since by it the folder is known as this audit's
        if self._folder is not None:
            write_json(self._folder / "timing.json", self._seconds)
        return result

    def has(self, name: str) -> bool:
        """Whether the result of a stage is stored."""
        return name in self._done and self._whole(self._done[name])

    def keep(self, name: str, content: Any) -> None:
        """Store plain data, in place of what has this name."""
        self._done[name] = content
        if self._folder is not None:
            # Written after every stage, for the audit alone: without indents, C code writes it ten times as fast.
            write_text(self._folder / STAGES, json.dumps(self._done, allow_nan=False))

    def forget(self, name: str) -> None:
        """Compute a stage again, whatever is stored."""
        self._done.pop(name, None)
        self._done.get("costs", {}).pop(name, None)

    def kept(self, name: str) -> Any:
        """Return what :meth:`keep` stored; None if nothing."""
        return self._done.get(name)

    def afford(self, name: str, kind: Any, work: Callable[[], ResultT], instead: ResultT) -> ResultT:
        """Run a stage, or return ``instead`` if it does not fit a black box's budget, or the time."""
        try:
            return self.do(name, kind, work)
        except BudgetSpent as spent:
            self.left_out[name] = spent
            return instead

    def notes(self) -> list[str]:
        """Say in a sentence each what was left out."""
        return [f"{name} was left out: {why}." for name, why in self.left_out.items()]

    def _whole(self, stored: Any) -> bool:
        file = stored.get("file") if isinstance(stored, dict) else None
        return self._folder is None or not file or (self._folder / file).is_file()

    def _stored(self) -> dict[str, Any]:
        if self._folder is None or not (file := self._folder / STAGES).is_file():
            return {}
        found = read_json(file)
        if not isinstance(found, dict):
            raise UserError(f"{file} does not hold the results of stages: choose another --out")
        return found


class Outcomes:
    """What each test image answers when clean and under each attack, from which the reported rates were computed.

    Two audits on the same images are compared by it, image by image (:func:`gambeson.auditing.compare`).

    Args:
        folder: of the audit; its ``outcomes.safetensors`` is read if there is one, and written with every addition.

    Raises:
        UserError: the file is cut short or holds something else.
    """

    FILE = "outcomes.safetensors"

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else folder / self.FILE
        self._tensors: dict[str, torch.Tensor] = {}
        self.test = ""
        """Fingerprint of the test split: of its images, their labels and their order."""
        if self._file is not None and self._file.is_file():
            self._tensors, about = load_tensors(self._file, "the outcomes of an audit")
            self.test = str(about.get("test", ""))
            for name in [name.removesuffix(" right") for name in self._tensors if name.endswith(" right")]:
                self._check(name)

    def keep(self, name: str, counts: Counts, test: Split, rows: torch.Tensor | None = None) -> None:
        """Add the outcomes of one attack.

        Args:
            name: as gates have it: ``clean``, ``uer@0.1`` or ``per_image:pgd``.
            counts: right answers of each image.
            test: the split that is reported on.
            rows: (M,) the images of ``test`` that were attacked; None: all.
        """
        rows = torch.arange(len(test)) if rows is None else rows
        found = {"right": counts.right, "total": counts.total, "rows": rows}
        self._tensors |= {f"{name} {part}": tensor.to("cpu", torch.int32) for part, tensor in found.items()}
        self.test = test.fingerprint
        if self._file is not None:
            save_tensors(self._file, self._tensors, {"test": self.test})

    def of(self, name: str) -> tuple[torch.Tensor, Counts] | None:
        """Return the rows of the attacked images and what they answered; None if that was not kept."""
        if f"{name} right" not in self._tensors:
            return None
        right, total, rows = (self._tensors[f"{name} {part}"].long() for part in ("right", "total", "rows"))
        return rows, Counts(right, total)

    def _check(self, name: str) -> None:
        parts = [self._tensors.get(f"{name} {part}") for part in ("right", "total", "rows")]
        sound = [part for part in parts if part is not None and part.dtype == torch.int32 and part.ndim == 1]
        if len(sound) < 3 or len({len(part) for part in sound}) > 1 or bool((sound[0] > sound[1]).any()):
            raise UserError(
                f"{self._file} does not hold the outcomes of {name!r} as an audit writes them: copy it again, or "
                "delete it, and numbers are compared without it"
            )


@dataclass
class AuditContext:
    """The state of a running audit, which stages add to and diagnostics read."""

    victim: Victim
    """The model, entered and inspected."""
    data: Dataset
    """The data, whose test split is reported on."""
    suite: Suite
    seed: int
    subject: ModelInfo
    clean: Rate
    """Accuracy on clean test images."""
    predictions: torch.Tensor
    """Predictions on the clean test images, (N,) or (N, H, W)."""
    uaps: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """The selected perturbations by eps."""
    crafted: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """The crafted perturbation of an eps at which another one was selected."""
    counts: dict[float, Counts] = field(default_factory=dict)
    """Answers to each test image under the perturbations, by eps."""
    universal: list[UniversalResult] = field(default_factory=list)
    per_image: list[PerImageResult] = field(default_factory=list)
    steadiness: Steadiness | None = None
    """Whether gradients depend on the batch; None for a black box."""
    gradients: torch.Tensor | None = None
    """Gradients of a few images at the audit's beginning; None of a random model."""
    transfer: list[TransferredResult] = field(default_factory=list)
    randomness: RandomnessResult | None = None
    adaptive: AdaptiveResult | None = None
    """How the gradient agrees with differences; None for a black box."""
    surrogate: nn.Module | None = None
    """The surrogate, for transfer; None if there is none."""
    borrowed: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """Perturbations crafted on the surrogate by eps."""
    queried: UniversalPerturbation | None = None
    """The perturbation of the middle eps that was found by queries alone; None if there is none."""
    targeted: dict[str, UniversalPerturbation] = field(default_factory=dict)
    """Perturbations with a target, by its kind; of label maps."""
    untouched: nn.Module | None = None
    """A copy of the model that nobody has asked yet; None for a black box, and for what cannot be copied."""
    outcomes: Outcomes = field(default_factory=Outcomes)
    """What each test image answers under the attacks that rates are reported of."""
    _outcomes: dict[tuple[str, str, float | None], Counts] = field(default_factory=dict)

    @property
    def test(self) -> Split:
        """The split that numbers are reported on."""
        return self.data.test

    @property
    def eps(self) -> float:
        """The middle eps, used by per-image attacks, pictures and the verdict."""
        return self.suite.eps[len(self.suite.eps) // 2]

    @property
    def middle(self) -> UniversalResult:
        """The perturbation of the middle eps."""
        return self.universal[len(self.universal) // 2]

    def crafted_at(self, eps: float) -> UniversalPerturbation:
        """The perturbation crafted on the model itself, even if another one was selected."""
        return self.crafted.get(eps, self.uaps[eps])

    @cached_property
    def sample(self) -> Split:
        """The sample of test images for diagnostics."""
        return self.few(self.suite.sample)

    @cached_property
    def wider(self) -> Split:
        """The test images that a comparison is repeated on where the sample suggests a difference: :data:`WIDER`."""
        return self.few((WIDER if self.test.task.per_image_label else WIDER_MAPS) * self.suite.sample)

    @property
    def pgd(self) -> PGD:
        """The PGD that every image gets at the middle eps."""
        return self.pgd_at(self.eps)

    def pgd_at(self, eps: float) -> PGD:
        """The same at another eps; :meth:`Suite.pgd`."""
        return self.suite.pgd(eps, of_maps=not self.test.task.per_image_label)

    @cached_property
    def white_box(self) -> ImageAttack:
        """The strongest attack with gradients that every image gets; of random models and of label maps, PGD."""
        return InTurn(*self.white_parts.values()) if self.white_parts else self.pgd

    @property
    def strongest(self) -> str:
        """The name of :attr:`white_box`, for sentences."""
        return "targeted Auto-PGD" if self.white_parts else "PGD"

    @cached_property
    def white_parts(self) -> dict[str, PGD | TargetedAutoPGD]:
        """The attacks of :attr:`white_box` in turn; none where it is PGD alone."""
        return self.suite.white_box(self.eps) if self.targets_classes and not self.subject.random else {}

    @property
    def targets_classes(self) -> bool:
        """Whether every image gets targeted Auto-PGD, of random models through their draws."""
        possible = self.suite.norm != "1" and not self.subject.black_box and self.test.task.per_image_label
        return possible and self.suite.auto_pgd

    @cached_property
    def unseen(self) -> Split:
        """A validation sample of the same size."""
        return self.few(self.suite.sample, self.data.validation)

    @cached_property
    def surrogate_temperature(self) -> float:
        """Divisor of the surrogate's logits in attacks; 1 without a surrogate."""
        if self.surrogate is None:
            return 1.0
        with Victim(self.surrogate) as source:
            return temperature(source, self.data.validation, self.seed)

    def few(self, count: int, split: Split | None = None) -> Split:
        """Return a stratified sample of test, or of another split, drawn from the audit's seed."""
        return (self.test if split is None else split).sample(count, seed=self.seed)

    def accuracy(self, attack: ImageAttack) -> Rate:
        """Accuracy of the sample under an attack, cached."""
        return self.outcome(attack).accuracy

    def outcome(self, attack: ImageAttack, on: Where = "sample") -> Counts:
        """Outcome of a per-image attack on the sample, or on other images, cached.

        On a random model, gradient attacks without ``eot_samples`` use the suite's.
        """
        attack, split = self.averaged(attack), getattr(self, on)
        key = (repr(attack), "test" if split is self.test else on, self.victim.temperature)
        kept = self.outcomes.of("per_image:pgd")
        if kept is not None and attack == self.averaged(self.pgd):
            if split is self.test:
                return kept[1]
            if on in ("sample", "wider") and not split.task.per_image_label:  # whose every pixel was attacked already
                rows = self.test.sample_indices(len(split), seed=self.seed)
                return Counts(kept[1].right[rows], kept[1].total[rows])
        if key not in self._outcomes:
            self._outcomes[key] = outcome(self.victim, split, AsFarAsFinite(attack), self.seed)
        return self._outcomes[key]

    def compare(self, weaker: ImageAttack, stronger: ImageAttack, limit: float = 0.0) -> PairedDifference:
        """Compare two attacks, clearly or on more images: by how much ``stronger`` breaks more than ``weaker``.

        The first look is at the sample. If the difference exceeds the limit there, though not clearly, the comparison
        is decided by a second look, at :attr:`wider`. The looks share the level of one comparison.

        Args:
            weaker: an attack that should break as much.
            stronger: another one.
            limit: share of images that counts as no difference.
        """
        return self.compare_counts(lambda on: (self.outcome(weaker, on), self.outcome(stronger, on)), limit)

    def compare_counts(self, counts: Callable[[Where], tuple[Counts, Counts]], limit: float = 0.0) -> PairedDifference:
        """Compare the outcomes that ``counts`` returns for the sample, and if need be for more; see :meth:`compare`.

        On a random model, whose gradients cost many samples, the sample decides alone.
        """
        looks = (len(self.sample), len(self.wider))
        if looks[0] == looks[1] or self.subject.random:
            return PairedDifference.of(*counts("sample"))
        first = PairedDifference.of(*counts("sample"), level=EARLY * LEVEL)
        if first.low > limit or first.value <= limit:
            return first.over(looks)
        return PairedDifference.of(*counts("wider"), level=(1 - EARLY) * LEVEL).over(looks)

    def beyond_white_box(self, others: Sequence[ImageAttack], on: Where = "sample") -> tuple[Counts, Counts, list[int]]:
        """Attack what the strongest attack with gradients leaves right of a model that is not random.

        Returns:
            What it leaves right, what the others leave of that, and how many each of them breaks.
        """
        white, split, victim = self.outcome(self.white_box, on), getattr(self, on), self.victim
        both, broken = white.right.clone(), [0] * len(others)
        for rows in filter(len, white.right.nonzero().flatten().split(at_once(split))):
            images, labels = split.take(rows, victim.device)
            for k, attack in enumerate(others):
                moved = attack(victim, images, labels, seed=self.seed, task=split.task)
                right = split.task.counts(vote(victim, moved), labels).right.cpu()
                broken[k] += len(rows) - int(right.sum())
                both[rows] = both[rows].minimum(right)
        return white, Counts(both, white.total), broken

    def averaged(self, attack: AttackT) -> AttackT:
        """Return an attack with the suite's ``eot_samples`` if the model is random."""
        images, _ = self.test.take(slice(0, 8), self.victim.device)
        return averaged(attack, self.victim, images, self.suite.eot_samples)

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Let attacks use the original logits inside the block, as in training."""
        kept, self.victim.temperature = self.victim.temperature, 1.0
        try:
            yield
        finally:
            self.victim.temperature = kept

    @property
    def spent(self) -> Cost:
        """Forwards and backwards so far."""
        return Cost(forwards=self.victim.forwards, backwards=self.victim.backwards)

    def since(self, before: Cost) -> Cost:
        """Cost since :attr:`spent` was ``before``."""
        return self.spent - before


def untouched_copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model that nobody has asked yet; None for a black box, and for what cannot be copied."""
    if isinstance(model, BlackBox):
        return None
    try:
        return copied(model)
    except Exception:  # the model's own way of being copied, or no memory for it
        return None
