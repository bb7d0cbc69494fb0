"""eps_uni(delta) and eps_adv(delta): the smallest eps at which an attack reaches an error of delta, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from gambeson.attacks import CONTROLS, GradientAttack, UniversalAttack, UniversalPerturbation
from gambeson.base import UserError, derive, seeded, task
from gambeson.data import Dataset, Split, as_dataset, as_split, disjoint
from gambeson.evaluation.bootstrap import ImageErrors, crossing_interval
from gambeson.evaluation.outcome import at_once
from gambeson.evaluation.rates import Cost, EpsAdv, EpsUni
from gambeson.evaluation.universal import RANKED, judged, strongest
from gambeson.threat import Ball, Norm, perturb
from gambeson.victim import Victim, predict, vote
from gambeson.victim.averaged import EOT_SAMPLES

Craft = Callable[[float, torch.Tensor | None], UniversalPerturbation]
"""From eps, and the best perturbation so far (1, C, H, W) scaled to it, to a perturbation of this eps."""

_FIRST = 4 / 255
"""The eps that is tried first where nothing is known."""
FLOOR = 1e-6
"""The bracket is never made narrower than this share of the largest eps that has a meaning (1 in the norm inf): there
the rounding of float32 pixels begins to count. Ours."""
_NEIGHBOURS = 6
"""Scalings of the perturbation found that are tried on each side of eps_uni, ever further away."""
_FAR = 4.0
"""Standard errors from delta at which the error curve is known far enough for the bootstrap."""


@dataclass(frozen=True)
class Found:
    """What stands for one eps."""

    uap: UniversalPerturbation
    """What validation chose."""
    test: ImageErrors
    """Errors on test, which only reports."""


def eps_uni(
    model: nn.Module | Victim,
    data: object,
    attack: UniversalAttack,
    *,
    delta: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
    known: Iterable[UniversalPerturbation] = (),
    controls: Sequence[str] = tuple(CONTROLS),
) -> EpsUni:
    """Search the smallest eps that one perturbation needs (Mummadi et al. 2019, section 3).

    eps doubles until the perturbation that stands for it reaches an error of ``delta`` on the test split, then the
    bracket is halved until it is narrower than ``tolerance`` times eps (or :data:`FLOOR`). For each eps stands what
    does most harm on validation: what the attack crafts on train, the perturbation of an earlier eps scaled to this
    one, from the best of which (by validation) the attack also starts, or a control. Balls are nested: a success at
    eps counts for every larger one. So eps_uni is the minimum over everything that was tried, and an upper bound of
    the true value.

    Test images choose nothing; they say where the error crosses ``delta``. The interval is a bootstrap over them with
    the perturbations held fixed (:func:`gambeson.evaluation.bootstrap.crossing_interval`). To know the error curve
    there, the perturbation found is scaled to up to twelve eps around it, which costs forwards alone; a scaled one
    that succeeds at a smaller eps counts.

    A random model is judged by votes (:data:`gambeson.victim.DEFAULT_VOTES`), whether a module or a victim is given.

    Args:
        model: any module from pixels to logits, or a :class:`Victim` already entered.
        data: a data set, or what can be split into one.
        attack: any universal attack; its own eps is replaced.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the attack, the controls and the bootstrap.
        known: perturbations for this model that are there already, in the norm of the attack.
        controls: names of controls that are tried at each eps; empty: none.

    Returns:
        The smallest success; right-censored where even the whole box gives none.

    Raises:
        UserError: no such delta, or a perturbation of another norm.
    """
    dataset = disjoint(as_dataset(data))
    with judged(model, dataset.test) as victim:

        def craft(eps: float, start: torch.Tensor | None) -> UniversalPerturbation:
            return attack.model_copy(update={"eps": eps}).craft(victim, dataset, seed=seed, start=start)

        before = Cost(forwards=victim.forwards, backwards=victim.backwards)
        found = {}
        for uap in known:
            if uap.about.norm != attack.norm:
                raise UserError(f"a known perturbation is of norm {uap.about.norm}: expected {attack.norm}")
            found[uap.about.eps] = Found(uap, _errors(victim, dataset.test, uap.delta))
        result = search(
            victim,
            dataset,
            craft,
            norm=attack.norm,
            delta=delta,
            tolerance=tolerance,
            seed=seed,
            known=found,
            controls=controls,
        )
        return result.model_copy(update={"cost": _since(victim, before)})


def search(
    victim: Victim,
    data: Dataset,
    craft: Craft,
    *,
    norm: Norm,
    delta: float,
    tolerance: float,
    seed: int = 0,
    known: Mapping[float, Found] | None = None,
    controls: Sequence[str] = tuple(CONTROLS),
    runs: int | None = None,
    clean: ImageErrors | None = None,
) -> EpsUni:
    """As :func:`eps_uni`, for whatever makes a perturbation of a given eps.

    Args:
        victim: the model, inside its context; its ``votes`` say how many votes decide.
        data: its validation split chooses, its test split reports.
        craft: the attack.
        norm: of its ball.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the controls and the bootstrap.
        known: what is known already, by eps.
        controls: names of controls that are tried at each eps.
        runs: the most calls of ``craft``; the bracket stays as wide as it then is. 0: nothing is tried, and eps_uni is
            read off what is known.
        clean: the errors on clean test images, where they are known.
    """
    before = Cost(forwards=victim.forwards, backwards=victim.backwards)
    few = data.validation.sample(RANKED, seed=seed)

    def attempt(eps: float, tried: Mapping[float, Found]) -> Found:
        earlier = [scaled(found.uap, eps) for found in tried.values() if bool(found.uap.delta.any())]
        best = max(earlier, key=lambda uap: _errors(victim, few, uap.delta).error, default=None)
        uap = craft(eps, None if best is None else best.delta)
        others = [] if best is None else [best]
        chosen, _ = strongest(victim, data.validation, uap, seed=seed, controls=controls, others=others)
        return Found(chosen, _errors(victim, data.test, chosen.delta))

    def rescale(found: Found, eps: float) -> ImageErrors:
        return _errors(victim, data.test, scaled(found.uap, eps).delta)

    work = _Bisection(
        attempt=attempt,
        errors=lambda found: found.test,
        rescale=rescale,
        clean=_errors(victim, data.test) if clean is None else clean,
        largest=_largest(norm, data.test),
        delta=delta,
        tolerance=tolerance,
        tried=dict(known or {}),
        runs=math.inf if runs is None else runs,
        seed=seed,
        title=f"  eps_uni({delta:g})",
    )
    return EpsUni(**work.run(), cost=_since(victim, before))


def eps_adv(
    model: nn.Module | Victim,
    data: object,
    attack: GradientAttack,
    *,
    delta: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
) -> EpsAdv:
    """Search the smallest eps at which an attack on each image by itself reaches an error of ``delta``.

    The number to put beside :func:`eps_uni` (Mummadi et al. 2019): it is never larger, up to what the attacks miss. An
    image that fell at some eps counts as fallen at every larger one. What an image is worst at is decided for each
    image by itself, so that no choice among attacks is involved and the interval is that of one number.

    Args:
        model: any module from pixels to logits, or a :class:`Victim` already entered.
        data: a split, an (images, labels) pair, or a data set, whose test split is then used.
        attack: any gradient attack; its own eps is replaced. On a random model it averages over
            :data:`gambeson.victim.averaged.EOT_SAMPLES` draws where it does not say otherwise.
        delta: the error to reach.
        tolerance: width of the last bracket as a share of eps.
        seed: of the attack and the bootstrap.
    """
    split = as_split(data, "test")
    with judged(model, split) as victim:
        before = Cost(forwards=victim.forwards, backwards=victim.backwards)
        if attack.eot_samples is None and victim.traits is not None and victim.traits.stochastic:
            attack = attack.model_copy(update={"eot_samples": EOT_SAMPLES})
        work = _Bisection(
            attempt=lambda eps, tried: _attacked(victim, split, attack, eps, tried, seed),
            errors=lambda found: found[1],
            rescale=lambda found, eps: _moved_errors(victim, split, found[0] * (eps / found[2])),
            clean=_errors(victim, split),
            largest=_largest(attack.norm, split),
            delta=delta,
            tolerance=tolerance,
            tried={},
            runs=math.inf,
            seed=seed,
            title=f"  eps_adv({delta:g})",
        )
        return EpsAdv(**work.run(), images=len(split), cost=_since(victim, before))


def scaled(uap: UniversalPerturbation, eps: float) -> UniversalPerturbation:
    """Return a perturbation as one of another eps: the same direction with norm ``eps``."""
    delta = Ball(eps=eps, norm=uap.about.norm).fill(uap.delta)
    return UniversalPerturbation(delta, uap.about.model_copy(update={"eps": eps, "status": "done"}), uap.image_hashes)


FoundT = TypeVar("FoundT")


@dataclass(kw_only=True)
class _Bisection(Generic[FoundT]):
    attempt: Callable[[float, Mapping[float, FoundT]], FoundT]
    errors: Callable[[FoundT], ImageErrors]
    rescale: Callable[[FoundT, float], ImageErrors]
    """The errors under what was found, scaled to another eps."""
    clean: ImageErrors
    largest: float
    """The eps that reaches every image of the box."""
    delta: float
    tolerance: float
    tried: dict[float, FoundT]
    runs: float
    seed: int
    title: str

    def run(self) -> dict[str, object]:
        """Search, and return the fields of the result."""
        if not 0 < self.delta < 1:
            raise UserError(f"delta = {self.delta:g}: expected an error between 0 and 1, such as 0.5")
        probing = self.runs > 0
        low, high = (0.0, 0.0) if self.clean.error >= self.delta else self._bracket()
        with task(self.title, self._halvings(low, high)) as advance:
            while math.isfinite(high) and high - low > self._width(high) and self.runs > 0:
                middle = (low + high) / 2
                low, high = (low, middle) if self._succeeds(middle) else (middle, high)
                advance()
        curve = {0.0: self.clean} | {eps: self.errors(found) for eps, found in self.tried.items()}
        if probing and 0 < high < math.inf:
            curve = self._neighbours(self.tried[high], high) | curve
            high = min(eps for eps, found in curve.items() if found.error >= self.delta)
            low = max(eps for eps, found in curve.items() if eps < high)
        value = high if math.isfinite(high) else low
        ends = crossing_interval(curve, self.delta, seed=self.seed)
        return {
            "delta": self.delta,
            "value": value,
            "low": min(ends[0], value),
            "high": ends[1] if ends[1] is None or not math.isfinite(high) else max(ends[1], value),
            "censored": not math.isfinite(high),
            "tolerance": high - low if math.isfinite(high) else 0.0,
            "tried": sorted((eps, found.error) for eps, found in curve.items() if eps > 0),
            "split": "test",
        }

    def _bracket(self) -> tuple[float, float]:
        """Return the largest eps known to fail and the smallest known to succeed, infinite where none does."""
        while (high := self._smallest_success()) == math.inf and self._reach() < self.largest and self.runs > 0:
            self._succeeds(min(self.largest, max(_FIRST, 2 * self._reach())))
        low = max((eps for eps in self.tried if eps < high), default=0.0)
        return low, high

    def _succeeds(self, eps: float) -> bool:
        """Attack at ``eps`` and say whether the error reaches delta."""
        self.runs -= 1
        self.tried[eps] = self.attempt(eps, self.tried)
        return self.errors(self.tried[eps]).error >= self.delta

    def _neighbours(self, found: FoundT, eps: float) -> dict[float, ImageErrors]:
        """Errors under what was found at ``eps``, scaled to others until the error is far from delta."""
        images = int((self.clean.answers > 0).sum())
        far = _FAR * math.sqrt(self.delta * (1 - self.delta) / max(1, images))
        step, curve = min(0.05, max(0.01, self.tolerance)), {}
        for side in (-1, 1):
            for k in range(_NEIGHBOURS):
                near = min(self.largest, eps * (1 + side * step * 2**k))
                if near <= 0 or near == eps:
                    break
                curve[near] = self.rescale(found, near)
                if side * (curve[near].error - self.delta) > far:
                    break
        return curve

    def _smallest_success(self) -> float:
        reached = (eps for eps, found in self.tried.items() if self.errors(found).error >= self.delta)
        return min(reached, default=math.inf)

    def _reach(self) -> float:
        return max(self.tried, default=0.0)

    def _width(self, high: float) -> float:
        return max(self.tolerance * high, FLOOR * self.largest)

    def _halvings(self, low: float, high: float) -> int:
        """At about how many halvings the bracket needs; an eps far below it takes more."""
        if not math.isfinite(high) or high == 0:
            return 0
        return max(0, math.ceil(math.log2(max(1.0, (high - low) / self._width(max(low, high / 2))))))


def _largest(norm: Norm, split: Split) -> float:
    values = math.prod(split.shape)
    return {"inf": 1.0, "2": math.sqrt(values), "1": float(values)}[norm]


def _since(victim: Victim, before: Cost) -> Cost:
    return Cost(forwards=victim.forwards - before.forwards, backwards=victim.backwards - before.backwards)


def _errors(victim: Victim, split: Split, delta: torch.Tensor | None = None) -> ImageErrors:
    return ImageErrors.of(predict(victim, split, None if delta is None else delta.to(victim.device)), split)


PerImageFound = tuple[torch.Tensor, ImageErrors, float]
"""Each image's worst perturbation (N, C, H, W), its errors, and the eps of the attack."""


