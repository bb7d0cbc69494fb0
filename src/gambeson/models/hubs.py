"""Models of timm, transformers, segmentation_models_pytorch and the Hugging Face hub, with their normalisation.

``hf://OWNER/NAME``, ``hf://OWNER/NAME@REVISION`` and a folder with ``config.json`` and ``model.safetensors`` hold the
format of timm or of transformers, which the configuration tells.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gambeson.base import UserError, one_line, read_json, required, unknown_name
from gambeson.models.normalisation import IMAGENET
from gambeson.models.outputs import as_logits, at_image_size

TIMM, TRANSFORMERS, HUB, SMP = "timm:", "transformers:", "hf://", "smp:"
PREFIXES = (TIMM, TRANSFORMERS, HUB, SMP)
_FOLDER = "local-dir:"
"""timm's prefix of a folder."""
_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors*"]
"""What is fetched of a repository: no pickle, no code."""


def is_folder(place: str) -> bool:
    """Whether this is a folder in the hub's layout."""
    return (Path(place).expanduser() / "config.json").is_file()


def canonical(name: str) -> str:
    """Return a name with the absolute path where it names a folder; such a folder alone becomes ``hf://FOLDER``."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    place = Path(name.removeprefix(prefix)).expanduser()
    if (prefix in (TRANSFORMERS, HUB) and place.is_dir()) or (not prefix and is_folder(name)):
        return f"{prefix or HUB}{place.absolute()}"
    return name


def defaults(name: str) -> dict[str, Any]:
    """Return the configuration of ``timm:…``, ``transformers:…``, ``hf://…`` or ``smp:…`` as keywords of ``create``.

    Always the normalisation; channels, classes and image size if the name includes trained weights.

    Raises:
        UserError: the library is not installed, or the name is unknown or cannot be downloaded.
    """
    name = _resolved(name)
    if name.startswith(SMP):
        return _smp_defaults(name)
    return _timm_defaults(name) if name.startswith(TIMM) else _transformers_defaults(name)


def build(name: str, in_channels: int, classes: int, image_size: tuple[int, int], *, pretrained: bool) -> nn.Module:
    """Build ``timm:NAME[@TAG]``, ``transformers:NAME_OR_PATH``, ``hf://NAME_OR_PATH`` or ``smp:ARCH/ENCODER[@TAG]``.

    Trained weights with another number of classes get a new last layer, drawn from torch's global generator.

    Args:
        name: ``timm:NAME`` has random weights; ``timm:NAME@TAG`` (or timm's own ``NAME.TAG``) those of the tag, and
            ``@DEFAULT`` those of timm's first tag. ``transformers:`` and ``hf://`` take a model of the hub or a folder,
            and its weights (safetensors alone). ``smp:`` has random weights, and with ``@TAG`` an encoder that is
            trained, as in ``smp:Unet/resnet18@imagenet``.
        in_channels: channels of an image.
        classes: number of logits.
        image_size: (H, W) in pixels.
        pretrained: False loads no weights, for a file that contains its own.

    Raises:
        UserError: the library is not installed, the name is unknown, or the weights cannot be downloaded.
    """
    name = _resolved(name)
    make = _smp if name.startswith(SMP) else _timm if name.startswith(TIMM) else _transformers
    body = make(name, in_channels, classes, image_size, pretrained)
    for module in body.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return body.train()


def _resolved(name: str) -> str:
    """Return ``hf://…`` as the folder of one of the two libraries; other names are unchanged."""
    if not name.startswith(HUB):
        return name
    place = Path(name.removeprefix(HUB))
    folder = place if is_folder(str(place)) else _fetched(name)
    config = read_json(folder / "config.json")
    if "architecture" in config:
        return f"{TIMM}{_FOLDER}{folder}"
    if "model_type" in config:
        return f"{TRANSFORMERS}{folder}"
    raise UserError(
        f"{folder}/config.json has neither an `architecture`, as timm writes, nor a `model_type`, as transformers "
        "writes: name a model of one of the two, or build it by a function of your own (FILE.py:FUNCTION)"
    )


@cache
def _fetched(name: str) -> Path:
    hub = required("huggingface_hub", name)
    place, _, revision = name.removeprefix(HUB).partition("@")
    if Path(place).is_dir():
        raise UserError(f"{place or name} has no config.json: name a folder or a model of timm or transformers")
    try:
        folder = Path(hub.snapshot_download(place, revision=revision or None, allow_patterns=_FILES))
    except Exception as error:  # of many types: no network, no such name, no permission
        raise UserError(
            f"{name} could not be fetched ({type(error).__name__}: {one_line(error)}): check the name and the network, "
            "or name a folder with its config.json and model.safetensors"
        ) from None
    if not is_folder(str(folder)):
        raise UserError(f"{name} has no config.json: name a folder or a model of timm or transformers")
    return folder


def _timm_folder(name: str) -> tuple[Any, dict[str, Any]]:
    """Return timm and the configuration of ``timm:local-dir:FOLDER``, which is empty for other names."""
    timm, place = required("timm", name), name.removeprefix(TIMM)
    if not place.startswith(_FOLDER):
        return timm, {}
    config = read_json(Path(place.removeprefix(_FOLDER)) / "config.json")
    if not timm.is_model(config["architecture"]):
        raise unknown_name("timm model", config["architecture"], timm.list_models())
    return timm, config.get("pretrained_cfg", config) | {"num_classes": config.get("num_classes", 1000)}


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
    _, own = _timm_folder(name)
    if own:
        if missing := [key for key in ("mean", "std", "input_size") if key not in own]:
            raise UserError(f"the config.json of {name} has no {' and no '.join(missing)}, so its input is not known")
        channels, height, width = own["input_size"]
        return {
            "mean": tuple(own["mean"]),
            "std": tuple(own["std"]),
            "in_channels": channels,
            "classes": own["num_classes"],
            "image_size": (height, width),
        }
    timm, arch, tag = _timm_name(name)
    config = timm.get_pretrained_cfg(f"{arch}.{tag}" if tag else arch)
    found: dict[str, Any] = {"mean": tuple(config.mean), "std": tuple(config.std)} if config is not None else {}
    if tag:
        channels, height, width = config.input_size
        found |= {"in_channels": channels, "classes": config.num_classes, "image_size": (height, width)}
    return found


def _timm(name: str, in_channels: int, classes: int, image_size: tuple[int, int], pretrained: bool) -> nn.Module:
    timm, own = _timm_folder(name)
    if own:
        full, trained, fixed = name.removeprefix(TIMM), True, own.get("fixed_input_size", False)
    else:
        _, arch, tag = _timm_name(name)
        full, trained = f"{arch}.{tag}" if tag else arch, bool(tag)
        fixed = getattr(timm.get_pretrained_cfg(full), "fixed_input_size", False)
    settings: dict[str, Any] = {"img_size": image_size} if fixed else {}
    try:
        body: nn.Module = timm.create_model(
            full, pretrained=trained and pretrained, num_classes=classes, in_chans=in_channels, **settings
        )
    except OSError as error:
        raise UserError(
            f"the weights of {name} could not be fetched ({one_line(error)}): check the network, or write "
            f"{TIMM}{full.partition('.')[0]}"
        ) from None
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"{name} cannot be built for {in_channels} channels of {image_size[0]}x{image_size[1]} ({one_line(error)}):"
            " choose another architecture or other images"
        ) from None
    return body


