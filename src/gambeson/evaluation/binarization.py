"""The binarisation test: is an attack strong enough for this model? It must find examples that are known to exist."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import Config, Number, UserError, derive, eps_text, generator, seeded
from gambeson.data import Split
from gambeson.evaluation.outcome import ImageAttack, at_once, attacked, averaged, ball_of, checked
from gambeson.evaluation.rates import Cost
from gambeson.evaluation.universal import scored
from gambeson.tasks import CLASSIFICATION, Rate
from gambeson.threat import Ball, Eps, Norm
from gambeson.victim import Victim, as_victim, vote
from gambeson.victim.inspect import logits_of

STRONG = 0.95
"""Share of the known adversarial examples that a strong enough attack finds."""
GUESSED = 0.05
"""Share that random points may find; above it a success says nothing of the attack (ours)."""
_GROUP = 64
"""Images whose heads are fitted and attacked together."""
_CLEAR = 0.1
"""Least margin of class 0 in a copy that has no adversarial example."""
_ROBUST = 8
"""Images of the copy without adversarial examples."""
_ROUNDS, _DAMPING = 60, 1e-8
"""Newton's steps of a head at most, and what is added to its curvature for their numerical stability."""


class BinarizationTest(Config):
    """Settings of the binarisation test (Zimmermann et al., NeurIPS 2022, arXiv 2206.13991).

    The network is given a new last layer with two classes per image, such that the image and points well inside the
    ball have class 0, and one point on its surface, the *boundary point*, has class 1. So an adversarial example
    certainly exists, and an attack that does not find it is too weak for this network. Passing is necessary, not
    sufficient: the last layer is new, and nothing behind it is tested. The published evaluation's defaults; the sample
    size, the scale of the logits and where a random model's majority decides are ours.
    """

    eps: Eps
    norm: Norm = "inf"
    samples: Annotated[int, Field(ge=1)] = 64
    """Images, each with a head of its own; published 512. A lower 95 % bound of 0.95 takes 60 successes in a row."""
    inner: Annotated[int, Field(ge=1)] = 999
    """Points of class 0 beside the image, uniform in a smaller ball."""
    inner_size: Annotated[Number, Field(gt=0, lt=1)] = 0.95
    """Radius of that ball as a share of eps."""
    boundary: Literal["corner", "surface"] = "surface"
    """Where the boundary point is drawn: anywhere at distance eps, or at a corner of the ball (norm inf only), which
    most of the published evaluations use. Corners lie far beyond all inner points, so that on small images many random
    corners are adversarial, too, and the test says little; hence our default."""
    closeness: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """How close to the boundary point the decision lies, as a share of its logit."""
    random_points: Annotated[int, Field(ge=1)] = 200
    """Points of each kind, in the ball and on its surface, that a random search tries."""


class BinarizationResult(Config):
    """Result of the binarisation test."""

    success: Rate
    """Share of the known adversarial examples that the attack found."""
    random: Rate
    """Share that random points of the ball, or of its surface, found."""
    hidden: Rate
    """Share that the attack found of those that no random point found: what it owes to more than luck (ours)."""
    claimed: int = 0
    """Successes on copies of the network that have class 0 everywhere, so that there are none: 0, or scoring errs."""
    failed: int
    """Images left out because no linear layer separates their points."""
    cost: Cost
    """Of the copies and the attack."""
    shared: Cost = Cost()
    """Of the copies alone, which attacks that are tested together share."""

    @property
    def strong(self) -> bool | None:
        """Whether the attack is strong enough: :data:`STRONG`; None if the test is not informative.

        It is not if no image could be set up, or random points find more than :data:`GUESSED`.
        """
        if self.success.n == 0 or self.random.value > GUESSED:
            return None
        return self.success.value >= STRONG


