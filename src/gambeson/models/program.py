"""Graphs from files as models with gradients: ``torch.export`` programs, and ONNX files that onnx2torch converts."""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from gambeson.base import UserError, generator, one_line, refuse_pointer, required
from gambeson.data import Shape
from gambeson.models.black_box.local import OnnxModel
from gambeson.models.external import tried
from gambeson.models.outputs import PROBABILITIES, SIGMOID, as_logits
from gambeson.models.pixel_model import ModelCard, PixelModel

SUFFIX = ".pt2"


class Program(nn.Module):
    """A graph as a module from pixels (N, C, H, W) in [0, 1] to logits.

    Training mode has no effect on it.

    Attributes:
        graph: the graph.
        batch: its fixed batch size, in which it is run, the last one padded; None: any.
        shape: (C, H, W) of an image, with None for a dynamic size.
        take: what pixels pass through first.
    """

    def __init__(
        self,
        graph: nn.Module,
        batch: int | None,
        shape: Shape,
        take: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.batch, self.shape, self.take = graph, batch, shape, take or nn.Identity()

    def forward(self, pixels: torch.Tensor) -> Any:
        """Return the graph's output; for a fixed batch size in pieces."""
        if self.batch is None or len(pixels) == self.batch:
            return self.graph(self.take(pixels))
        missing = math.ceil(len(pixels) / self.batch) * self.batch - len(pixels)
        padded = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        return torch.cat([self.graph(self.take(piece)) for piece in padded.split(self.batch)])[: len(pixels)]


def read_program(path: Path, device: str = "cpu") -> Program:
    """Read a program, see :func:`load_program`, whatever images it takes.

    Raises:
        UserError: no such program.
    """
    try:
        program = torch.export.load(io.BytesIO(_without_pickles(path)))
        batch, shape = _input_of(program)
        graph = (move_to_device_pass(program, device) if device != "cpu" else program).module()
    except UserError:
        raise
    except Exception as error:  # torch raises many types of errors for unreadable files
        raise UserError(
            f"{path} cannot be read by torch {torch.__version__} ({type(error).__name__}: {one_line(error)}): export "
            "the model again, with this version of torch"
        ) from None
    for method in ("train", "eval"):  # torch.export makes these two raise
        graph.__dict__.pop(method, None)
    return Program(graph, batch, shape)


def load_program(
    path: Path,
    in_channels: int,
    classes: int,
    image_size: tuple[int, int],
    device: str,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
) -> PixelModel:
    """Load a ``torch.export`` program (.pt2) that maps pixels in [0, 1], or normalised ones, to logits.

    Pickles in the file are never opened: the pickled sample inputs are skipped, and a file with pickled weights or
    constants, or with compiled code, is refused. Torch reads the rest, so load only files from trusted sources.

    Args:
        path: the file.
        in_channels: channels of the images.
        classes: expected number of logits.
        image_size: (H, W) of those images.
        device: of the program.
        normalise: mean and standard deviation per channel, if the program takes normalised pixels.

    Raises:
        UserError: no such program, or it does not accept these images or return such logits.
    """
    program = read_program(path, device)
    wanted = (in_channels, *image_size)
    if any(known not in (None, size) for known, size in zip(program.shape, wanted, strict=True)):
        sides = "x".join("any" if side is None else str(side) for side in program.shape)
        raise UserError(
            f"{path} takes images of {sides}, but the data have {'x'.join(map(str, wanted))}: choose data that fit it"
        )
    return _model(path, program, in_channels, classes, image_size, normalise).to(torch.device(device))


def load_onnx(
    path: Path,
    in_channels: int,
    classes: int,
    image_size: tuple[int, int],
    device: str,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
) -> PixelModel:
    """Load an ONNX file as a model with gradients.

    onnx2torch rebuilds the graph from torch's own operations. It is taken only if it gives the scores that onnxruntime
    gives, on random images.

    Args:
        path: the file; its input is described by :class:`gambeson.models.black_box.local.OnnxInput`.
        in_channels: channels of the images.
        classes: expected number of logits.
        image_size: (H, W) of those images.
        device: of the model.
        normalise: mean and standard deviation per channel, if the file takes normalised pixels.

    Raises:
        UserError: a package is missing, the file cannot be read, converted or differentiated, or the scores differ.
    """
    runtime = OnnxModel(path, classes=classes, normalise=normalise)
    entry = runtime.input
    if entry.dtype == torch.uint8:
        raise UserError(f"the input of {path} is uint8, which has no gradient")
    title = f"the gradient of {path}"
    onnx, converter = required("onnx", title), required("onnx2torch", title)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = converter.convert(_understood(onnx, onnx.load(str(path)), runtime.output_index)).float().eval()
    except Exception as error:  # a graph with an operation that onnx2torch does not know
        raise UserError(f"onnx2torch cannot convert {path} ({one_line(error)})") from None
    warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning, r"onnx2torch\.")  # not the user's
    images = torch.rand(4, in_channels, *image_size, generator=generator(0, "onnx"))
    with torch.no_grad():
        right = runtime(images)
    half, certain = entry.dtype == torch.float16, runtime.output == "probabilities"
    program: nn.Module = Program(
        graph, entry.batch, entry.image, (lambda pixels: entry(pixels).float()) if half else entry
    )
    with torch.no_grad():
        single = certain and program(images[:1]).shape[1] == 1
    program = as_logits(program, SIGMOID if single else PROBABILITIES) if certain else program
    model = _model(path, program, in_channels, classes, image_size)
    logits = model(images.requires_grad_())
    if not logits.requires_grad or not bool(torch.autograd.grad(logits.sum(), images, retain_graph=True)[0].any()):
        raise UserError(f"the logits of {path} have no gradient")
    found, right = (logits.detach().softmax(1), right.softmax(1)) if certain else (logits.detach(), right)
    far = float((found - right).abs().max() / right.abs().max().clamp(min=1e-6))
    if not far < (0.02 if half else 1e-3):
        raise UserError(f"onnx2torch converts {path} to another model (its scores differ by {100 * far:.2g} %)")
    return model.to(torch.device(device))


