"""Base class of query attacks, and the counted, bounded function from images to scores that they use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.base import Config, UserError, seeded
from gambeson.tasks import Task, as_pair
from gambeson.threat import landed
from gambeson.threat.ball import NORM_RULES
from gambeson.victim import Victim, as_victim

InfOr2 = Annotated[Literal["inf", "2"], *NORM_RULES]
"""The norms these attacks are published for; in the notation of :data:`gambeson.threat.Norm`."""

QueryLoss = Literal["cross-entropy", "margin"]
"""Losses of query attacks; see :data:`gambeson.attacks.losses.LossName`."""


class Queries:
    """A function from images to scores that counts its queries and enforces a budget per image.

    Pass it to a query attack instead of the model to read the counts afterwards. It needs no gradient and receives only
    images (M, C, H, W) in [0, 1]; it can return logits, log-probabilities or probabilities.

    Args:
        model: a module, an entered :class:`Victim`, or any function that returns scores (M, K), of label maps
            (M, K, H, W), as a tensor or anything that ``torch.as_tensor`` accepts.

    Attributes:
        spent: (N,) queries per image in the latest attack, including the clean image.
        budget: the budget per image of that attack.
        total: all queries of all attacks.
    """

    def __init__(self, model: nn.Module | Victim | Callable[[torch.Tensor], Any]) -> None:
        self.model = model
        self.spent = torch.zeros(0, dtype=torch.long)
        self.budget = 0
        self.total = 0
        self._ask: Callable[[torch.Tensor], Any] = model
        self._classes: int | None = None
        self._map: tuple[int, ...] = ()

    @contextmanager
    def counting(self, images: torch.Tensor, budget: int, per_image: tuple[int, ...] = ()) -> Iterator[None]:
        """Start counting for these images (N, ...), with at most ``budget`` queries each.

        Args:
            images: of the attack.
            budget: per image.
            per_image: the shape of one image's labels: (), or (H, W) of label maps.
        """
        self.spent = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.budget, self._classes, self._map = budget, None, per_image
        with ExitStack() as stack:
            self._ask = self.model
            if isinstance(self.model, nn.Module | Victim):
                victim = stack.enter_context(as_victim(self.model))
                # Every answer decides, so that it is the model's own where the fast copy computes below float32.
                self._ask = victim.forward_original if victim.coarse else victim
            stack.enter_context(torch.no_grad())
            yield

    def __call__(self, candidates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores of candidates (M, C, H, W) of the images with indices ``rows`` (M,).

        Raises:
            UserError: the result is not finite scores (M, K), or (M, K, H, W) of label maps.
            RuntimeError: the budget would be exceeded, which is a bug of the attack; nothing is queried.
        """
        spent = self.spent + torch.bincount(rows, minlength=len(self.spent))
        if bool((spent > self.budget).any()):
            raise RuntimeError(f"{int(spent.max())} queries of one image, but the budget is {self.budget}")
        self.spent = spent
        self.total += len(candidates)
        # A copy, in case the function writes into its input.
        return self._read(self._ask(candidates.clone()), candidates)

    def _read(self, answer: Any, asked: torch.Tensor) -> torch.Tensor:
        answer = getattr(answer, "logits", answer)
        form = "".join(f", {side}" for side in self._map)
        expected = f"expected scores ({len(asked)}, K{form}), one {'map' if form else 'row'} per image"
        try:
            scores = torch.as_tensor(answer, device=asked.device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"the queried function returned {type(answer).__name__}: {expected}; return the scores alone"
            ) from None
        shape = tuple(scores.shape)
        if (
            (shape[:1], shape[2:]) != ((len(asked),), self._map)
            or len(shape) < 2
            or shape[1] < 2
            or scores.is_complex()
        ):
            raise UserError(
                f"the queried function was given {len(asked)} images and returned shape {shape}: "
                f"{expected} and K of at least 2; return the score of every class"
            )
        if self._classes not in (None, scores.shape[1]):
            raise UserError(
                f"the queried function returned {scores.shape[1]} classes after {self._classes} before: "
                f"{expected} and always the same K"
            )
        self._classes = scores.shape[1]
        scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        broken = int((~scores.flatten(1).isfinite().all(1)).sum())
        if broken:
            raise UserError(
                f"the queried function gave NaN or infinite scores for {broken} of {len(asked)} images at query "
                f"{int(self.spent.max())} of an image: no attack can follow them; return finite scores"
            )
        return scores


def attacked(labels: torch.Tensor, task: Task) -> torch.Tensor:
    """Return the numbers of the images to attack: those with a label that counts."""
    return task.labelled(labels).nonzero().flatten()


def working(images: torch.Tensor) -> torch.Tensor:
    """Return the images in the precision of the search: their own, or float32 for half precision."""
    return images if images.dtype in (torch.float32, torch.float64) else images.float()