class BinaryHeads(nn.Module):
    """A network up to its last linear layer, and then for each of a few images a linear layer of its own.

    A perturbed image gets the head of the image that it is nearest to: images are further apart than attacks move them.

    Args:
        model: any module with a linear layer.
        images: (N, C, H, W), the clean images.
        weights: (N, D), one head each.
        bias: (N,), likewise.
        norm: in which images are compared.
        robust: give class 0 everywhere: what would be class 1 has a small margin, so that gradients stay.
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        weights: torch.Tensor,
        bias: torch.Tensor,
        norm: str = "inf",
        *,
        robust: bool = False,
    ) -> None:
        super().__init__()
        self.robust = robust
        self.features = Features(model, images[:1])
        self.norm = float(norm)
        for name, value in (("clean", images.flatten(1)), ("weights", weights), ("bias", bias)):
            self.register_buffer(name, value)
        self.clean: torch.Tensor
        self.weights: torch.Tensor
        self.bias: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (M, 2) of images (M, C, H, W), half of the difference each."""
        with torch.no_grad():
            own = torch.cdist(images.flatten(1), self.clean, p=self.norm).argmin(1)
        value = (self.features(images) * self.weights[own]).sum(1) + self.bias[own]
        if self.robust:
            value = -nn.functional.softplus(-value) - _CLEAR
        return torch.stack([-value, value], 1) / 2


class Features(nn.Module):
    """What enters the last linear layer of a network, (N, D).

    Args:
        model: any module.
        images: (N, C, H, W), sent through it once, to see which linear layer is called last.

    Raises:
        UserError: it calls no linear layer.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        own = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        self.dtype = next(own, images.dtype)
        called: list[nn.Module] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, _: called.append(module))
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with torch.no_grad():
                model(images.to(self.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        if not called:
            raise UserError(
                "the model has no linear layer (torch.nn.Linear) that the binarisation test could replace: it does not "
                "apply to it"
            )
        self.last = called[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, D)."""
        found: list[torch.Tensor] = []
        hook = self.last.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            self.model(images.to(self.dtype))
        finally:
            hook.remove()
        if not found:
            raise UserError(
                "the model's last linear layer is not the same in every call: the test does not apply to it"
            )
        return found[-1].flatten(1).to(images.dtype)


@scored
def binarization_test(
    victim: Victim, split: Split, attack: ImageAttack, test: BinarizationTest, *, seed: int = 0
) -> BinarizationResult:
    """Test whether an attack finds adversarial examples that are known to exist: see :class:`BinarizationTest`.

    Args:
        victim: the model; any module with a linear layer.
        split: the images, of which ``test.samples`` are drawn; of a data set, the test split.
        attack: a per-image attack with its own eps and budget; it sees two classes.
        test: the settings; those of the ball are to be the attack's.
        seed: of every draw.

    Raises:
        UserError: label maps, no linear layer, an attack in another ball, or a corner where the ball has none.
    """
    return binarization_tests(victim, split, {"attack": attack}, test, seed=seed)["attack"]


