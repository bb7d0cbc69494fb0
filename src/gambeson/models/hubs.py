"""Image classifiers of timm and transformers, with the normalisation of their configurations."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from gambeson.base import UserError, unknown_name
from gambeson.models.pixel_model import as_logits

TIMM, TRANSFORMERS = "timm:", "transformers:"


def defaults(name: str) -> dict[str, Any]:
    """Return the configuration of ``timm:…`` or ``transformers:…`` as keywords of ``create``.

    Always the normalisation; channels, classes and image size if the name includes trained weights.

    Raises:
        UserError: the library is not installed, or the name is unknown or cannot be downloaded.
    """
    return _timm_defaults(name) if name.startswith(TIMM) else _transformers_defaults(name)


def build(name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool) -> nn.Module:
    """Build ``timm:NAME``, ``timm:NAME@TAG`` or ``transformers:NAME_OR_PATH``.

    Trained weights with another number of classes get a new last layer, drawn from torch's global generator.

    Args:
        name: ``timm:NAME`` has random weights; ``timm:NAME@TAG`` (or timm's own ``NAME.TAG``) those of the tag, and
            ``@DEFAULT`` those of timm's first tag. ``transformers:`` takes a model of the hub or a folder, and its
            weights (safetensors alone).
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.
        pretrained: False downloads no weights, for a file that contains its own.

    Raises:
        UserError: the library is not installed, the name is unknown, or the weights cannot be downloaded.
    """
    make = _timm if name.startswith(TIMM) else _transformers
    body = make(name, in_channels, classes, image_size, pretrained)
    for module in body.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return body.train()


def required(package: str, name: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        UserError: it is not installed or does not work; the message has the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = "is not installed" if error.name == package else f"cannot be imported ({_line(error)})"
        extra = "onnx" if package.startswith("onnx") else package
        raise UserError(f"{name} needs {package}, which {reason}: pip install 'gambeson[{extra}]'") from None


def _timm_name(name: str) -> tuple[Any, str, str]:
    timm = required("timm", name)
    arch, at, tag = name.removeprefix(TIMM).partition("@")
    if not at:
        arch, _, tag = arch.partition(".")
    if not timm.is_model(arch):
        raise unknown_name("timm model", arch, timm.list_models())
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*") + timm.list_pretrained(arch)]
    tags = [known for known in dict.fromkeys(tags) if known]
    if tag == "DEFAULT":
        tag = timm.get_pretrained_cfg(arch).tag
    elif (tag or at) and tag not in tags:
        raise unknown_name(f"weights of {TIMM}{arch}", tag, [*tags, "DEFAULT"])
    return timm, arch, tag


def _timm_defaults(name: str) -> dict[str, Any]:
    timm, arch, tag = _timm_name(name)
    config = timm.get_pretrained_cfg(f"{arch}.{tag}" if tag else arch)
    found: dict[str, Any] = {"mean": tuple(config.mean), "std": tuple(config.std)} if config is not None else {}
    if tag:
        channels, height, width = config.input_size
        found |= {"in_channels": channels, "classes": config.num_classes, "image_size": (height, width)}
    return found


def _timm(name: str, in_channels: int, classes: int, image_size: tuple[int, int], pretrained: bool) -> nn.Module:
    timm, arch, tag = _timm_name(name)
    config = timm.get_pretrained_cfg(f"{arch}.{tag}" if tag else arch)
    settings: dict[str, Any] = {"img_size": image_size} if getattr(config, "fixed_input_size", False) else {}
    full = f"{arch}.{tag}" if tag else arch
    try:
        body: nn.Module = timm.create_model(
            full, pretrained=bool(tag) and pretrained, num_classes=classes, in_chans=in_channels, **settings
        )
    except OSError as error:
        raise UserError(
            f"the weights of {name} could not be fetched ({_line(error)}): check the network, or write {TIMM}{arch}"
        ) from None
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"{name} cannot be built for {in_channels} channels of {image_size[0]}x{image_size[1]} ({_line(error)}): "
            "choose another architecture or other images"
        ) from None
    return body


def _config(name: str) -> Any:
    transformers = required("transformers", name)
    try:
        return transformers.AutoConfig.from_pretrained(name.removeprefix(TRANSFORMERS), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be read ({_line(error)}): name a folder with config.json, or a model of the hub that "
            "can be reached"
        ) from None


def _transformers_defaults(name: str) -> dict[str, Any]:
    config = _config(name)
    found: dict[str, Any] = {"in_channels": getattr(config, "num_channels", 3), "classes": config.num_labels}
    prepared = _processor(name)
    crop = prepared.get("crop_size") if prepared.get("do_center_crop") else None
    if size := _side(crop) or _side(getattr(config, "image_size", None)) or _side(prepared.get("size")):
        found["image_size"] = size
    return found | _normalisation(prepared)


def _processor(name: str) -> dict[str, Any]:
    processing = importlib.import_module("transformers.image_processing_base")
    try:
        settings, _ = processing.ImageProcessingMixin.get_image_processor_dict(name.removeprefix(TRANSFORMERS))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} has no preprocessor_config.json ({_line(error)}), so its normalisation is not known: add the "
            "file, or wrap the model by a function of your own (FILE.py:FUNCTION) that normalises"
        ) from None
    return dict(settings)


def _normalisation(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a processor's rescaling, offset and normalisation to mean and std in pixel space."""
    factor = 255 * float(prepared.get("rescale_factor", 1 / 255)) if prepared.get("do_rescale", True) else 255.0
    shift = 1.0 if prepared.get("rescale_offset") else 0.0  # ViViT and EfficientNet map to [-1, 1]
    normal = prepared.get("do_normalize", True) and "image_mean" in prepared
    means = prepared["image_mean"] if normal else [0.0]
    deviations = prepared["image_std"] if normal else [1.0]
    means = means if isinstance(means, list | tuple) else [means]
    deviations = deviations if isinstance(deviations, list | tuple) else [deviations]
    mean = tuple((value + shift) / factor for value in means)
    std = tuple(value / factor for value in deviations)
    return {"mean": mean[0] if len(mean) == 1 else mean, "std": std[0] if len(std) == 1 else std}


def _transformers(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int], pretrained: bool
) -> nn.Module:
    config = _config(name)
    known = getattr(config, "num_channels", 3)
    if in_channels != known:
        raise UserError(f"{name} takes {known} channels, not {in_channels}: choose data and model that fit each other")
    auto = importlib.import_module("transformers").AutoModelForImageClassification
    drawn: list[str] = []
    other = {} if classes == config.num_labels else {"num_labels": classes, "ignore_mismatched_sizes": True}
    try:
        if pretrained:
            place = name.removeprefix(TRANSFORMERS)
            with _silent():
                model, told = auto.from_pretrained(
                    place, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **other
                )
            drawn = sorted(map(str, told["missing_keys"]))
        else:
            config.num_labels = classes
            model = auto.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be loaded as an image classifier ({_line(error)}): name one whose weights are "
            "safetensors"
        ) from None
    body = as_logits(model, "logits")
    body.drawn = drawn  # type: ignore[assignment]  # parameters without weights, checked before the model is evaluated
    return body


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress transformers' progress bars and its report of a new last layer."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _side(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        return _side(size.get("shortest_edge"))
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
