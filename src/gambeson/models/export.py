"""Export of models to run without this library: ``torch.export`` programs, ONNX files, bare weights."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import UserError, one_line, required, save_tensors, write_bytes
from gambeson.models.outputs import as_logits
from gambeson.models.pixel_model import ModelCard, PixelModel

Target = Literal["torch-export", "onnx", "safetensors"]
TARGETS: dict[Target, str] = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
"""Export formats, with the usual file suffix."""


def export(model: nn.Module, path: Path, to: Target, *, example: torch.Tensor | None = None) -> None:
    """Write a model so that it runs without this library, atomically.

    ``torch-export`` and ``onnx`` take pixels (N, C, H, W) in [0, 1], float32, of any N, and return logits (N, K), or
    (N, K, H, W) of a segmentation model, at the size of the image.
    Normalisation, ensemble vote and noise are included, the noise as random operations with new draws in every call.
    The names of input and output in ONNX are ``pixels`` and ``logits``.

    ``safetensors`` holds the weights by the names that the architecture itself gives them (those of torchvision,
    timm, transformers or the user's module), without normalisation, noise or vote as code: these are in the file's
    metadata, under ``gambeson``, as JSON.

    Args:
        model: a model of :func:`gambeson.models.create`; for the two programs any module from pixels to logits.
        path: the file.
        to: see above.
        example: (1, C, H, W), needed only for a module without a card.

    Raises:
        UserError: the model cannot be traced, an extra is missing, or an example is needed.
        OutOfSpace: the file could not be written.
    """
    if to not in TARGETS:
        raise UserError(f"export to {to!r}: choose one of {', '.join(TARGETS)}")
    if to == "safetensors":
        _bare(model, path)
        return
    program = _traced(model, example)
    if to == "onnx":
        _onnx(program, path)
        return
    scratch = io.BytesIO()
    torch.export.save(program, scratch)
    write_bytes(path, scratch.getvalue())


def _traced(model: nn.Module, example: torch.Tensor | None) -> torch.export.ExportedProgram:
    if example is None:
        card = getattr(model, "card", None)
        if not isinstance(card, ModelCard):
            raise UserError(f"to export a {type(model).__name__} an example image is needed: pass one, (1, C, H, W)")
        example = torch.full((1, card.in_channels, *card.image_size), 0.5)
    kind = next(model.parameters(), torch.zeros(0))
    images = example.to(kind).expand(2, -1, -1, -1).contiguous()  # a batch of one would be specialised
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        with _quiet():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # tracing fails in many ways
        raise UserError(
            f"{_title(model)} cannot be exported ({type(error).__name__}: {one_line(error)}): torch.export follows no "
            "Python that depends on pixel values; rewrite that part, or export its weights by --to safetensors"
        ) from None
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    program.example_inputs = None  # they would be stored as a pickle
    return program


def _onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        required(package, "export to ONNX")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        scratch = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                program,
                (),
                str(scratch),
                input_names=["pixels"],
                output_names=["logits"],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            raise UserError(
                f"ONNX cannot express this model ({type(error).__name__}: {one_line(error)}): use torch-export instead"
            ) from None
        write_bytes(path, scratch.read_bytes())


def _bare(model: nn.Module, path: Path) -> None:
    if not isinstance(model, PixelModel):
        raise UserError(f"a {type(model).__name__} has no card: save its state_dict by safetensors.torch.save_file")
    about: dict[str, Any] = {"exported": model.card.plain(), "torch": str(torch.__version__)}
    body = model.body.model if isinstance(model.body, as_logits) else model.body
    save_tensors(path, body.state_dict(), about)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _title(model: nn.Module) -> str:
    return model.card.name if isinstance(model, PixelModel) else type(model).__name__