def _smp_parts(name: str) -> tuple[Any, str, str, str]:
    smp = required("segmentation_models_pytorch", name)
    arch, _, rest = name.removeprefix(SMP).partition("/")
    encoder, _, tag = rest.partition("@")
    known = smp.MODEL_ARCHITECTURES_MAPPING
    if arch.lower() not in known:
        raise unknown_name(
            "architecture of segmentation_models_pytorch", arch, [cls.__name__ for cls in known.values()]
        )
    if not encoder:
        raise UserError(f"{name} names no encoder: write one after a slash, as in {SMP}{arch}/resnet18")
    if not encoder.startswith("tu-") and encoder not in smp.encoders.get_encoder_names():  # tu- are those of timm
        raise unknown_name("encoder of segmentation_models_pytorch", encoder, smp.encoders.get_encoder_names())
    return smp, arch.lower(), encoder, tag


def _smp_defaults(name: str) -> dict[str, Any]:
    """What trained encoders expect, which is that of ImageNet almost without exception."""
    smp, _, encoder, tag = _smp_parts(name)
    if not tag:
        return dict(zip(("mean", "std"), IMAGENET, strict=True))
    with _fetching(name):
        told = smp.encoders.get_preprocessing_params(encoder, tag)
    scale = max(told["input_range"] or (0, 1))
    return {key: tuple(value / scale for value in told[key]) for key in ("mean", "std")}


