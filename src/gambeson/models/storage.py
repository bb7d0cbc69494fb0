"""Weights on disk: safetensors files of this library, with the model's card inside, and those that other tools write.

A ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` file is read by ``torch.load(..., weights_only=True)``: nothing of the file
runs, and every class or function that it names is replaced by an empty stand-in.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import nn

from gambeson.base import UserError, load_tensors, one_line, save_tensors, seeded, unused
from gambeson.base.errors import as_text, some
from gambeson.models.factory import build
from gambeson.models.outputs import as_logits
from gambeson.models.pixel_model import ModelCard, PixelModel

FILE_NAME = "model.safetensors"
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".th", ".tar")
"""Of files of weights."""
CLASS_NAMES = "class names"
"""Where the metadata of a trained model have the names of its classes, in its order."""
_WRAPPERS = {"module", "_orig_mod", "model", "net", "network", "body", "backbone"}
"""Parts of names that wrappers add: data parallel, ``torch.compile``, Lightning and the like."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds."""

    path: Path
    groups: dict[str, State]
    """State dicts by the keys they are nested under, with dots; ``""`` is the file itself."""
    document: dict[str, Any]
    """What this library has stored with them; empty for other files."""
    left_out: tuple[str, ...] = ()
    """Names of the classes and functions that a pickle names and that were replaced by stand-ins."""


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


def load(path: Path | Weights) -> PixelModel:
    """Load a model written by :func:`save`, bit for bit, on the CPU and in evaluation mode.

    Nothing is downloaded, and torch's global generators are not changed.

    Args:
        path: the file, the folder of a run with ``model.safetensors``, or what :func:`read_weights` returned.

    Raises:
        UserError: the file is missing or truncated, has no card, or its weights do not fit it.
    """
    if not isinstance(path, Weights) and "@" in str(path) and not Path(path).exists():
        raise UserError(
            f"{path} names an architecture with weights, which are built for data: "
            f"gb.evaluation.load_model({str(path)!r}, 'DATA').model, or load_model(..., dataset=data)"
        )
    weights = path if isinstance(path, Weights) else read_weights(Path(as_text(path)))
    path, tensors, card = weights.path, weights.groups.get("", {}), _card(weights)
    with seeded(0, "load"):  # these weights are replaced, and the caller's generator must not advance
        model = build(card, pretrained=False)
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())
    if faults := _faults(model.state_dict(), tensors, ""):
        raise UserError(f"the weights of {path} do not fit its own card ({card.name}): {faults}; copy the file again")
    model.load_state_dict(tensors)
    return model.eval()


def read_card(path: Path) -> ModelCard:
    """Read the card of a model written by :func:`save`.

    Raises:
        UserError: as :func:`load`.
    """
    return _card(read_weights(path))


def _card(weights: Weights) -> ModelCard:
    path = weights.path
    if "card" not in weights.document:
        raise UserError(
            f"{path} holds weights but no model card: name its architecture too, as in torchvision:resnet18@{path} or "
            f"FILE.py:FUNCTION@{path}, or in Python fill a model of yours with models.load_weights"
        )
    try:
        return ModelCard(**weights.document["card"])
    except (TypeError, UserError) as error:
        raise UserError(
            f"the model card of {path} cannot be read ({error}): use the version of gambeson that wrote it"
        ) from None


