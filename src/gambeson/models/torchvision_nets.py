"""torchvision's architectures for classification and segmentation, with random or published weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, one_line, unknown_name
from gambeson.models.outputs import as_logits

PREFIX = "torchvision:"
_LARGEST_SEARCHED = 512
# Exceptions of torchvision and torch for unsupported image sizes.
_SIZE_ERRORS = (RuntimeError, ValueError, AssertionError)


def known() -> list[str]:
    """Names of torchvision's architectures for classification and segmentation, without the prefix.

    Raises:
        UserError: torchvision is missing or does not fit the installed torch.
    """
    models = _torchvision_models()
    return [*models.list_models(module=models), *_segmentation(models)]


def build(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool = True
) -> nn.Module:
    """Build ``torchvision:NAME`` with random weights, or ``torchvision:NAME@WEIGHTS`` with torchvision's.

    Other channel counts than 3 get a new first convolution, drawn so that its outputs keep their standard deviation.
    Nothing works in place, so that hooks see the true outputs. Auxiliary heads are removed, as no defence here trains
    on them; of a file that holds their weights these are left out. Segmentation models return the logits of every
    pixel, which they upsample themselves.

    Args:
        name: with the prefix.
        in_channels: channels of an image; 3 with WEIGHTS.
        classes: number of logits; with WEIGHTS, theirs.
        image_size: (H, W); checked once on the meta device.
        pretrained: False builds ``NAME@WEIGHTS`` without downloading the weights, for a file that contains its own.

    Raises:
        UserError: unknown name or weights; weights for other classes or channels; an unsupported image size; weights
            that cannot be downloaded; a torchvision that does not work.
    """
    models = _torchvision_models()
    arch, weights_name = _split(name)
    weights = _weights(models, arch, weights_name) if weights_name and pretrained else None
    if weights_name and in_channels != 3:
        raise UserError(f"{name} has weights for 3 channels, not {in_channels}: leave out @{weights_name}")
    if weights is not None and classes != len(weights.meta["categories"]):
        raise UserError(
            f"{name} has weights for {len(weights.meta['categories'])} classes, not {classes}: leave out "
            f"@{weights_name}, or create it without classes and replace its last layer"
        )
    settings = _settings(name, arch, image_size, weights is not None)
    try:
        body: nn.Module = models.get_model(arch, weights=weights, num_classes=classes, **settings)
    except OSError as error:
        raise UserError(
            f"the weights of {name} could not be fetched ({error}): check the network, or leave out @{weights_name}"
        ) from error
    except _SIZE_ERRORS as error:
        raise UserError(
            f"{name} cannot be built for {image_size[0]}x{image_size[1]} images ({one_line(error)}): "
            "choose another image_size, such as 224"
        ) from error
    if hasattr(body, "aux_logits"):
        body.aux_logits = False  # type: ignore[assignment]
    for head in ("AuxLogits", "aux_classifier"):
        if hasattr(body, head):
            setattr(body, head, None)
    body.auxiliary = ("AuxLogits.", "aux_classifier.", "aux1.", "aux2.")  # type: ignore[assignment]
    if in_channels != 3:
        _change_channels(body, in_channels)
    for module in body.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    _check_size(name, body, in_channels, image_size, fixed="image_size" in settings or "input_size" in settings)
    return as_logits(body, "out") if arch in _segmentation(models) else body


def weights_defaults(name: str) -> dict[str, Any]:
    """Return the settings that ``torchvision:NAME@WEIGHTS`` was trained with, as keywords of ``create``."""
    arch, weights_name = _split(name)
    if not weights_name:
        return {}
    weights = _weights(_torchvision_models(), arch, weights_name)
    preset = weights.transforms()
    side = int(getattr(preset, "crop_size", preset.resize_size)[0])  # segmentation models are not given a crop
    return {
        "in_channels": 3,
        "classes": len(weights.meta["categories"]),
        "image_size": (side, side),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def _torchvision_models() -> Any:
    try:
        import torchvision.models as models
    except ImportError as error:
        raise UserError(f"torchvision cannot be imported ({error}): pip install torchvision") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise UserError(
            f"torch and torchvision come from different builds: install both from the same source ({one_line(error)})"
        ) from error
    return models


def _segmentation(models: Any) -> list[str]:
    return list(models.list_models(module=models.segmentation))


def _split(name: str) -> tuple[str, str]:
    arch, at, weights = name.removeprefix(PREFIX).partition("@")
    if arch not in (listed := known()):
        raise unknown_name("torchvision model", arch, listed)
    if at and not weights:
        raise UserError(f"{name} names no weights after @: write {PREFIX}{arch}@DEFAULT or leave out the @")
    return arch, weights


def _weights(models: Any, arch: str, weights_name: str) -> Any:
    offered = models.get_model_weights(arch).__members__
    if weights_name not in offered:
        raise unknown_name(f"weights of {PREFIX}{arch}", weights_name, offered)
    return offered[weights_name]


def _settings(name: str, arch: str, image_size: tuple[int, int], fetching: bool) -> dict[str, Any]:
    if arch.startswith("vit_"):
        if image_size[0] != image_size[1]:
            raise UserError(f"{name} takes square images, not {image_size[0]}x{image_size[1]}: choose one side")
        return {"image_size": image_size[0]}
    if arch.startswith("maxvit"):
        return {"input_size": image_size}
    if arch in ("googlenet", "inception_v3") and not fetching:
        # torchvision's weights for these two expect another normalisation, done inside the network.
        return {"aux_logits": False, "init_weights": True, "transform_input": "@" in name}
    return {"weights_backbone": None} if arch in _segmentation(_torchvision_models()) else {}


def _change_channels(body: nn.Module, in_channels: int) -> None:
    path, old = next(
        (path, module)
        for path, module in body.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    )
    settings: dict[str, Any] = {
        key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    new = nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **settings)
    with torch.no_grad():
        new.weight.normal_(0.0, float(old.weight.std()) * (3 / in_channels) ** 0.5)
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, leaf = path.rpartition(".")
    setattr(body.get_submodule(parent), leaf, new)


def _check_size(name: str, body: nn.Module, in_channels: int, image_size: tuple[int, int], fixed: bool) -> None:
    """Run shapes through the body; if they do not fit, find the smallest side that does."""
    failure = _shape_failure(body, in_channels, image_size)
    if failure is None:
        return
    given = f"{image_size[0]}x{image_size[1]}"
    if fixed:
        raise UserError(f"{name} cannot take {given} images ({one_line(failure)}): choose another image_size")
    smallest = _first_true(lambda side: _shape_failure(body, in_channels, (side, side)) is None, _LARGEST_SEARCHED)
    if smallest is None or min(image_size) >= smallest:
        raise UserError(f"{name} cannot take {given} images ({one_line(failure)}): choose another image_size")
    raise UserError(f"{name} cannot take {given} images: the smallest it takes are {smallest}x{smallest}")


def _shape_failure(body: nn.Module, in_channels: int, image_size: tuple[int, int]) -> Exception | None:
    shapes = {key: value.detach().to("meta") for key, value in (*body.named_parameters(), *body.named_buffers())}
    training = {module: module.training for module in body.modules()}
    body.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(body, shapes, (torch.empty(2, in_channels, *image_size, device="meta"),))
    except _SIZE_ERRORS as error:
        return error
    finally:
        for module, flag in training.items():
            module.training = flag
    return None


def _first_true(holds: Callable[[int], bool], high: int) -> int | None:
    low = 0
    if not holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
