"""What an audit has measured so far, and the few things that every further measurement needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from gambeson.attacks import UniversalPerturbation
from gambeson.auditing.outcome import AsFarAsFinite
from gambeson.auditing.results import ModelInfo, PerImageResult, RandomnessResult, TransferredResult, UniversalResult
from gambeson.auditing.suite import Suite
from gambeson.auditing.temperature import temperature
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate
from gambeson.evaluation.bootstrap import ImageErrors
from gambeson.evaluation.outcome import AttackT, ImageAttack, averaged, outcome
from gambeson.evaluation.rates import Cost
from gambeson.tasks import Counts
from gambeson.victim import Victim


@dataclass
class AuditContext:
    """One audit under way. Checkpoints add to it, in order; diagnostics read it and may ask the victim for more."""

    victim: Victim
    """The model, inside its context, and met."""
    data: Dataset
    """Its test split holds the images that are reported on."""
    suite: Suite
    seed: int
    subject: ModelInfo
    clean: Rate
    """Accuracy on clean test images."""
    predictions: torch.Tensor
    """What the model says of the clean test images, (N,) or (N, H, W)."""
    uaps: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """The perturbations by eps, each what does most harm on validation."""
    crafted: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """The crafted perturbation of an eps where another one took its place."""
    errors: dict[float, ImageErrors] = field(default_factory=dict)
    """Errors of each test image under the perturbations, by eps."""
    universal: list[UniversalResult] = field(default_factory=list)
    per_image: list[PerImageResult] = field(default_factory=list)
    transfer: list[TransferredResult] = field(default_factory=list)
    randomness: RandomnessResult | None = None
    surrogate: nn.Module | None = None
    """A model of the same data, to craft on what is tried on this one; None where there is none."""
    borrowed: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """Perturbations crafted on the surrogate by eps."""
    _outcomes: dict[tuple[str, bool, float], Counts] = field(default_factory=dict)

    @property
    def test(self) -> Split:
        """The split that numbers are reported on."""
        return self.data.test

    @property
    def eps(self) -> float:
        """The middle eps: what per-image attacks, pictures and the verdict use."""
        return self.suite.eps[len(self.suite.eps) // 2]

    @property
    def middle(self) -> UniversalResult:
        """The perturbation of the middle eps."""
        return self.universal[len(self.universal) // 2]

    def crafted_at(self, eps: float) -> UniversalPerturbation:
        """What the attack on the model itself crafted, whether or not another perturbation does more harm."""
        return self.crafted.get(eps, self.uaps[eps])

    @cached_property
    def sample(self) -> Split:
        """The test images that diagnostics look at, as many as the suite lets them."""
        return self.few(self.suite.sample)

    @cached_property
    def unseen(self) -> Split:
        """As many validation images."""
        return self.few(self.suite.sample, self.data.validation)

    @cached_property
    def surrogate_temperature(self) -> float:
        """What the surrogate's logits are divided by where attacks climb them; 1 where there is none."""
        if self.surrogate is None:
            return 1.0
        with Victim(self.surrogate) as source:
            return temperature(source, self.data.validation, self.seed)

    def few(self, count: int, split: Split | None = None) -> Split:
        """Return so many images of test, or of another split, drawn evenly over the classes by the audit's seed."""
        return (self.test if split is None else split).sample(count, seed=self.seed)

    def accuracy(self, attack: ImageAttack) -> Rate:
        """Accuracy of the sample under an attack; what was asked before is not measured again."""
        return self.outcome(attack).accuracy

    def outcome(self, attack: ImageAttack, *, unseen: bool = False) -> Counts:
        """What an attack leaves right of the sample, or the unseen images, one by one; it is not measured twice.

        On a random model a gradient attack that does not say over how many draws it averages takes the suite's number.
        """
        attack = self.averaged(attack)
        key = (repr(attack), unseen, self.victim.temperature)
        if key not in self._outcomes:
            split = self.unseen if unseen else self.sample
            self._outcomes[key] = outcome(self.victim, split, AsFarAsFinite(attack), self.seed)
        return self._outcomes[key]

    def averaged(self, attack: AttackT) -> AttackT:
        """Return an attack whose gradients are averaged over the suite's number of draws where the model is random."""
        images, _ = self.test.take(slice(0, 8), self.victim.device)
        return averaged(attack, self.victim, images, self.suite.eot_samples)

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Let attacks climb the logits as they are, as those did that a net was trained against."""
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
        """What was spent since :attr:`spent` was ``before``."""
        now = self.spent
        return Cost(forwards=now.forwards - before.forwards, backwards=now.backwards - before.backwards)
