"""Local black boxes: Python functions and ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gambeson.base import UserError
from gambeson.models.black_box.base import BlackBox
from gambeson.models.hubs import required


class FunctionModel(BlackBox):
    """A Python function as a black box.

    Args:
        function: from a tensor (N, C, H, W), float32 in [0, 1] on the CPU, to scores (N, K) or class indices (N,):
            a tensor, an array or lists.
        title: its name in messages; None: the function's name.
        keywords: see :class:`BlackBox`.
    """

    function: Callable[[torch.Tensor], Any]

    def __init__(self, function: Callable[[torch.Tensor], Any], *, title: str | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.__dict__["function"] = function  # not as a sub-module: a black box exposes only its outputs
        self._title = title or f"the function {getattr(function, '__name__', type(function).__name__)}"

    @property
    def title(self) -> str:
        """What messages call the box."""
        return self._title

    def _ask(self, images: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.function(images)


class OnnxModel(BlackBox):
    """An ONNX file as a black box, run by onnxruntime on the CPU.

    The file takes one input (N, C, H, W), float32 in [0, 1]; its first output is read. A file with a fixed batch size
    is run in batches of that size, the last one padded.

    Args:
        path: the file.
        keywords: see :class:`BlackBox`.

    Raises:
        UserError: onnxruntime is not installed, or the file cannot be read or has other inputs.
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
        except Exception as error:  # onnxruntime's exception types differ between versions
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
