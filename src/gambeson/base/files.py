"""Files of a run, written atomically (a reader sees the old file or the new one, never part of one), and its folder."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gambeson.base.errors import OutOfSpace, UserError

_ELSEWHERE = "choose another --out, or make its folder writable,"
_SPACE = "free some space or choose another --out"
_REMEDIES = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: _SPACE}


def writable(folder: Path) -> None:
    """Check that files can be written below a folder, which need not exist yet; nothing is left there.

    Raises:
        UserError: they cannot.
    """
    here = folder.absolute()
    try:
        while not here.exists():
            here = here.parent
        tempfile.TemporaryFile(dir=here).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {_ELSEWHERE} and retry") from None


def unused(path: Path, option: str = "--out") -> None:
    """Check that a file can be written where there is none.

    Raises:
        UserError: there is one, or its folder cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists: choose another {option}, or remove it first")
    writable(path.parent)


KINDS = {
    "an HTML page": rb'<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n<meta '
    rb'(name="generator" content="gambeson"|http-equiv="Content-Security-Policy" content="default-src \'none\'; )',
    "SARIF": rb'\{\s+"\$schema": "[^"\n]*",\s+"runs": \[\s+\{\s+"automationDetails": \{\s+"id": "gambeson/',
    "JUnit XML": rb'<\?xml [^>]*\?>\n<testsuites name="gambeson"',
    "a model card": rb"---\nmodel-index:\n(([ -][^\n]*)?\n)+---\n\n## Adversarial robustness\n.*\nModel: [^\n]*\n\Z",
    "the CSV of a study": rb"data,model,defense,variant,([a-z]+,)*metric,value,low,high,n,",
    "the Parquet of a study": rb"PAR1(?=.*variant)(?=.*metric)(?=.*censored)",
    "the summary of a study": rb'\{\n  "cells": \d+,\n  "claims": \[.*\n  "study": \{\n',
    "the results of a study's cells": rb'\x1f\x8b\{"address": "',
}
"""What a file is like that a command writes where it is told to, and nobody else: others of its format are kept."""
_ENDS = 1 << 16
"""Bytes at both ends of a file by which its kind is told."""


def replaceable(path: Path, kind: str) -> None:
    """Check that a file which is written anew takes the place of an earlier one of its kind, or of none.

    Args:
        path: of the file.
        kind: one of :data:`KINDS`.

    Raises:
        UserError: there is something else.
    """
    try:
        with path.open("rb") as file:
            found = file.read(_ENDS)
            file.seek(max(_ENDS, path.stat().st_size - _ENDS))
            found += file.read()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file") from None
    if found.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):
            found = found[:2] + zlib.decompressobj(wbits=31).decompress(found, 100)
    if found and not re.match(KINDS[kind], found, re.DOTALL):
        raise UserError(f"{path} exists and is not {kind} that gambeson wrote: name another file, or remove it first")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step.

    Raises:
        OutOfSpace: the disk is full or the folder cannot be written; no partial file is left.
    """
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
        with scratch.open("xb") as file:  # with the permissions of the umask, not those of mkstemp
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise OutOfSpace(
            f"could not write {path} ({error.strerror}): nothing half-written was left; "
            f"{_REMEDIES.get(error.errno or 0, _ELSEWHERE)} and run the same command again"
        ) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8; a question mark stands for what that cannot hold."""
    write_bytes(path, text.encode(errors="replace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys, so that equal contents are equal bytes."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_yaml(path: Path, content: Any) -> None:
    """Write YAML atomically, in the order given."""
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


_POINTER = b"version https://git-lfs."
_AGAIN = "copy it again, or delete it and run the command that made it, which makes what is missing"


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON, with the options of :func:`json.loads`.

    Raises:
        json.JSONDecodeError: it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a file or folder that a finished run has written") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from None


_KEY = "gambeson"  # one key only: safetensors does not keep the order of several


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-ready ``about`` to one safetensors file, atomically."""
    copies: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        place = kept.untyped_storage().data_ptr()
        copies[name] = kept.clone() if place in places else kept  # tied weights are stored under each name
        places.add(place)
    write_bytes(path, save(copies, {_KEY: json.dumps(about, sort_keys=True)}))


def load_tensors(path: Path, kind: str = "weights") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors, and the JSON document that :func:`save_tensors` stored with them.

    Args:
        path: the file; a plain safetensors file of another tool has an empty document.
        kind: what the file should contain, for the error message.

    Raises:
        UserError: the file is missing, is a pickle, is a web page, or is cut short.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a safetensors file with {kind}")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from None
    # A safetensors file starts with the length of its JSON, any eight bytes, and then the brace.
    if head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened and is never loaded here: convert it once by "
            f"`gambeson convert {path} --to {path.with_suffix('.safetensors')}`, which reads its tensors alone"
        )
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path} starts with {head!r}: a web page, not {kind}; download the file itself")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        if head[8:9] not in (b"", b"{"):
            if path.suffix.lower() == ".onnx":
                raise UserError(f"{path} is an ONNX graph, with its weights: name it as a model, as it is") from None
            raise UserError(f"{path} starts with {head!r}, as no file of weights does: name {kind}") from None
        raise UserError(
            f"{path} ({size} bytes) is not a complete safetensors file ({error}): it is truncated or damaged; {_AGAIN}"
        ) from None
    document = None
    with suppress(json.JSONDecodeError):
        document = parse_json(about)
    if not isinstance(document, dict):
        raise UserError(f"the document {_KEY!r} in {path} is {about[:50]!r}: expected a JSON object; {_AGAIN}")
    return tensors, document


def refuse_pointer(path: str | Path) -> None:
    """Raise a UserError if a file is a pointer, which a clone without Git LFS has in place of a large file."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` where it came from")


def pixel_bytes(images: torch.Tensor) -> torch.Tensor:
    """Round pixels in [0, 1] to uint8 0..255, for storing."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        yaml.YAMLError: it is none, or a mapping has a key twice, of which the last would win without a word.
    """
    try:
        return _parsed_yaml(text)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    except ValueError as error:  # what looks like a date or a number and is none
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def _parsed_yaml(text: str) -> Any:
    left, seen = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            left += node.value
            continue
        keys = set[tuple[str, str]]()
        for key, value in node.value:
            left += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                keys.add((key.tag, key.value))
    return yaml.safe_load(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or is no mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a YAML file, such as the run.yaml of a finished run") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()).replace('"<unicode string>", ', "")
        raise UserError(f"{path} is not valid YAML ({reason}): fix or delete it and retry") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a YAML file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected settings, one `name: value` per line")
    return content
