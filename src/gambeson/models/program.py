"""``torch.export`` programs as models."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from gambeson.base import UserError
from gambeson.models.pixel_model import ModelCard, PixelModel

SUFFIX = ".pt2"


class Program(nn.Module):
    """A ``torch.export`` program as a module from pixels (N, C, H, W) in [0, 1] to logits.

    Training mode has no effect on it.

    Attributes:
        batch: its fixed batch size; None: any.
        shape: (C, H, W) of an image, with None for a dynamic size.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.batch, self.shape = _input_of(program)
        self.graph = program.module()
        for method in ("train", "eval"):  # torch.export makes these two raise
            self.graph.__dict__.pop(method, None)

    def forward(self, pixels: torch.Tensor) -> Any:
        """Return the program's output; for a fixed batch size in pieces, the last one padded."""
        if self.batch is None or len(pixels) == self.batch:
            return self.graph(pixels)
        missing = math.ceil(len(pixels) / self.batch) * self.batch - len(pixels)
        padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        return torch.cat([self.graph(piece) for piece in padded.split(self.batch)])[: len(pixels)]


def read_program(path: Path, device: str = "cpu") -> Program:
    """Read a program, see :func:`load_program`, whatever images it takes.

    Raises:
        UserError: no such program.
    """
    try:
        program = torch.export.load(io.BytesIO(_without_pickles(path)))
        return Program(move_to_device_pass(program, device) if device != "cpu" else program)
    except UserError:
        raise
    except Exception as error:  # torch raises many types of errors for unreadable files
        raise UserError(
            f"{path} cannot be read by torch {torch.__version__} ({type(error).__name__}: {_line(error)}): export the "
            "model again, with this version of torch"
        ) from None


def load_program(path: Path, in_channels: int, classes: int, image_size: tuple[int, int], device: str) -> PixelModel:
    """Load a ``torch.export`` program (.pt2) that maps pixels in [0, 1] to logits.

    Pickles in the file are never opened: the pickled sample inputs are skipped, and a file with pickled weights or
    constants, or with compiled code, is refused. Torch reads the rest, so load only files from trusted sources.

    Args:
        path: the file.
        in_channels: channels of the images.
        classes: expected number of logits.
        image_size: (H, W) of those images.
        device: of the program.

    Raises:
        UserError: no such program, or it does not accept these images or return such logits.
    """
    model = read_program(path, device)
    wanted = (in_channels, *image_size)
    if any(known not in (None, size) for known, size in zip(model.shape, wanted, strict=True)):
        sides = "x".join("any" if side is None else str(side) for side in model.shape)
        raise UserError(
            f"{path} takes images of {sides}, but the data have {'x'.join(map(str, wanted))}: choose data that fit it"
        )
    with torch.no_grad():
        try:
            found = model(torch.full((2, *wanted), 0.5, device=torch.device(device)))
        except Exception as error:
            raise UserError(f"{path} cannot take two images of the data ({_line(error)}): export it for them") from None
    if not isinstance(found, torch.Tensor) or found.ndim not in (2, 4) or tuple(found.shape[:2]) != (2, classes):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(
            f"{path} returned {shape} for two images: expected logits (2, {classes}), for the data have {classes} "
            "classes; choose data and model that fit each other"
        )
    card = ModelCard(
        name=str(path.absolute()),
        in_channels=in_channels,
        classes=classes,
        image_size=image_size,
        mean=(0.0,) * in_channels,
        std=(1.0,) * in_channels,
    )
    return PixelModel(card, model).eval()


def _input_of(program: torch.export.ExportedProgram) -> tuple[int | None, tuple[int | None, ...]]:
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[str(name)].meta["val"] for name in names if str(name) in nodes]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor) or values[0].ndim != 4:
        raise UserError(
            f"the program takes {len(names)} inputs: expected one tensor of images (N, C, H, W); export a model that "
            "takes the images alone"
        )
    sides = [side if isinstance(side, int) else None for side in values[0].shape]
    return sides[0], tuple(sides[1:])


def _without_pickles(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is no program of torch.export ({_line(error)}): write one by torch.export.save"
        ) from None
    if not any(name.endswith("/archive_format") for name in entries):
        raise UserError(
            f"{path} is no program of torch.export as torch 2.8 and later write them: write one by torch.export.save"
        )
    for name, content in entries.items():
        inside = name.partition("/")[2]
        if inside.startswith("data/sample_inputs/"):
            entries[name] = b""
        elif inside.startswith("data/aotinductor") or "custom_obj" in inside or "opaque_obj" in inside:
            raise UserError(f"{path} holds {inside}, which can run code when it is loaded: export the plain model")
        elif inside.endswith((".pt", ".pkl")) or (inside.endswith("_config.json") and _pickled(content)):
            raise UserError(
                f"{path} holds pickled tensors, which can run code when they are opened and are never loaded here: "
                "export the model with plain tensors"
            )
    scratch = io.BytesIO()
    with zipfile.ZipFile(scratch, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return scratch.getvalue()


def _pickled(content: bytes) -> bool:
    return any(entry.get("use_pickle") for entry in json.loads(content)["config"].values())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
