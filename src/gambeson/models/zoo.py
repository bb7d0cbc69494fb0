"""The zoo's files: trained networks and their universal perturbations by name, each file checked by its digest.

Small entries lie in the package ``gambeson-zoo``; what is larger lies in a repository of the Hugging Face hub, and the
package has its name and digests. Weights and perturbations are safetensors; no file of the zoo can run code.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gambeson.base import Config, UserError, one_line, read_json, required, unknown_name
from gambeson.base.errors import as_text
from gambeson.models.hubs import HUB
from gambeson.tasks import Rate
from gambeson.threat import Norm

PREFIX = "zoo:"
"""Of a model's name that is one of the zoo, and of a perturbation's."""
PACKAGE, MANIFEST, FORM = "gambeson_zoo", "manifest.json", 1
WEIGHTS, RUN, UAP, AUDIT, CARD = "model.safetensors", "run.yaml", "uap.safetensors", "audit/result.json", "card.md"
"""Files of an entry: its weights, training run, perturbation, audit and card."""
_CHECKOUT = Path(__file__).parents[3] / "packages" / "gambeson-zoo" / "src" / PACKAGE


Place = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
"""Path inside the package, which names nothing outside it."""


class Entry(Config):
    """A network of the zoo with one universal perturbation, and what both were measured at."""

    name: Place
    """``DATA/ARCHITECTURE/TRAINING``."""
    summary: str
    """One line."""
    data: str
    """Name of the data set."""
    model: str
    """Name of the architecture."""
    defense: str
    """Name of the defence it was trained with."""
    parameters: int
    """Number of weights."""
    eps: float
    """Radius of the perturbation, in pixel units."""
    norm: Norm
    attack: str
    """Attack that crafted the perturbation, on training images."""
    clean: Rate
    """Accuracy on clean test images."""
    uer: Rate
    """Error on test images under the perturbation."""
    suite: Rate
    """Accuracy under the attack suite, per image, within eps."""
    trusted: bool
    """Whether the audit's verdict is that its numbers can be trusted."""
    verdict: str
    """The verdict in a sentence."""
    test: str
    """Fingerprint of the test images."""
    license: str = "Apache-2.0"
    at: Annotated[str, Field(pattern=r"^(hf://[^/@]+/[^/@]+(@[^/]+)?(/.+)?)?$")] = ""
    """Where its files lie: ``hf://ORG/REPO[@REVISION][/FOLDER]``; empty: in the package, in the folder of its name."""
    files: dict[Place, str]
    """Each file with its sha256."""

    def __str__(self) -> str:
        return f"{self.name}: {self.summary}"


def entries() -> dict[str, Entry]:
    """Return every entry by name.

    Raises:
        UserError: the package is not installed, or not of a form that this version reads.
    """
    folder = _folder()
    try:
        stored = read_json(folder / MANIFEST)
        if stored["form"] != FORM:
            raise UserError(f"it is of form {stored['form']}, not {FORM}")
        return {name: Entry(**{**fields, "name": name}) for name, fields in stored["entries"].items()}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        reason = one_line(error) if isinstance(error, UserError) else "it lists no entries"
        raise UserError(
            f"the manifest in {folder} cannot be used ({reason}): install versions that fit each other, by "
            "pip install -U gambeson gambeson-zoo"
        ) from None


def entry(name: str) -> Entry:
    """Return an entry, with or without ``zoo:`` before its name.

    Raises:
        UserError: there is none, or as :func:`entries`.
    """
    name, known = as_text(name).removeprefix(PREFIX), entries()
    if name not in known:
        raise unknown_name("entry of the zoo", name, known)
    return known[name]


def path(name: str, file: str) -> Path:
    """Return the path of a file of an entry, which has the digest of the manifest.

    Args:
        name: as :func:`entry` takes it.
        file: such as :data:`WEIGHTS`.

    Raises:
        UserError: the entry has no such file, it cannot be fetched, or it is damaged.
    """
    one = entry(name)
    if file not in one.files:
        raise unknown_name(f"file of {one.name}", file, one.files)
    place = _fetched(one, file) if one.at else _folder() / one.name / file
    again = "delete it, and it is fetched again" if one.at else "run pip install --force-reinstall gambeson-zoo"
    try:
        with place.open("rb") as opened:
            got = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}): {again}") from None
    if got != one.files[file]:
        raise UserError(
            f"{place} is damaged: its sha256 is {got[:16]}..., and the manifest has {one.files[file][:16]}...; {again}"
        )
    return place


def resolved(source: str, file: str = "") -> str:
    """Return the path behind ``zoo:NAME``; any other source as it is.

    Args:
        source: a model or a file.
        file: of the entry; empty: the folder of its training run.

    Raises:
        UserError: as :func:`path`.
    """
    if not source.startswith(PREFIX):
        return source
    if file:
        return str(path(source, file))
    path(source, RUN)
    return str(path(source, WEIGHTS).parent)


def _folder() -> Path:
    """Return the folder of the package, the installed one or that of a source tree."""
    spec = find_spec(PACKAGE)
    installed = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = next((place for place in (*map(Path, installed), _CHECKOUT) if (place / MANIFEST).is_file()), None)
    if found is None:
        raise UserError("the zoo's files are not installed: run pip install gambeson-zoo")
    return found


def _fetched(one: Entry, file: str) -> Path:
    hub = required("huggingface_hub", f"{PREFIX}{one.name}")
    owner, repo, *folders = one.at.removeprefix(HUB).split("/")
    repo, _, revision = repo.partition("@")
    try:
        return Path(hub.hf_hub_download(f"{owner}/{repo}", "/".join([*folders, file]), revision=revision or None))
    except Exception as error:  # of many types: no network, no such file, no permission
        raise UserError(
            f"{file} of {one.name} could not be fetched from {one.at} ({type(error).__name__}: {one_line(error)}): "
            "check the network and retry"
        ) from None
