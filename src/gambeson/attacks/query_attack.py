"""What query attacks share: the bookkeeping of a batch, the budget and the stop for each image by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from gambeson.attacks.losses import Loss, fallen
from gambeson.attacks.query import Queries, attacked, working
from gambeson.base import Config
from gambeson.base.checks import check_batch, check_labels
from gambeson.victim import Victim


class Search:
    """The state of a query attack: the best found for each image, and which images still stand.

    Attributes:
        images: (N, C, H, W), the clean images.
        best: (N, C, H, W), what is handed back.
        value: (N,) the loss of ``best``; infinite once an image has fallen (or was not to be attacked).
        standing: (A,) numbers of the images that have not fallen.
    """

    def __init__(
        self, queries: Queries, images: torch.Tensor, labels: torch.Tensor, loss: Loss, ignore_index: int | None
    ) -> None:
        self.queries, self.images, self.labels, self.loss = queries, images, labels, loss
        self.best = images.clone()
        self.value = torch.full((len(images),), torch.inf, device=images.device)
        self.standing = attacked(labels, ignore_index)
        if len(self.standing) == 0:
            return
        self.value[self.standing] = -torch.inf
        scores = queries(images[self.standing], self.standing)
        check_labels(labels, scores.shape[1], ignore_index)
        self._take(images[self.standing], scores)

    @property
    def left(self) -> int:
        """Queries that every standing image has left; they have all been asked about equally often."""
        if len(self.standing) == 0:
            return 0
        return self.queries.budget - int(self.queries.spent[self.standing].max())

    def ask(self, candidates: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each candidate (M,) and whether it makes its image fall (M,)."""
        scores = self.queries(candidates, rows)
        labels = self.labels[rows]
        return self.loss(scores, labels), fallen(scores, labels, targeted=self.loss.targeted)

    def offer(self, candidates: torch.Tensor) -> None:
        """Ask about one candidate (A, C, H, W) a standing image; keep it where its loss is higher or it falls."""
        self._take(candidates, self.queries(candidates, self.standing))

    def keep(self, candidates: torch.Tensor, value: torch.Tensor, down: torch.Tensor) -> None:
        """Keep candidates of the standing images that have been asked about already."""
        value = value.to(self.value.dtype).masked_fill(down, torch.inf)
        better = value > self.value[self.standing]
        rows = self.standing[better]
        self.best[rows], self.value[rows] = candidates[better], value[better]
        self.standing = self.standing[~down]

    def leave(self, hopeless: torch.Tensor) -> None:
        """Ask no more about the images (N,) that are hopeless; what was found for them is kept."""
        self.standing = self.standing[~hopeless[self.standing]]

    def _take(self, candidates: torch.Tensor, scores: torch.Tensor) -> None:
        labels = self.labels[self.standing]
        self.keep(candidates, self.loss(scores, labels), fallen(scores, labels, targeted=self.loss.targeted))


class QueryAttack(Config):
    """What query attacks have in common: a budget, labels or targets, and a stop for each image by itself."""

    queries: Annotated[int, Field(ge=1)] = 5000
    """The most queries an image, the one about the clean image included; never exceeded. An image that has fallen
    is not asked about again."""
    targeted: bool = False
    """Read the labels as targets to reach."""
    margin: bool | None = None
    """Climb the margin of the scores (True) or their cross-entropy (False); None is the attack's own way: the margin
    untargeted, the cross-entropy for targets, unless it says otherwise."""

    def __call__(
        self,
        model: nn.Module | Victim | Queries | Callable[[torch.Tensor], Any],
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        seed: int = 0,
        ignore_index: int | None = None,
    ) -> torch.Tensor:
        """Attack a batch; all that is needed of the model is a function from images to scores (N, K).

        Args:
            model: what to ask: see :class:`Queries`, which also counts.
            x: (N, C, H, W) in [0, 1].
            y: (N,) labels, or targets where ``targeted``.
            seed: of every random draw.
            ignore_index: label of images that are left alone.

        Returns:
            (N, C, H, W): for each image what made it fall, else the candidate with the highest loss.

        Raises:
            UserError: images outside [0, 1], one label a pixel, or a function that does not return scores (N, K).
        """
        images = check_batch(x, y)
        queries = model if isinstance(model, Queries) else Queries(model)
        if len(attacked(y, ignore_index)) == 0 or self._null:
            return images
        with queries.opened(images, self.queries):
            by_margin = self._margin_by_default if self.margin is None else self.margin
            loss = Loss(kind="margin" if by_margin else "cross-entropy", targeted=self.targeted)
            search = Search(queries, working(images), y, loss, ignore_index)
            self._search(search, seed)
        return search.best.to(images.dtype)

    @property
    @abstractmethod
    def _null(self) -> bool:
        """Whether no perturbation is allowed at all."""

    @property
    def _margin_by_default(self) -> bool:
        return not self.targeted

    @abstractmethod
    def _search(self, search: Search, seed: int) -> None:
        """Improve ``search.best`` until nothing stands or the budget is spent."""