@scored
def binarization_tests(
    victim: Victim, split: Split, attacks: Mapping[str, ImageAttack], test: BinarizationTest, *, seed: int = 0
) -> dict[str, BinarizationResult]:
    """Test several attacks on the same binarised copies; see :func:`binarization_test`.

    The copies' cost is counted in every result, and stands in its ``shared``.

    Raises:
        UserError: label maps, an attack in another ball, or corners in another norm than inf.
    """
    split.task.require_classification("the binarisation test")
    if test.boundary == "corner" and test.norm != "inf":
        raise UserError(f"boundary is corner and norm {test.norm}: expected surface; only the norm inf has corners")
    for name, attack in attacks.items():
        ball = ball_of(attack)
        if ball is not None and (ball.norm != test.norm or not math.isclose(ball.eps, test.eps, rel_tol=1e-6)):
            raise UserError(
                f"attack {name!r} has eps = {eps_text(ball.eps)} in the norm {ball.norm} and the test "
                f"{eps_text(test.eps)} in the norm {test.norm}: what is hidden on the surface of one ball says nothing "
                "of an attack in another; give both the same"
            )
    model, device = victim.model, victim.device
    images, _ = split.sample(test.samples, seed=seed).take(slice(None), device)
    with seeded(seed, "spread"), torch.no_grad():
        random = victim.inspect(images[:8], scores=True).stochastic
        answers = victim.forward_original(images[:_GROUP])
    spread = float((answers.amax(1) - answers.amin(1)).median())
    size, guessed, failed, shared = at_once(split), list[torch.Tensor](), 0, Cost()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in attacks}
    own, claimed = dict.fromkeys(attacks, Cost()), dict.fromkeys(attacks, 0)

    def hits(name: str, binary: Victim, x: torch.Tensor, k: int) -> torch.Tensor:
        before, y = Cost(forwards=binary.forwards, backwards=binary.backwards), x.new_zeros(len(x), dtype=torch.int64)
        with seeded(stream := derive(seed, "attack", k), "attack"):
            attack = averaged(attacks[name], binary, x)
            moved = attacked(attack, binary, x, y, seed=stream, task=CLASSIFICATION)
            checked(moved, x, test, name)  # of an attack that names no ball
            reached = vote(binary, moved) == 1
        spent = binary.forwards - before.forwards, binary.backwards - before.backwards
        own[name] += Cost(forwards=spent[0], backwards=spent[1])
        return reached

    for k, clean in enumerate(images.split(_GROUP)):
        draw = generator(seed, "binarisation", k, device=device)
        with seeded(seed, "binarisation", k), torch.no_grad():
            points, edge = _points(test, clean, draw)
            features = Features(model, clean[:1])
            inside = torch.stack([_in_parts(features, row, size) for row in points])
            outside = torch.stack([_in_parts(features, edge, size) for _ in range(_DRAWS if random else 1)], 1)
        shared += Cost(forwards=inside.shape[0] * (inside.shape[1] + outside.shape[1]))
        weights, bias = heads(inside, outside, test.closeness, spread)
        copy = partial(BinaryHeads, norm=test.norm)
        with seeded(seed, "copies", k), as_victim(copy(model, clean, weights, bias).eval()) as binary:
            _like(binary, victim)
            usable = (vote(binary, clean) == 0) & (vote(binary, edge) == 1)
            failed += int((~usable).sum())
            rows = usable.nonzero().flatten()
            if len(rows) == 0:
                continue
            for name in attacks:
                found[name].append(hits(name, binary, clean[rows], k))
            before = binary.forwards
            guessed.append(_guessed(test, binary, clean[rows], draw, size))
            shared += Cost(forwards=binary.forwards - before)
        few = rows[:_ROBUST] if k == 0 else rows[:0]
        if len(few):
            honest = partial(copy, model, clean[few], weights[few], bias[few], robust=True)
            with seeded(seed, "robust", k), as_victim(honest().eval()) as robust:
                _like(robust, victim)
                claimed = {name: int(hits(name, robust, clean[few], k).sum()) for name in attacks}
    luck = torch.cat(guessed).bool() if guessed else torch.zeros(0, dtype=torch.bool)
    results = {}
    for name, parts in found.items():
        reached = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
        results[name] = BinarizationResult(
            success=Rate.of(int(reached.sum()), len(reached)),
            random=Rate.of(int(luck.sum()), len(luck)),
            hidden=Rate.of(int((reached & ~luck).sum()), int((~luck).sum())),
            failed=failed,
            claimed=claimed[name],
            cost=shared + own[name],
            shared=shared,
        )
    return results


def _like(copy: Victim, victim: Victim) -> None:
    """Let attacks see a copy as they see the model: with its temperature, and even without a gradient."""
    copy.traits, copy.temperature, copy.allow_no_graph = None, victim.temperature, victim.allow_no_graph


_DRAWS = 5
"""Passes of a random model over a boundary point that its head is fitted to, as in the published evaluation."""


def _points(
    test: BinarizationTest, clean: torch.Tensor, draw: torch.Generator
) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    """Return for each image its points of class 0 (1 + inner, C, H, W), and the boundary points (N, C, H, W)."""
    ball = Ball(eps=test.eps, norm=test.norm)
    smaller = Ball(eps=test.inner_size * test.eps, norm=test.norm)
    edge = _surface(test, ball, clean, draw)

    def inner() -> Iterator[torch.Tensor]:
        for image in clean:
            around = smaller.uniform((test.inner, *image.shape), draw).to(image.dtype)
            yield torch.cat([image[None], (image + around).clamp(0, 1)])

    return inner(), edge