def _attacked(
    victim: Victim,
    split: Split,
    attack: GradientAttack,
    eps: float,
    tried: Mapping[float, PerImageFound],
    seed: int,
) -> PerImageFound:
    """Attack each image at ``eps``; an image that a smaller eps did more harm to keeps that perturbation."""
    smaller = max((known for known in tried if known < eps), default=None)
    here = attack.model_copy(update={"eps": eps})
    moves = []
    with seeded(seed, "eps_adv", f"{eps:.9g}"):
        for k, (images, labels) in enumerate(split.batches(at_once(split), device=victim.device)):
            moved = here(victim, images, labels, seed=derive(seed, "batch", k), task=split.task)
            moves.append((moved - images).cpu())
    delta = torch.cat(moves)
    errors = _moved_errors(victim, split, delta)
    if smaller is None:
        return delta, errors, eps
    before, known, _ = tried[smaller]
    worse = errors.wrong >= known.wrong
    best = torch.where(worse.view(-1, 1, 1, 1), delta, before)
    return best, ImageErrors(torch.maximum(errors.wrong, known.wrong), errors.answers), eps


def _moved_errors(victim: Victim, split: Split, delta: torch.Tensor) -> ImageErrors:
    """Errors under a perturbation for each image (N, C, H, W), by votes where the model is random."""
    size, at, found = at_once(split), 0, []
    with seeded(0, "score"):
        for images, _ in split.batches(size, device=victim.device):
            found.append(vote(victim, perturb(images, delta[at : at + len(images)].to(images))).cpu())
            at += len(images)
    return ImageErrors.of(torch.cat(found), split)