def load_weights(model: nn.Module, path: Path | Weights, key: str | None = None) -> None:
    """Fill ``model`` with the weights of a file: safetensors, or a state dict written by ``torch.save``.

    The state dict may be nested (under ``state_dict``, ``model``, ``ema``, …) and its names may begin with the prefixes
    of wrappers; further entries beside it are left out with a warning. The names may be those of the whole model, of
    its body, or of the model inside that. Values are converted to the model's dtype and device. On an error the model
    is unchanged.

    Args:
        model: any module.
        path: the file, or the folder of a run with ``model.safetensors``.
        key: where in the file the state dict is; None: the only one that fits.

    Raises:
        UserError: the file is missing, holds no state dict, or names or shapes differ; or several state dicts fit.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    groups = weights.groups if key is None else {key: _group(weights, key)}
    body = getattr(model, "body", None)
    parts = [model, *([body] if isinstance(body, nn.Module) else [])]
    parts += [part.model for part in parts if isinstance(part, as_logits)]
    for part in parts:
        fits = [(place, *fit) for place, tensors in groups.items() for fit in _fits(part, tensors)]
        if fits:
            break
    else:
        raise _unfit(weights, groups, parts)
    place, prefix, values, others = fits[0]
    for other, other_prefix, theirs, _ in fits[1:]:
        if any(not torch.equal(values[name], theirs[name]) for name in values):
            raise UserError(
                f"{weights.path} holds weights of this model under {_where(place, prefix)} and other ones under "
                f"{_where(other, other_prefix)}: choose by `gambeson convert {weights.path} --key "
                f"{other or other_prefix.rstrip('.')} --to FILE.safetensors`"
            )
    _check_normalisation(model, weights.path, others)
    if others:
        warnings.warn(
            f"{weights.path}: {_listed('left out, as the model has no such part:', list(others))}", stacklevel=2
        )
    part.load_state_dict(part.state_dict() | values)
    if isinstance(model, PixelModel) and part is model:  # the card tells the normalisation that came with the weights
        read = {key: tuple(getattr(model.normalize, key).flatten().tolist()) for key in ("mean", "std")}
        if any(abs(a - b) > 1e-6 for key in read for a, b in zip(read[key], getattr(model.card, key), strict=True)):
            model.card = model.card.model_copy(update=read)


def read_weights(path: Path) -> Weights:
    """Read every state dict of a file; nothing that the file holds is run.

    Args:
        path: safetensors or what ``torch.save`` writes, or the folder of a run with ``model.safetensors``.

    Raises:
        UserError: the file is missing, truncated, or holds no state dict.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a file of weights ({', '.join(ENDINGS)})")
    with path.open("rb") as file:
        head = file.read(16)
    if head[8:9] == b"{" or not (head[:2] == b"PK" or head[:1] == b"\x80"):
        tensors, document = load_tensors(path)
        return Weights(path, {"": tensors}, document)
    content, left_out = _unpickled(path)
    groups = dict(_nested(content))
    if not groups:
        objects = f" of {', '.join(left_out[:3])}" if left_out else ""
        raise UserError(
            f"{path} holds no state dict but other objects{objects}, and only running their code could rebuild a model "
            "from them: where you trust the file, save the state_dict() of what it holds by torch.save, as in "
            f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), {str(_beside(path))!r}), and name "
            f"ARCHITECTURE@{_beside(path)}"
        )
    return Weights(path, groups, {}, left_out)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-state.pth")


class _StandIn:
    """Takes the place of a class or function that a pickle names; it takes anything and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Filled:
    """The same for a class whose objects may hold entries: the entries remain, in a dict."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def _unpickled(path: Path) -> tuple[Any, tuple[str, ...]]:
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, OSError):  # an old format, or no checkpoint: torch.load tells
        named = []
    stand_ins = [(_StandIn if name.startswith("numpy.") else _Filled, name) for name in named]
    try:
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True), tuple(named)
    except Exception as error:  # of many types, for unreadable files
        what = " ".join(str(error).split())
        if "TorchScript" in what:
            advice = (
                "it is a TorchScript archive, which holds code: where you trust it, save its state_dict(), as in "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), {str(_beside(path))!r}), and name "
                f"ARCHITECTURE@{_beside(path)}"
            )
        elif _is_program(path):
            advice = "it is a torch.export program: name it as a model as it is, or save the state_dict() of the model"
        elif isinstance(error, UnpicklingError):  # torch's own advice, to open it all the same, is not passed on
            found = what.partition("GLOBAL ")[2].split(" ")[0]
            reason = f"it runs {found}, which is never done here" if found else "it is a pickle but of no state dict"
            advice = f"{reason}: save a plain state dict by torch.save"
        else:
            advice = f"it is truncated or damaged ({one_line(error).partition('. ')[0]}): copy it again"
        raise UserError(f"{path} cannot be read as weights: {advice}") from None


