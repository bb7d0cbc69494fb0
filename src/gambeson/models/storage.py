"""Saving and loading of models, as self-contained safetensors files with the card inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, load_tensors, save_tensors, seeded
from gambeson.models.factory import build
from gambeson.models.pixel_model import ModelCard, PixelModel, as_logits

FILE_NAME = "model.safetensors"
_WRAPPERS = ("_orig_mod.", "module.")  # prefixes added by torch.compile and data parallel


def save(model: PixelModel, path: Path, about: dict[str, Any] | None = None) -> None:
    """Write a model to one safetensors file, atomically.

    Args:
        model: a model of :func:`gambeson.models.create`; compiled and data-parallel ones are unwrapped.
        path: the file.
        about: JSON-ready metadata to store with the card, under ``"about"``.

    Raises:
        UserError: not such a model.
        OutOfSpace: the file could not be written.
    """
    inner: nn.Module = model
    while not isinstance(inner, PixelModel):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise UserError(f"a {type(inner).__name__} has no card: pass a model of models.create, or use safetensors")
        inner = wrapped
    save_tensors(Path(path), inner.state_dict(), {"card": inner.card.plain(), "about": about or {}})


def load(path: Path) -> PixelModel:
    """Load a model written by :func:`save`, bit for bit, on the CPU and in evaluation mode.

    Nothing is downloaded, and torch's global generators are not changed.

    Args:
        path: the file, or the folder of a run with ``model.safetensors``.

    Raises:
        UserError: the file is missing, a pickle or truncated, has no card, or its weights do not fit it.
    """
    path = _file(path)
    tensors, document = load_tensors(path)
    card = _card(document, path)
    with seeded(0, "load"):  # these weights are replaced, and the caller's generator must not advance
        model = build(card, pretrained=False)
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())
    _fill(model, tensors, f"the weights of {path} do not fit its own card ({card.name})", "copy the file again")
    return model.eval()


def read_card(path: Path) -> ModelCard:
    """Read the card of a model written by :func:`save`.

    Raises:
        UserError: as :func:`load`.
    """
    path = _file(path)
    return _card(load_tensors(path)[1], path)


def _card(document: dict[str, Any], path: Path) -> ModelCard:
    if "card" not in document:
        raise UserError(
            f"{path} holds weights but no model card: build the architecture by name with models.create "
            "and fill it with models.load_weights"
        )
    try:
        return ModelCard(**document["card"])
    except (TypeError, UserError) as error:
        raise UserError(
            f"the model card of {path} cannot be read ({error}): use the version of gambeson that wrote it"
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights of the same architecture from any safetensors file into ``model``.

    Values are converted to the model's dtype and device. The prefixes of ``torch.compile`` and data parallel are
    ignored. On an error the model is unchanged.

    Args:
        model: any module.
        path: the file, or the folder of a run with ``model.safetensors``.

    Raises:
        UserError: the file is missing, a pickle or truncated, or names or shapes differ.
    """
    path = _file(path)
    tensors, _ = load_tensors(path)
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    body = getattr(model, "body", None)
    if isinstance(body, nn.Module) and set(tensors) == set(body.state_dict()):
        advice = "the names are those of the body, so load them into model.body"
    else:
        advice = "create the architecture the file was written from"
    _fill(model, tensors, f"the weights of {path} do not fit this {_title(model)}", advice)


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], problem: str, advice: str) -> None:
    own = model.state_dict()
    faults = [
        _listed("missing", [name for name in own if name not in tensors]),
        _listed("unexpected", [name for name in tensors if name not in own]),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
    ]
    if any(faults):
        raise UserError(f"{problem}: {'; '.join(fault for fault in faults if fault)}; {advice}")
    model.load_state_dict(tensors)


def _listed(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return f"{what} {', '.join(entries[:3])}{more}"


def _title(model: nn.Module) -> str:
    return model.card.name if isinstance(model, PixelModel) else type(model).__name__


def _file(path: Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def init_weights(model: PixelModel, path: Path) -> None:
    """Load weights from a safetensors file into a model or its body.

    This library's files name the parameters of the whole model; those of timm, torchvision, transformers and of
    ``gambeson export --to safetensors`` name the architecture's alone. The names decide which one it is.

    Args:
        model: a model of :func:`gambeson.models.create`.
        path: the file, or the folder of a run.

    Raises:
        UserError: the file is missing, a pickle or truncated, or names or shapes fit no part of the model.
    """
    path = path / FILE_NAME if path.is_dir() else path
    tensors, _ = load_tensors(path)
    inner = [model.body.model] if isinstance(model.body, as_logits) else []
    for part in (model.body, *inner):
        if set(tensors) == set(part.state_dict()):
            load_weights(part, path)
            return
    load_weights(model, path)
