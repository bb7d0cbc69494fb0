"""What an audit has measured so far, and the few things that every further measurement needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from gambeson.attacks import GradientAttack, UniversalPerturbation
from gambeson.auditing.results import Draws, PerImage, Subject, Transferred, Universal
from gambeson.auditing.suite import Suite
from gambeson.data import Dataset, Split
from gambeson.evaluation import Rate
from gambeson.evaluation.results import Cost
from gambeson.evaluation.universal import accuracy_under
from gambeson.victim import Victim


@dataclass
class Evidence:
    """One audit under way. Stages add to it, in order; diagnostics read it and may ask the victim for more."""

    victim: Victim
    """The model, inside its context, and met."""
    data: Dataset
    """Its test split holds the images that are reported on."""
    suite: Suite
    seed: int
    subject: Subject
    clean: Rate
    """Accuracy on clean test images."""
    predictions: torch.Tensor
    """What the model says of the clean test images, (N,) or (N, H, W)."""
    uaps: dict[float, UniversalPerturbation] = field(default_factory=dict)
    """The crafted perturbations by eps."""
    universal: list[Universal] = field(default_factory=list)
    per_image: list[PerImage] = field(default_factory=list)
    transfer: list[Transferred] = field(default_factory=list)
    draws: Draws | None = None
    _accuracies: dict[str, Rate] = field(default_factory=dict)

    @property
    def test(self) -> Split:
        """The split that numbers are reported on."""
        return self.data.test

    @property
    def eps(self) -> float:
        """The middle eps: what per-image attacks, pictures and the verdict use."""
        return self.suite.eps[len(self.suite.eps) // 2]

    @property
    def middle(self) -> Universal:
        """The perturbation of the middle eps."""
        return self.universal[len(self.universal) // 2]

    @cached_property
    def sample(self) -> Split:
        """The first test images, as many as the suite lets diagnostics look at."""
        return self.test.subset(torch.arange(min(self.suite.sample, len(self.test))))

    def accuracy(self, attack: GradientAttack) -> Rate:
        """Accuracy of the sample under an attack; what was asked before is not measured again."""
        if str(attack) not in self._accuracies:
            self._accuracies[str(attack)] = accuracy_under(self.victim, self.sample, attack, self.seed)
        return self._accuracies[str(attack)]

    @property
    def spent(self) -> Cost:
        """Forwards and backwards so far."""
        return Cost(forwards=self.victim.forwards, backwards=self.victim.backwards)

    def since(self, before: Cost) -> Cost:
        """What was spent since :attr:`spent` was ``before``."""
        now = self.spent
        return Cost(forwards=now.forwards - before.forwards, backwards=now.backwards - before.backwards)
