"""eps_uni(delta): the smallest eps at which one perturbation reaches an error of delta, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from gambeson.attacks import UniversalAttack, UniversalPerturbation
from gambeson.base import UserError, task
from gambeson.data import Dataset, as_dataset, disjoint
from gambeson.evaluation.results import Cost, EpsUni
from gambeson.victim import Victim, predict, score

Craft = Callable[[float, torch.Tensor | None], UniversalPerturbation]
"""From eps, and the best perturbation so far (1, C, H, W) of another eps, to a perturbation of this eps."""

_SMALLEST = 4 / 255
_FINEST = 1 / 1024


def eps_uni(
    model: nn.Module | Victim,
    data: object,
    attack: UniversalAttack,
    *,
    delta: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
    known: Mapping[float, tuple[float, torch.Tensor]] | None = None,
) -> EpsUni:
    """Search the smallest eps that one perturbation needs (Mummadi et al. 2019, section 3).

    eps doubles until one perturbation reaches an error of ``delta`` on the test split, then the bracket is halved.
    Every run also starts from the best perturbation so far, scaled to its eps: balls are nested, so a success at
    eps counts for every larger one. The perturbations are crafted on train and chosen on validation. An attack
    gives an upper bound only.

    Args:
        model: any module from pixels to logits, or a :class:`Victim` already entered.
        data: a data set, or what can be split into one.
        attack: any universal attack; its own eps is replaced.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the attack.
        known: what is known already: error on the test split and perturbation (1, C, H, W), by eps.

    Returns:
        The smallest success; right-censored where even the whole box gives none.
    """
    if not isinstance(model, Victim):
        with Victim(model) as victim:
            return eps_uni(victim, data, attack, delta=delta, tolerance=tolerance, seed=seed, known=known)
    dataset = disjoint(as_dataset(data))

    def craft(eps: float, start: torch.Tensor | None) -> UniversalPerturbation:
        return attack.model_copy(update={"eps": eps}).craft(model, dataset, seed=seed, start=start)

    return search(model, dataset, craft, norm=attack.norm, delta=delta, tolerance=tolerance, known=known)


def search(
    victim: Victim,
    data: Dataset,
    craft: Craft,
    *,
    norm: str,
    delta: float,
    tolerance: float,
    known: Mapping[float, tuple[float, torch.Tensor]] | None = None,
    runs: int | None = None,
    clean: float | None = None,
) -> EpsUni:
    """As :func:`eps_uni`, for whatever makes a perturbation of a given eps.

    Args:
        victim: the model, inside its context.
        data: its test split judges.
        craft: the attack.
        norm: of its ball.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        known: what is known already, by eps.
        runs: the most calls of ``craft``; the bracket stays as wide as it then is.
        clean: the error on clean test images, where it is known.
    """
    if not 0 < delta < 1:
        raise UserError(f"delta = {delta:g}: expected an error between 0 and 1, such as 0.5")
    before = (victim.forwards, victim.backwards)
    work = _Search(victim, data, craft, norm, delta, known or {}, math.inf if runs is None else runs)
    error = score(predict(victim, data.test), data.test).error if clean is None else clean
    low, high = (0.0, 0.0) if error >= delta else work.bracket()
    with task(f"  eps_uni({delta:g})", _halvings(low, high, tolerance)) as advance:
        while math.isfinite(high) and high - low > max(tolerance * high, _FINEST) and work.runs > 0:
            middle = (low + high) / 2
            low, high = (low, middle) if work.succeeds(middle) else (middle, high)
            advance()
    tried = sorted((eps, error) for eps, (error, _) in work.tried.items())
    return EpsUni(
        delta=delta,
        value=high if math.isfinite(high) else low,
        censored=not math.isfinite(high),
        tolerance=high - low if math.isfinite(high) else 0.0,
        tried=tried,
        split="test",
        cost=Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1]),
    )


class _Search:
    def __init__(
        self,
        victim: Victim,
        data: Dataset,
        craft: Craft,
        norm: str,
        delta: float,
        known: Mapping[float, tuple[float, torch.Tensor]],
        runs: float,
    ) -> None:
        self.victim, self.data, self.craft, self.delta, self.runs = victim, data, craft, delta, runs
        self.tried = dict(known)
        count = math.prod(data.test.shape)
        self.whole_box = {"inf": 1.0, "2": math.sqrt(count), "1": float(count)}[norm]

    def bracket(self) -> tuple[float, float]:
        """Return the largest eps known to fail and the smallest known to succeed, infinite where none does."""
        while (high := self._smallest_success()) == math.inf and self._largest() < self.whole_box and self.runs > 0:
            self.succeeds(min(self.whole_box, max(_SMALLEST, 2 * self._largest())))
        low = max((eps for eps in self.tried if eps < high), default=0.0)
        return low, high

    def succeeds(self, eps: float) -> bool:
        """Attack at ``eps`` and say whether the error reaches delta."""
        self.runs -= 1
        best = max(self.tried.values(), key=lambda found: found[0], default=None)
        uap = self.craft(eps, None if best is None else best[1])
        moved = predict(self.victim, self.data.test, uap.delta.to(self.victim.device))
        self.tried[eps] = (score(moved, self.data.test).error, uap.delta)
        return self.tried[eps][0] >= self.delta

    def _smallest_success(self) -> float:
        return min((eps for eps, (error, _) in self.tried.items() if error >= self.delta), default=math.inf)

    def _largest(self) -> float:
        return max(self.tried, default=0.0)


def _halvings(low: float, high: float, tolerance: float) -> int:
    """At most how many halvings the bracket needs."""
    if not math.isfinite(high) or high == 0:
        return 0
    return max(0, math.ceil(math.log2(max(1.0, (high - low) / max(tolerance * low, _FINEST)))))