def _is_program(path: Path) -> bool:
    with suppress(OSError, BadZipFile), ZipFile(path) as archive:
        files = {name.rpartition("/")[2] for name in archive.namelist()}
        return not files.isdisjoint(("archive_format", "serialized_exported_program.json"))
    return False


def _nested(content: Any, place: str = "") -> Iterator[tuple[str, State]]:
    if not isinstance(content, Mapping):
        return
    entries = {name: value for name, value in content.items() if isinstance(name, str)}
    if tensors := {
        name: value.detach().to_dense() if value.is_sparse else value.detach()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }:
        yield place, tensors
    for name, value in entries.items():
        yield from _nested(value, f"{place}.{name}" if place else name)


def _cuts(own: State, tensors: State) -> list[str]:
    """Return the prefixes under which the file has names of the model, the most frequent ones first."""
    by_leaf: dict[str, list[str]] = {}
    for name in own:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    found: Counter[str] = Counter()
    for name in tensors:
        for mine in by_leaf.get(name.rpartition(".")[2], ()):
            if name == mine or name.endswith(f".{mine}"):
                found[name[: len(name) - len(mine)]] += 1
    return [cut for cut, _ in found.most_common()]


def _fits(part: nn.Module, tensors: State) -> Iterator[tuple[str, State, State]]:
    """Yield every prefix under which the file has all of the model, with the values and what else the file holds."""
    own, unused = part.state_dict(), tuple(getattr(part, "auxiliary", ()))
    for base in dict.fromkeys(("", _common(own))):  # a file may hold the names inside the model's own wrapper
        core = {name.removeprefix(base): value for name, value in own.items()}
        for cut in _cuts(core, tensors):
            others = {name: value for name, value in tensors.items() if not name.startswith(cut)}
            if others and not set(cut.split(".")[:-1]) <= _WRAPPERS:
                continue
            inside = {name[len(cut) :]: value for name, value in tensors.items() if name.startswith(cut)}
            spare = [name for name in inside if name.startswith(unused)]
            others |= {cut + name: inside.pop(name) for name in spare}
            if not _faults(core, inside, cut):
                yield cut, {base + name: value for name, value in inside.items()}, others


def _common(names: Mapping[str, Any]) -> str:
    """Return the dotted prefix that all names share, with its last dot."""
    first, *rest = [name.split(".")[:-1] for name in names] or [[]]
    for other in rest:
        first = first[: next((k for k, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), len(other))]
    return "".join(f"{part}." for part in first)


def _faults(own: State, tensors: State, prefix: str) -> str:
    """Describe what is missing, unexpected, or of another shape; empty if the tensors fit."""
    faults = [
        # Counts of batches, which only a BatchNorm without momentum uses, are absent from files of old versions.
        _listed("missing", [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]),
        _listed("unexpected", [prefix + name for name in tensors if name not in own]),
        _listed(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in tensors and tensors[name].shape != value.shape
            ],
        ),
        _listed(
            "of another type",
            [
                f"{name} {tensors[name].dtype} instead of {value.dtype}"
                for name, value in own.items()
                if name in tensors and value.is_floating_point() and not tensors[name].is_floating_point()
            ],
        ),
    ]
    return "; ".join(fault for fault in faults if fault)