class Search:
    """The state of a query attack: the best candidate per image, and the active images.

    Attributes:
        images: (N, C, H, W), the clean images.
        best: (N, C, H, W), the result.
        value: (N,) the loss of ``best``; infinite for adversarial images (and those not attacked).
        active: (A,) indices of the images that are not adversarial yet.
    """

    def __init__(self, queries: Queries, images: torch.Tensor, labels: torch.Tensor, loss: Loss, task: Task) -> None:
        self.queries, self.images, self.labels, self.loss, self.task = queries, images, labels, loss, task
        self.best = images.clone()
        self.value = torch.full((len(images),), torch.inf, device=images.device)
        self.active = attacked(labels, task)
        if len(self.active) == 0:
            return
        self.value[self.active] = -torch.inf
        scores = queries(images[self.active], self.active)
        task.check_labels(labels, scores.shape[1])
        self._take(images[self.active], scores)

    @property
    def left(self) -> int:
        """Remaining queries per active image; all of them have used equally many."""
        if len(self.active) == 0:
            return 0
        return self.queries.budget - int(self.queries.spent[self.active].max())

    def ask(self, candidates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each candidate (M,) and whether it is adversarial (M,)."""
        scores = self.queries(candidates, rows)
        labels = self.labels[rows]
        return self.loss(scores, labels, self.task), self.task.is_adversarial(
            scores, labels, targeted=self.loss.targeted
        )

    def offer(self, candidates: torch.Tensor) -> None:
        """Query one candidate per active image (A, C, H, W); keep it if its loss is higher or it is adversarial."""
        self._take(candidates, self.queries(candidates, self.active))

    def keep(self, candidates: torch.Tensor, value: torch.Tensor, down: torch.Tensor) -> None:
        """Keep candidates of the active images that have been queried already."""
        value = value.to(self.value.dtype).masked_fill(down, torch.inf)
        better = value > self.value[self.active]
        rows = self.active[better]
        self.best[rows], self.value[rows] = candidates[better], value[better]
        self.active = self.active[~down]

    def leave(self, hopeless: torch.Tensor) -> None:
        """Stop querying the images (N,) that are hopeless; their best candidates are kept."""
        self.active = self.active[~hopeless[self.active]]

    def _take(self, candidates: torch.Tensor, scores: torch.Tensor) -> None:
        labels = self.labels[self.active]
        self.keep(
            candidates,
            self.loss(scores, labels, self.task),
            self.task.is_adversarial(scores, labels, targeted=self.loss.targeted),
        )


class QueryAttack(Config):
    """Base of the query attacks: a budget, labels or targets, and early stopping per image.

    The papers are about one label per image. On label maps (ours) the margin is the mean over the labelled pixels, and
    untargeted ends for a pixel once it is wrong, so that the effort goes to those that are still right.
    """

    queries: Annotated[int, Field(ge=1)] = 5000
    """Maximum queries per image, including the clean image; never exceeded. Adversarial images are not queried
    again."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    loss: QueryLoss | None = None
    """Loss to maximise: the margin of the scores or their cross-entropy. None: the attack's default, which is the
    margin if untargeted and the cross-entropy if targeted, unless documented otherwise."""

    def __call__(
        self,
        model: nn.Module | Victim | Queries | Callable[[torch.Tensor], Any],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
    ) -> torch.Tensor:
        """Attack a batch; the model can be any function from images to scores (N, K).

        Args:
            model: the model or function; pass a :class:`Queries` to read the counts.
            x: (N, C, H, W) in [0, 1].
            y: (N,) or (N, H, W) labels, or targets where ``targeted``.
            seed: of every random draw, also of a model that draws from torch.
            task: what the labels mean; images whose label does not count are left alone.

        Returns:
            (N, C, H, W): an adversarial image each, or else the candidate with the highest loss.

        Raises:
            UserError: images outside [0, 1], a function that does not return scores (N, K), of label maps (N, K, H, W),
                or a setting that is not for label maps.
        """
        images, labels, task = as_pair(x, y, task, floats=True)
        self._check_task(task)
        queries = model if isinstance(model, Queries) else Queries(model)
        if len(attacked(labels, task)) == 0 or self._null:
            return images.clone()
        with queries.counting(images, self.queries, tuple(labels.shape[1:])), seeded(seed, "noise"):
            kind = self.loss or self._default_loss
            ends = kind == "margin" and not (self.targeted or task.per_image_label)
            loss = Loss(kind=kind, targeted=self.targeted, truncate=0.0 if ends else None)
            search = Search(queries, working(images), labels, loss, task)
            self._search(search, seed)
        return landed(images, search.best)

    @property
    @abstractmethod
    def _null(self) -> bool:
        """Whether no perturbation is allowed at all."""

    def _check_task(self, task: Task) -> None:
        """Refuse a task that a setting does not suit, before the first query."""

    @property
    def _default_loss(self) -> QueryLoss:
        return "cross-entropy" if self.targeted else "margin"

    @abstractmethod
    def _search(self, search: Search, seed: int) -> None:
        """Improve ``search.best`` until no image is active or the budget is spent."""
