"""A counted, bounded function from images to scores: all that an attack without gradients sees of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import nn

from gambeson.attacks.losses import Loss
from gambeson.base import Config, UserError
from gambeson.base.checks import check_batch
from gambeson.tasks import Task
from gambeson.tasks import of as task_of
from gambeson.victim import Victim

InfOr2 = Annotated[Literal["inf", "2"], BeforeValidator(lambda value: str(value).lower().removeprefix("l"))]
"""The norms these attacks are published for; written as :data:`gambeson.threat.Norm` is."""

QueryLoss = Literal["cross-entropy", "margin"]
"""What a query attack can climb; see :data:`gambeson.attacks.losses.LossName`."""


class Queries:
    """A function from images to scores, asked at most so often an image, and counted.

    Hand it to a query attack in place of the model to read afterwards what the attack asked. It needs no gradient
    and sees only images (M, C, H, W) in [0, 1]; logits, log-probabilities and probabilities will do.

    Args:
        model: a module, a :class:`Victim` already entered, or any function that returns scores (M, K) as a tensor
            or as what ``torch.as_tensor`` reads (arrays, nested lists).

    Attributes:
        spent: (N,) queries of each image in the latest attack, the clean image's own included.
        budget: the most that attack might ask of one image.
        total: queries of all images in all attacks.
    """

    def __init__(self, model: nn.Module | Victim | Callable[[torch.Tensor], Any]) -> None:
        self.model = model
        self.spent = torch.zeros(0, dtype=torch.long)
        self.budget = 0
        self.total = 0
        self._ask: Callable[[torch.Tensor], Any] = model
        self._classes: int | None = None

    @contextmanager
    def opened(self, images: torch.Tensor, budget: int) -> Iterator[None]:
        """Count from zero for these images (N, ...), none of which may be asked about more than ``budget`` times."""
        self.spent = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.budget, self._classes = budget, None
        with ExitStack() as stack:
            self._ask = self.model
            if isinstance(self.model, nn.Module):
                self._ask = stack.enter_context(Victim(self.model))
            stack.enter_context(torch.no_grad())
            yield

    def __call__(self, candidates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores (M, K) of candidates (M, C, H, W) that belong to the images numbered ``rows`` (M,).

        Raises:
            UserError: what came back is not finite scores (M, K).
            RuntimeError: the budget would be exceeded; nothing is asked (an attack that does so has a bug).
        """
        spent = self.spent + torch.bincount(rows, minlength=len(self.spent))
        if bool((spent > self.budget).any()):
            raise RuntimeError(f"{int(spent.max())} queries of one image, but the budget is {self.budget}")
        self.spent = spent
        self.total += len(candidates)
        # A copy: a function that writes into its input must not change what the attack keeps.
        return self._read(self._ask(candidates.clone()), candidates)

    def _read(self, answer: Any, asked: torch.Tensor) -> torch.Tensor:
        answer = getattr(answer, "logits", answer)
        expected = f"expected scores ({len(asked)}, K), one row an image"
        try:
            scores = torch.as_tensor(answer, device=asked.device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"the queried function returned {type(answer).__name__}: {expected}; return the scores alone"
            ) from None
        if scores.ndim != 2 or len(scores) != len(asked) or scores.shape[1] < 2:
            raise UserError(
                f"the queried function was given {len(asked)} images and returned shape {tuple(scores.shape)}: "
                f"{expected} and K of at least 2; return the score of every class"
            )
        if self._classes not in (None, scores.shape[1]):
            raise UserError(
                f"the queried function returned {scores.shape[1]} classes after {self._classes} before: "
                f"{expected} and always the same K"
            )
        self._classes = scores.shape[1]
        scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        broken = int((~scores.isfinite().all(1)).sum())
        if broken:
            raise UserError(
                f"the queried function gave NaN or infinite scores for {broken} of {len(asked)} images at query "
                f"{int(self.spent.max())} of an image: no attack can follow them; return finite scores"
            )
        return scores


def attacked(labels: torch.Tensor, task: Task) -> torch.Tensor:
    """Return the numbers of the images to attack: those whose label counts.

    Raises:
        UserError: there is not one label per image.
    """
    task.require_classification("this attack", "for label maps choose a gradient attack such as PGD")
    return task.labelled(labels).nonzero().flatten()


