"""Models of which nothing is seen but scores: a Python function, an ONNX file; a server is in :mod:`.http_scores`."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import UserError
from gambeson.models.hubs import required

Output = Literal["auto", "logits", "probabilities"]
"""What the box returns. ``auto`` decides at the first answer: rows in [0, 1] that sum to 1 are probabilities."""

_TINY = 1e-30


class BlackBox(nn.Module):
    """A function from images (N, C, H, W) in [0, 1] to scores (N, K), without gradient, counted.

    It stands wherever a model stands that is only asked: in :class:`gambeson.victim.Victim`, in query and procedural
    attacks, in transfer. Probabilities are turned into their logarithm, which are logits of the same model.

    Args:
        output: what the box returns.
        budget: the most images it may be asked about in all; None: as many as an attack likes.
        batch: the most images sent at once.

    Attributes:
        images: images it was asked about and answered for; an image sent twice since the first attempt was lost
            counts once.

    Raises:
        UserError: from ``forward``, for a gradient, a budget that would be exceeded (nothing is asked then), and
            answers that are not finite scores (N, K).
    """

    def __init__(self, *, output: Output = "auto", budget: int | None = None, batch: int = 256) -> None:
        super().__init__()
        if batch < 1 or (budget is not None and budget < 1):
            raise UserError(f"batch = {batch}, budget = {budget}: expected 1 or more")
        self.output: Output = output
        self.budget = budget
        self.batch = batch
        self.images = 0
        self._classes: int | None = None
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages call the box."""

    @abstractmethod
    def _ask(self, images: torch.Tensor) -> Any:
        """Return the answer for at most ``batch`` images, float32 on the CPU."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K), float32, on the device of the images."""
        if torch.is_grad_enabled() and images.requires_grad:
            raise UserError(
                f"{self.title} is a black box, which has no gradient: choose a query, procedural or transfer attack, "
                "such as square or perlin"
            )
        with self._lock:
            if self.budget is not None and self.images + len(images) > self.budget:
                raise UserError(
                    f"{self.title} may be asked about {self.budget} images and was about {self.images}: {len(images)} "
                    "more are too many; allow a larger budget, or choose an attack that asks less"
                )
            self.images += len(images)  # claimed before asking: two threads must not both take the last place
        sent = images.detach().to("cpu", torch.float32)
        done = 0
        try:
            found = []
            for piece in sent.split(self.batch):
                found.append(self._read(self._ask(piece.clone()), len(piece)))
                done += len(piece)
        finally:
            if done < len(images):
                with self._lock:
                    self.images -= len(images) - done
        return torch.cat(found).to(images.device) if found else torch.zeros(0, self._classes or 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlackBox:
        raise UserError("a black box has no weights to copy")

    def _read(self, answer: Any, count: int) -> torch.Tensor:
        expected = f"expected scores ({count}, K), one row an image"
        answer = getattr(answer, "logits", answer)
        try:
            scores = torch.as_tensor(answer).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"{self.title} returned {type(answer).__name__}: {expected}") from None
        if scores.ndim != 2 or len(scores) != count or scores.shape[1] < 2:
            raise UserError(
                f"{self.title} was given {count} images and returned shape {tuple(scores.shape)}: {expected} and K of "
                "at least 2"
            )
        with self._lock:
            self._classes = self._classes or scores.shape[1]
            if scores.shape[1] != self._classes:
                raise UserError(
                    f"{self.title} returned {scores.shape[1]} classes after {self._classes} before: {expected} and "
                    "always the same K"
                )
            if not bool(scores.isfinite().all()):
                raise UserError(f"{self.title} returned NaN or infinite scores: return finite ones")
            if self.output == "auto":
                inside = bool(((scores >= 0) & (scores <= 1)).all())
                sure = inside and bool(((scores.sum(1) - 1).abs() < 1e-3).all())
                self.output = "probabilities" if sure else "logits"
        return scores.clamp(min=_TINY).log() if self.output == "probabilities" else scores


class FunctionScores(BlackBox):
    """A Python function as a black box.

    Args:
        function: from a tensor (N, C, H, W), float32 in [0, 1] on the CPU, to scores (N, K): a tensor, an array or
            nested lists.
        title: what messages call it; None: its own name.
        keywords: see :class:`BlackBox`.
    """

    def __init__(self, function: Callable[[torch.Tensor], Any], *, title: str | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.function = function
        self._title = title or f"the function {getattr(function, '__name__', type(function).__name__)}"

    @property
    def title(self) -> str:
        """What messages call the box."""
        return self._title

    def _ask(self, images: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.function(images)


class OnnxScores(BlackBox):
    """An ONNX file as a black box, by onnxruntime on the CPU.

    The file takes one input (N, C, H, W), float32 in [0, 1]; its first output is read. A file made for a fixed number
    of images is asked in parts of that number, the last one filled up.

    Args:
        path: the file.
        keywords: see :class:`BlackBox`.

    Raises:
        UserError: onnxruntime is not installed, or the file cannot be read or takes something else.
    """

    def __init__(self, path: Path | str, **keywords: Any) -> None:
        runtime = required("onnxruntime", f"the ONNX file {path}")
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path} does not exist: name an ONNX file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds, which differ between its versions
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read as ONNX ({reason}): export the model again") from None
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            kinds = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
            raise UserError(
                f"{path} takes {kinds or 'nothing'}: expected one input of floats (N, C, H, W) in [0, 1]; export a "
                "model of images"
            )
        self.shape = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)
        if self.shape[0] is not None:
            keywords["batch"] = self.shape[0]
        super().__init__(**keywords)
        self._session, self._input, self._output = session, inputs[0].name, session.get_outputs()[0].name

    @property
    def title(self) -> str:
        """What messages call the box."""
        return str(self.path)

    def _ask(self, images: torch.Tensor) -> Any:
        count, fixed = len(images), self.shape[0]
        for side, known in zip(images.shape[1:], self.shape[1:], strict=True):
            if known not in (None, side):
                raise UserError(
                    f"{self.path} takes images of {'x'.join(map(str, self.shape[1:]))}, got "
                    f"{'x'.join(map(str, images.shape[1:]))}: choose data that fit it"
                )
        if fixed is not None and count < fixed:
            images = torch.cat([images, images[-1:].expand(fixed - count, -1, -1, -1)])
        try:
            (found,) = self._session.run([self._output], {self._input: images.contiguous().numpy()})
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path} cannot take {count} images of the data ({reason})") from None
        return found[:count]
