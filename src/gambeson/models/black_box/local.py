"""Local black boxes: Python functions and ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gambeson.base import UserError, one_line, pixel_bytes, refuse_pointer, required
from gambeson.data import Shape
from gambeson.models.black_box.base import BlackBox


class FunctionModel(BlackBox):
    """A Python function as a black box.

    Args:
        function: from a tensor (N, C, H, W), float32 in [0, 1] on the CPU, to scores (N, K) or class indices (N,),
            of label maps (N, K, H, W) or (N, H, W): a tensor, an array or lists.
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


_KINDS = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(uint8)": torch.uint8,
}


@dataclass(frozen=True)
class OnnxInput:
    """How images become the input of an ONNX file.

    Its sizes and type decide: (N, C, H, W), or channels last where the sizes fit that alone; float32, float64 or
    float16 in [0, 1], or uint8, which gets the pixels rounded to 0..255; and, for a file of a fixed batch size, batches
    of that size, the last one padded.
    """

    path: Path
    shape: tuple[int | None, ...]
    """Four sizes, with None for any."""
    dtype: torch.dtype
    normalise: tuple[Sequence[float], Sequence[float]] | None = None
    """Mean and standard deviation per channel of the pixels that it takes; None: pixels in [0, 1]."""

    @property
    def batch(self) -> int | None:
        """The fixed batch size; None: any."""
        return self.shape[0]

    @property
    def image(self) -> Shape:
        """(C, H, W) of an image, with None for any; channels are last where only that size can be their number."""
        _, first, second, last = self.shape
        return (last, first, second) if last in (1, 3, 4) and first not in (None, 1, 3, 4) else (first, second, last)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (N, C, H, W), float in [0, 1], as the file takes them.

        Raises:
            UserError: the file takes images of another size.
        """
        if self.normalise is not None:
            mean, std = (images.new_tensor(side)[:, None, None] for side in self.normalise)
            images = (images - mean) / std
        if not self._fits(images.shape[1:]):
            if not self._fits((*images.shape[2:], images.shape[1])):
                sides = "x".join("any" if side is None else str(side) for side in self.shape[1:])
                raise UserError(
                    f"{self.path} takes images of {sides}, got {'x'.join(map(str, images.shape[1:]))}: choose data "
                    "that fit it"
                )
            images = images.permute(0, 2, 3, 1)
        if self.batch is not None and len(images) < self.batch:
            images = torch.cat([images, images[-1:].expand(self.batch - len(images), -1, -1, -1)])
        images = pixel_bytes(images) if self.dtype == torch.uint8 else images.to(self.dtype)
        return images.contiguous()

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return all(known in (None, side) for known, side in zip(self.shape[1:], shape, strict=True))


class OnnxModel(BlackBox):
    """An ONNX file as a black box, run by onnxruntime on the CPU.

    Args:
        path: the file, which takes one input; see :class:`OnnxInput`. Of several outputs the first that may hold
            ``classes`` scores per image is read, by its sizes; else the first.
        normalise: mean and standard deviation per channel, if the file takes normalised pixels.
        keywords: see :class:`BlackBox`.

    Attributes:
        input: how images become its input.

    Raises:
        UserError: onnxruntime is not installed, or the file cannot be read or has other inputs.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        normalise: tuple[Sequence[float], Sequence[float]] | None = None,
        **keywords: Any,
    ) -> None:
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
            refuse_pointer(path)
            raise UserError(f"{path} cannot be read as ONNX ({one_line(error)}): export the model again") from None
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _KINDS:
            kinds = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
            raise UserError(
                f"{path} takes {kinds or 'nothing'}: expected one input of images, four sizes of {', '.join(_KINDS)}; "
                "export a model of images"
            )
        shape = tuple(side if isinstance(side, int) else None for side in inputs[0].shape)
        self.input = OnnxInput(self.path, shape, _KINDS[inputs[0].type], normalise)
        if normalise is not None and self.input.dtype == torch.uint8:
            raise UserError(f"the input of {path} is uint8, which cannot be normalised: leave ?normalise= out")
        if self.input.batch is not None:
            keywords["batch"] = self.input.batch
        super().__init__(**keywords)
        classes = keywords.get("classes")
        fits = (k for k, out in enumerate(outputs) if len(out.shape) in (2, 4) and out.shape[1] == classes)
        self.output_index = next(fits, 0)
        self._session, self._input, self._output = session, inputs[0].name, outputs[self.output_index].name

    @property
    def title(self) -> str:
        """What messages call the box."""
        return str(self.path)

    def _ask(self, images: torch.Tensor) -> Any:
        given = self.input(images).numpy()
        try:
            (found,) = self._session.run([self._output], {self._input: given})
        except Exception as error:
            raise UserError(f"{self.path} cannot take {len(images)} images of the data ({one_line(error)})") from None
        return found[: len(images)]
