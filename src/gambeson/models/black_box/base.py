"""Base class of black boxes, which return only scores or class indices."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import UserError, read_json, write_json
from gambeson.models.outputs import are_probabilities, are_shares

Output = Literal["auto", "logits", "probabilities"]
"""Type of the returned scores. ``auto`` decides on the first result: rows in [0, 1] that sum to 1 are probabilities."""

_TINY = 1e-30
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class BudgetSpent(UserError):
    """A query would exceed the budget of a black box; nothing was sent."""


def no_gradient(what: str, title: str) -> UserError:
    """Build the error for something that needs gradients of a black box."""
    return UserError(
        f"{what} needs gradients, and {title} is a black box, which has no gradient: choose a query, procedural or "
        "transfer attack, such as square or perlin"
    )


class BlackBox(nn.Module):
    """A function from images (N, C, H, W) in [0, 1] to scores, without gradients, that counts its queries.

    Scores are (N, K), or (N, K, H, W) where labels are maps; class indices (N,) or (N, H, W).

    It can be used wherever a model needs only forward passes: in :class:`gambeson.victim.Victim`, query and procedural
    attacks, and transfer. Probabilities are converted to their logarithm, which are logits of the same model. Class
    indices become scores of -1 with a zero at that class, which give a search no sense of distance.

    Args:
        output: type of the returned scores.
        budget: maximum number of images in total; None: unlimited.
        batch: maximum number of images per request.
        classes: K; needed only if the box returns class indices.

    Attributes:
        images: number of images queried. A retry counts again if the first attempt may have been answered.
        answers: scores stored by :meth:`recognise`; empty before. It is a buffer, so that it determines the module's
            fingerprint.

    Raises:
        UserError: from ``forward``: gradients are enabled, or the result is not finite scores or class indices.
        BudgetSpent: from ``forward``: the budget would be exceeded.
    """

    answers: torch.Tensor
    workers = 1
    """Concurrent requests."""

    def __init__(
        self, *, output: Output = "auto", budget: int | None = None, batch: int = 256, classes: int | None = None
    ) -> None:
        super().__init__()
        if batch < 1 or (budget is not None and budget < 1):
            raise UserError(f"batch = {batch}, budget = {budget}: expected 1 or more")
        self.output: Output = output
        self.budget = budget
        self.batch = batch
        self.images = 0
        self.register_buffer("answers", torch.zeros(0))
        self._names = classes  # range of class indices
        self._classes: int | None = None  # number of scores so far
        self._told: set[str] = set()
        self._hard = True
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._earlier = self._written = 0

    @property
    @abstractmethod
    def title(self) -> str:
        """Name of the box in messages."""

    @abstractmethod
    def _ask(self, images: torch.Tensor) -> Any:
        """Return the result for at most ``batch`` images, float32 on the CPU, already counted."""

    @property
    def decides_only(self) -> bool:
        """Whether only the top class was returned so far: class indices, or one-hot rows."""
        return bool(self._told) and self._hard

    @property
    def asked(self) -> int:
        """Number of images queried, including those of earlier processes found by :meth:`hold`."""
        return self._earlier + self.images

    def hold(self, budget: int | None, file: Path | None = None) -> None:
        """Set a budget that persists across processes.

        Args:
            budget: maximum number of images in total, including earlier ones.
            file: stores the number. It is written before images are sent, so an interrupted process can only have sent
                fewer.
        """
        known = file is not None and file.is_file()
        self._file, self._earlier = file, int(read_json(file)["images"]) if file is not None and known else 0
        if budget is not None:
            left = max(0, budget - self._earlier)
            self.budget = left if self.budget is None else min(self.budget, left)
        self.settle()

    def afford(self, count: int) -> None:
        """Check that the budget has room for so many images more, before the first of them is paid for.

        Raises:
            BudgetSpent: it has not.
        """
        if self.budget is not None and self.images + count > self.budget:
            raise BudgetSpent(
                f"{self.title} may be asked about {self.budget + self._earlier} images and was about {self.asked}: "
                f"{count} more are too many; allow a larger budget, or choose an attack that asks less"
            )

    def settle(self) -> None:
        """Write the exact number; between calls the file may overstate it by up to half a per cent of the budget."""
        with self._lock:
            self._write(self.asked)

    def recognise(self, images: torch.Tensor) -> torch.Tensor:
        """Query ``images`` and store the scores in :attr:`answers`, which identify the box."""
        with torch.no_grad():
            self.answers = self(images)
        return self.answers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W), float32, on the device of the images."""
        if torch.is_grad_enabled() and images.requires_grad:
            raise no_gradient("this", self.title)
        self._claim(len(images))  # first, so that two threads cannot both use the last of the budget
        pieces = images.detach().to("cpu", torch.float32).split(self.batch) if len(images) else ()
        begun = 0

        def ask(piece: torch.Tensor) -> torch.Tensor:
            nonlocal begun
            with self._lock:
                begun += len(piece)
            return self._read(self._ask(piece.clone()), len(piece))

        try:
            found = map_threads(ask, pieces, self.workers)
        finally:
            self._release(len(images) - begun)
        return torch.cat(found).to(images.device) if found else torch.zeros(0, self._classes or 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlackBox:
        raise UserError("a black box has no weights to copy")

    def _claim(self, count: int) -> None:
        with self._lock:
            self.afford(count)
            self.images += count
            if self.asked > self._written:
                ahead = 10_000 if self.budget is None else self.budget // 200
                most = self.asked + ahead if self.budget is None else self._earlier + self.budget
                self._write(min(self.asked + ahead, most))

    def _release(self, count: int) -> None:
        """Undo a claim: these images were not sent, or certainly not answered."""
        with self._lock:
            self.images -= count

    def _write(self, number: int) -> None:
        if self._file is not None:
            write_json(self._file, {"images": number})
        self._written = number

    def _read(self, answer: Any, count: int) -> torch.Tensor:
        expected = (
            f"expected scores ({count}, K), one row per image, or ({count}, K, H, W), or classes as integers ({count},)"
        )
        answer = getattr(answer, "logits", answer)
        try:
            given = torch.as_tensor(answer).detach().cpu()
            scores = given.to(torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{self.title} returned {type(answer).__name__}: {expected}") from None
        with self._lock:
            decided = given.ndim in (1, 3) and len(given) == count and given.dtype in _INTEGERS
            if decided:
                scores = self._one_hot(given)
            one = self._names == 2 and not decided and scores.ndim in (2, 4) and scores.shape[1] == 1
            if one and are_shares(scores):  # a sigmoid
                scores = scores.clamp(0, 1)
                scores = torch.cat([1 - scores, scores], 1)  # it is the probability of the second class
            if scores.ndim not in (2, 4) or len(scores) != count or scores.shape[1] < 2:
                raise UserError(
                    f"{self.title} was given {count} images and returned shape {tuple(scores.shape)}: {expected} and "
                    "K of at least 2"
                )
            self._told.add("classes" if decided else "scores")
            if len(self._told) > 1:
                raise UserError(f"{self.title} returned scores for some images and classes for others: {expected}")
            self._classes = self._classes or scores.shape[1]
            if scores.shape[1] != self._classes:
                raise UserError(
                    f"{self.title} returned {scores.shape[1]} classes after {self._classes} before: {expected} and "
                    "always the same K"
                )
            if not bool(scores.isfinite().all()):
                raise UserError(f"{self.title} returned NaN or infinite scores: return finite ones")
            if not decided:
                self._hard = self._hard and bool(((scores == 1).sum(1) + (scores == 0).sum(1) == self._classes).all())
            if self.output == "auto" and not decided:
                self.output = "probabilities" if are_probabilities(scores) else "logits"
        return scores.clamp(min=_TINY).log() if not decided and self.output == "probabilities" else scores

    def _one_hot(self, classes: torch.Tensor) -> torch.Tensor:
        if self._names is None:
            raise UserError(f"{self.title} returned classes, and their number is unknown: pass classes=K")
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self._names:
            raise UserError(
                f"{self.title} returned classes from {int(classes.min())} to {int(classes.max())}: expected 0 to "
                f"{self._names - 1}"
            )
        return torch.nn.functional.one_hot(classes.long(), self._names).movedim(-1, 1).float() - 1


def map_threads(
    ask: Callable[[torch.Tensor], torch.Tensor], pieces: Sequence[torch.Tensor], workers: int
) -> list[torch.Tensor]:
    """Apply ``ask`` to every piece with ``workers`` threads; after a failure no more are started."""
    if workers == 1 or len(pieces) < 2:
        return [ask(piece) for piece in pieces]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(ask, piece) for piece in pieces]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
