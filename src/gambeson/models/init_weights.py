"""Weights to start from, whoever wrote them and for whichever part of a model."""

from __future__ import annotations

from pathlib import Path

from gambeson.base import load_tensors
from gambeson.models.as_logits import as_logits
from gambeson.models.pixel_model import PixelModel
from gambeson.models.storage import FILE_NAME, load_weights


def init_weights(model: PixelModel, path: Path) -> None:
    """Fill a model, or its body, with the weights of a safetensors file.

    This library's files name the parameters of the whole model; those of timm, torchvision, transformers and of
    ``gambeson export --to safetensors`` name the architecture's alone. The names decide.

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