def _understood(onnx: Any, graph: Any, output: int) -> Any:
    """Rewrite an ONNX model in the operations of the versions that onnx2torch knows, with one output."""
    from onnx2torch.node_converters.registry import add_converter, get_converter
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

    body = graph.graph
    kept = body.output[output]
    del body.output[:]
    body.output.append(kept)
    for node in list(body.node):  # some exporters write weights as constants, which onnx2torch does not look for
        if node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] != kept.name:
            body.initializer.append(node.attribute[0].t)
            body.initializer[-1].name = node.output[0]
            body.node.remove(node)
    constants = {entry.name: entry for entry in body.initializer}
    alias: dict[str, str] = {}
    for node in list(body.node):
        for k, name in enumerate(node.input):
            node.input[k] = alias.get(name, name)
        if node.op_type == "Identity" and node.output[0] != kept.name:  # also of weights, which it does not know
            alias[node.output[0]] = node.input[0]
            body.node.remove(node)
        second = constants.get(node.input[1]) if len(node.input) == 2 else None
        values = None if second is None else onnx.numpy_helper.to_array(second)
        if node.op_type == "Reshape" and values is not None and (values != 0).all():
            for attribute in node.attribute:
                if attribute.name == "allowzero":
                    attribute.i = 0  # the same without a zero
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and values is not None:
            node.attribute.append(onnx.helper.make_attribute("axes", values.tolist()))  # as before version 18
            del node.input[1:]
    version = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    for name in {node.op_type for node in body.node if node.domain in ("", "ai.onnx")}:
        since = onnx.defs.get_schema(name, version, "").since_version
        for older in range(since, 0, -1):  # newer versions mostly add types; the scores are compared afterwards
            with suppress(NotImplementedError):
                known = get_converter(name, older)
                with suppress(ValueError):
                    add_converter(name, since)(known)
                break
        else:
            if name == "Gelu":

                def gelu(node: Any, _: Any) -> Any:
                    module = nn.GELU(approximate=node.attributes.get("approximate", "none"))
                    return OperationConverterResult(module, onnx_mapping_from_node(node))

                add_converter(name, since)(gelu)
    return graph


def _model(
    path: Path,
    program: nn.Module,
    in_channels: int,
    classes: int,
    image_size: tuple[int, int],
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
) -> PixelModel:
    mean, std = normalise or ((0.0,) * in_channels, (1.0,) * in_channels)
    card = ModelCard(
        name=str(path.absolute()),
        in_channels=in_channels,
        classes=classes,
        image_size=image_size,
        mean=tuple(mean),
        std=tuple(std),
    )
    return PixelModel(card, tried(str(path), program, in_channels, classes, image_size)).eval()


def _input_of(program: torch.export.ExportedProgram) -> tuple[int | None, Shape]:
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[str(name)].meta["val"] for name in names if str(name) in nodes]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor) or values[0].ndim != 4:
        raise UserError(
            f"the program takes {len(names)} inputs: expected one tensor of images (N, C, H, W); export a model that "
            "takes the images alone"
        )
    sides = [side if isinstance(side, int) else None for side in values[0].shape]
    return sides[0], (sides[1], sides[2], sides[3])


def _without_pickles(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        refuse_pointer(path)
        raise UserError(
            f"{path} is no program of torch.export ({one_line(error)}): write one by torch.export.save"
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