def _unfit(weights: Weights, groups: dict[str, State], parts: list[nn.Module]) -> UserError:
    """Build the error for a file that fits no part of a model, from the state dict with most names in common."""
    best, most = "the file holds no tensors", -1
    place = ""
    for part in parts:
        own = part.state_dict()
        for group, tensors in groups.items():
            cut = next(iter(_cuts(own, tensors)), "")
            inside = {name[len(cut) :]: value for name, value in tensors.items() if name.startswith(cut)}
            if (common := len(own.keys() & inside.keys())) > most:
                beside = {name: value for name, value in tensors.items() if not name.startswith(cut)}
                faults = [_faults(own, inside, cut), _listed("beside it", list(beside)) if cut else ""]
                best, most, place = "; ".join(fault for fault in faults if fault), common, _where(group, cut)
    where = f" (under {place})" if place != "no prefix" else ""
    model = parts[0]
    title = model.card.name if isinstance(model, PixelModel) else type(model).__name__
    remedy = "create the architecture the file was written from"
    if best.startswith("of another shape"):  # all names fit
        remedy += ", with data of as many classes and colours"
    return UserError(f"the weights of {weights.path}{where} do not fit this {title}: {best}; {remedy}")


def _where(place: str, prefix: str) -> str:
    return ".".join(part for part in (place, prefix.rstrip(".")) if part) or "no prefix"


def _check_normalisation(model: nn.Module, path: Path, others: State) -> None:
    """Raise where the file normalises pixels otherwise than the model, which would change every answer."""
    if not isinstance(model, PixelModel):
        return
    for name, value in others.items():
        leaf = name.rpartition(".")[2].removeprefix("new_")
        if leaf in ("mean", "std") and value.numel() in (1, model.card.in_channels):
            own = getattr(model.normalize, leaf).flatten().to(value)
            if not torch.allclose(value.flatten().expand_as(own), own, atol=1e-3):
                theirs, mine = (", ".join(f"{v:.4g}" for v in t.flatten().tolist()) for t in (value, own))
                raise UserError(
                    f"{path} normalises pixels with {name} = {theirs}, and this model with {mine}: give that mean and "
                    "std to models.create, or build the model by a function of your own that normalises so "
                    "(FILE.py:FUNCTION@FILE)"
                )


def _listed(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    return f"{what} {some(entries, 3)}"


def _group(weights: Weights, key: str) -> State:
    if key not in weights.groups:
        if list(weights.groups) == [""]:
            raise UserError(f"{weights.path} has no state dict under {key!r}, as it is one itself: leave the key out")
        raise UserError(f"{weights.path} has no state dict under {key!r}: it has {_contents(weights)}")
    return weights.groups[key]


def _contents(weights: Weights) -> str:
    return ", ".join(f"{place or 'the file itself'} ({len(state)} tensors)" for place, state in weights.groups.items())


def convert(path: Path, to: Path, key: str | None = None) -> list[str]:
    """Write the state dict of a file as safetensors, under its own names without the prefixes of wrappers.

    Args:
        path: see :func:`read_weights`.
        to: the new file, ``.safetensors``.
        key: where in the file the state dict is, such as ``ema``; None: the only one.

    Returns:
        What was done and left out, as sentences.

    Raises:
        UserError: the file cannot be read, has several state dicts, or the new one exists.
        OutOfSpace: the file could not be written.
    """
    if to.suffix != ".safetensors":
        raise UserError(f"{to} does not end in .safetensors: name such a file with --to")
    unused(to, "--to")
    weights = read_weights(path)
    groups = {place: state for place, state in weights.groups.items() if any(value.ndim for value in state.values())}
    if key is None and len(groups) > 1:
        raise UserError(f"{path} holds several state dicts, {_contents(weights)}: choose one with --key")
    key = next(iter(groups or weights.groups)) if key is None else key
    state = _group(weights, key)
    prefix = _common(state)
    while prefix and prefix.split(".")[-2] not in ("module", "_orig_mod"):  # other prefixes may be the model's own
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    bare = {name.removeprefix(prefix): value for name, value in state.items()}
    save_tensors(to, {name: value.clone() for name, value in bare.items()}, weights.document)
    said = [
        f"{to}: {len(bare)} tensors" + (f" of {key!r}" if key else "") + (f", without {prefix!r}" if prefix else "")
    ]
    if rest := [place or "the file itself" for place in weights.groups if place != key]:
        said.append(_listed("not converted:", rest))
    if weights.left_out:
        said.append(_listed("objects that were not created:", list(weights.left_out)))
    return said