def working(images: torch.Tensor) -> torch.Tensor:
    """Return the images in the precision an attack searches in: their own, and float32 for half precision."""
    return images if images.dtype in (torch.float32, torch.float64) else images.float()


class Search:
    """The state of a query attack: the best found for each image, and which images still stand.

    Attributes:
        images: (N, C, H, W), the clean images.
        best: (N, C, H, W), what is handed back.
        value: (N,) the loss of ``best``; infinite once an image has fallen (or was not to be attacked).
        standing: (A,) numbers of the images that have not fallen.
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
        """Queries that every standing image has left; they have all been asked about equally often."""
        if len(self.active) == 0:
            return 0
        return self.queries.budget - int(self.queries.spent[self.active].max())

    def ask(self, candidates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each candidate (M,) and whether it makes its image fall (M,)."""
        scores = self.queries(candidates, rows)
        labels = self.labels[rows]
        return self.loss(scores, labels), self.task.is_adversarial(scores, labels, targeted=self.loss.targeted)

    def offer(self, candidates: torch.Tensor) -> None:
        """Ask about one candidate (A, C, H, W) a standing image; keep it where its loss is higher or it falls."""
        self._take(candidates, self.queries(candidates, self.active))

    def keep(self, candidates: torch.Tensor, value: torch.Tensor, down: torch.Tensor) -> None:
        """Keep candidates of the standing images that have been asked about already."""
        value = value.to(self.value.dtype).masked_fill(down, torch.inf)
        better = value > self.value[self.active]
        rows = self.active[better]
        self.best[rows], self.value[rows] = candidates[better], value[better]
        self.active = self.active[~down]

    def leave(self, hopeless: torch.Tensor) -> None:
        """Ask no more about the images (N,) that are hopeless; what was found for them is kept."""
        self.active = self.active[~hopeless[self.active]]

    def _take(self, candidates: torch.Tensor, scores: torch.Tensor) -> None:
        labels = self.labels[self.active]
        self.keep(
            candidates, self.loss(scores, labels), self.task.is_adversarial(scores, labels, targeted=self.loss.targeted)
        )


class QueryAttack(Config):
    """What query attacks have in common: a budget, labels or targets, and a stop for each image by itself."""

    queries: Annotated[int, Field(ge=1)] = 5000
    """The most queries an image, the one about the clean image included; never exceeded. An image that has fallen
    is not asked about again."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    loss: QueryLoss | None = None
    """What is climbed: the margin of the scores or their cross-entropy. None is the attack's own: the margin
    untargeted, the cross-entropy for targets, unless it says otherwise."""

    def __call__(
        self,
        model: nn.Module | Victim | Queries | Callable[[torch.Tensor], Any],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        task: Task | None = None,
    ) -> torch.Tensor:
        """Attack a batch; all that is needed of the model is a function from images to scores (N, K).

        Args:
            model: what to ask: see :class:`Queries`, which also counts.
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels, or targets where ``targeted``.
            seed: of every random draw.
            task: what the labels mean; images whose label does not count are left alone.

        Returns:
            (N, C, H, W): for each image what made it fall, else the candidate with the highest loss.

        Raises:
            UserError: images outside [0, 1], one label a pixel, or a function that does not return scores (N, K).
        """
        images = check_batch(x, y)
        queries = model if isinstance(model, Queries) else Queries(model)
        task = task_of(y) if task is None else task
        if len(attacked(y, task)) == 0 or self._null:
            return images
        with queries.opened(images, self.queries):
            loss = Loss(kind=self.loss or self._default_loss, targeted=self.targeted)
            search = Search(queries, working(images), y, loss, task)
            self._search(search, seed)
        return search.best.to(images.dtype)

    @property
    @abstractmethod
    def _null(self) -> bool:
        """Whether no perturbation is allowed at all."""

    @property
    def _default_loss(self) -> QueryLoss:
        return "cross-entropy" if self.targeted else "margin"

    @abstractmethod
    def _search(self, search: Search, seed: int) -> None:
        """Improve ``search.best`` until nothing stands or the budget is spent."""