def _smp(name: str, in_channels: int, classes: int, image_size: tuple[int, int], pretrained: bool) -> nn.Module:
    smp, arch, encoder, tag = _smp_parts(name)
    with _fetching(name):
        body: nn.Module = smp.create_model(
            arch, encoder, encoder_weights=tag if tag and pretrained else None, in_channels=in_channels, classes=classes
        )
    return body


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many types: no network, no such weights, an encoder that fits no such decoder
        raise UserError(
            f"{name} cannot be built ({type(error).__name__}: {one_line(error)}): check the network, or choose another "
            "architecture, encoder or weights"
        ) from None


def _config(name: str) -> Any:
    transformers = required("transformers", name)
    try:
        return transformers.AutoConfig.from_pretrained(name.removeprefix(TRANSFORMERS), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be read ({one_line(error)}): name a folder with config.json, or a model of the hub that "
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
        reason = "" if Path(name.removeprefix(TRANSFORMERS)).is_dir() else f" ({one_line(error)})"
        raise UserError(
            f"{name} has no preprocessor_config.json{reason}, so its normalisation is not known: add the file, with "
            "the mean and deviation that it was trained with, such as "
            '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, '
            "or wrap the model by a function of your own (FILE.py:FUNCTION) that normalises"
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
    built = " ".join(config.architectures or ())
    task = next((task for task in ("SemanticSegmentation", "UniversalSegmentation") if task in built), None)
    auto = getattr(importlib.import_module("transformers"), f"AutoModelFor{task or 'ImageClassification'}")
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
            f"{name} could not be loaded as a model for {task or 'image classification'} ({one_line(error)}): name one "
            "whose weights are safetensors"
        ) from None
    body = SemanticMasks(model, "masks") if task == "UniversalSegmentation" else as_logits(model, "logits")
    body.drawn = drawn  # type: ignore[assignment]  # parameters without weights, checked before the model is evaluated
    return body


class SemanticMasks(as_logits):
    """The semantic answer of a model that predicts masks, such as Mask2Former (Cheng et al. 2022, arXiv 2112.01527).

    Each query has class probabilities p, without those of "no object", and a mask m, the sigmoid of its logits
    upsampled to the image as in :func:`gambeson.models.at_image_size`. The score of class c at a pixel is the sum of
    p_c m over the queries (Cheng et al. 2021, arXiv 2107.06278, section 3.4); its logarithm is returned as the logit,
    whose softmax are the scores divided by their sum.

    Wraps a model of transformers for universal segmentation.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K, H, W) of images (N, C, H, W)."""
        answer = self.model(images)
        classes = answer.class_queries_logits.softmax(-1)[..., :-1]
        masks = at_image_size(answer.masks_queries_logits, images).sigmoid()
        scores = torch.einsum("nqk,nqhw->nkhw", classes, masks)
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()


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