def _surface(test: BinarizationTest, ball: Ball, clean: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Return one point at distance eps of each image (N, C, H, W), inside [0, 1] as well."""
    if test.boundary == "corner":
        return (clean + ball.signs(clean.shape, draw).to(clean.dtype)).clamp(0, 1)
    delta = ball.uniform(clean.shape, draw).to(clean.dtype)
    for _ in range(20):  # clipping shortens a step, so that it is lengthened until the distance holds
        moved = (clean + delta).clamp(0, 1) - clean
        length = moved.flatten(1).norm(p=float(test.norm), dim=1).clamp(min=1e-12)
        delta = delta * (test.eps / length).view(-1, 1, 1, 1)
    return (clean + ball.project((clean + delta).clamp(0, 1) - clean)).clamp(0, 1)


def _in_parts(features: Features, images: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([features(part) for part in images.split(size)])


def heads(
    inside: torch.Tensor, outside: torch.Tensor, closeness: float, spread: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the new last layers by unpenalised logistic regression (Newton's method), and move them near the boundary.

    Args:
        inside: (N, M, D), features of class 0.
        outside: (N, B, D), features of class 1.
        closeness: c: with D the largest logit of class 1, the bias falls by c D, so that D becomes (1 - c) D.
        spread: range of the logits of the points of a head afterwards, as in the network itself.

    Returns:
        Weights (N, D) and bias (N,). Whether they separate the points is for the caller to see.
    """
    points = torch.cat([inside, outside], 1).double()
    middle = points.mean(1, keepdim=True)
    scale = points.std(1, keepdim=True).clamp(min=1e-12)
    scale = torch.where(scale < 1e-9 * points.abs().amax(1, keepdim=True).clamp(min=1e-12), torch.inf, scale)
    given = torch.cat([(points - middle) / scale, torch.ones_like(points[:, :, :1])], 2)
    truth = torch.cat([torch.zeros_like(inside[:, :, 0]), torch.ones_like(outside[:, :, 0])], 1).double()
    found = given.new_zeros(len(given), given.shape[2])
    eye = torch.eye(given.shape[2], dtype=given.dtype, device=given.device)
    for _ in range(_ROUNDS):
        logits = (given @ found[:, :, None])[:, :, 0]
        chance = logits.sigmoid()
        gradient = ((truth - chance)[:, None] @ given)[:, 0]
        if float(gradient.norm(dim=1).max()) < 1e-6:
            break
        curve = given.transpose(1, 2) @ ((chance * (1 - chance))[:, :, None] * given)
        curve += (_DAMPING + 1e-6 * curve.diagonal(dim1=1, dim2=2).mean(1))[:, None, None] * eye
        step = torch.linalg.solve(curve, gradient[:, :, None])[:, :, 0]
        # Longer steps overshoot where most points are certain already.
        found = found + step / (given @ step[:, :, None]).abs().amax((1, 2)).div(4).clamp(min=1)[:, None]
    logits = (given @ found[:, :, None])[:, :, 0]
    top = logits.amax(1)
    by = (spread / (top - logits.amin(1)).clamp(min=1e-12))[:, None]
    weights = by * found[:, :-1] / scale[:, 0]
    bias = by[:, 0] * (found[:, -1] - closeness * top.clamp(min=0)) - (weights * middle[:, 0]).sum(1)
    return weights.to(inside.dtype), bias.to(inside.dtype)


def _guessed(
    test: BinarizationTest, binary: Victim, clean: torch.Tensor, draw: torch.Generator, size: int
) -> torch.Tensor:
    """Return which images (N,) random points of the ball or of its surface get to class 1."""
    ball, hit = Ball(eps=test.eps, norm=test.norm), torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    for _ in range(test.random_points):
        inside = (clean + ball.uniform(clean.shape, draw).to(clean.dtype)).clamp(0, 1)
        for points in (inside, _surface(test, ball, clean, draw)):
            with torch.no_grad():
                hit |= (
                    torch.cat([logits_of(binary.forward_original(part)) for part in points.split(size)]).argmax(1) == 1
                )
    return hit
