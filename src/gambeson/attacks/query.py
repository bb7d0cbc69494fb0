"""A counted, bounded function from images to scores: all that an attack without gradients sees of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import nn

from gambeson.base import UserError
from gambeson.victim import Victim

InfOr2 = Annotated[Literal["inf", "2"], BeforeValidator(lambda value: str(value).lower().removeprefix("l"))]
"""The norms these attacks are published for; written as :data:`gambeson.threat.Norm` is."""


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


def attacked(labels: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    """Return the numbers of the images to attack: those whose one label is not the ignore index.

    Raises:
        UserError: there is not one label an image.
    """
    if labels.ndim != 1:
        raise UserError(
            f"labels have shape {tuple(labels.shape)}: this attack takes one label an image (N,); "
            "for label maps choose a gradient attack such as PGD"
        )
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    return counts.nonzero().flatten()


def working(images: torch.Tensor) -> torch.Tensor:
    """Return the images in the precision an attack searches in: their own, and float32 for half precision."""
    return images if images.dtype in (torch.float32, torch.float64) else images.float()
