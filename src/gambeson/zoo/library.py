"""Listing and loading of what the zoo has, and its verification."""

from __future__ import annotations

from gambeson import data as data_room
from gambeson.attacks import UniversalPerturbation
from gambeson.auditing import AuditResult
from gambeson.base import Config, UserError, unknown_name
from gambeson.evaluation import Rate, accuracy, universal_evasion
from gambeson.models import PixelModel, zoo
from gambeson.models import load as load_model
from gambeson.models.zoo import AUDIT, CARD, UAP, WEIGHTS, Entry, entry

TOLERANCE = 1e-3
"""Share of the test images that rounding on another machine may decide otherwise (ours)."""


def list(*, data: str | None = None, model: str | None = None, defense: str | None = None) -> tuple[Entry, ...]:
    """Return the entries, of which ``print`` shows name and summary.

    Args:
        data: those of a data set alone.
        model: those of an architecture alone.
        defense: those of a defence alone.

    Raises:
        UserError: the package ``gambeson-zoo`` is not installed, or no entry has such a data set, architecture or
            defence.
    """
    found, wanted = tuple(zoo.entries().values()), {"data": data, "model": model, "defense": defense}
    for field, value in wanted.items():
        known = {getattr(one, field) for one in found}
        if value is not None and value not in known:
            raise unknown_name(f"{field} of the zoo", value, known)
    return tuple(one for one in found if all(value in (None, getattr(one, field)) for field, value in wanted.items()))


def load(name: str) -> PixelModel:
    """Load a network, on the CPU and in evaluation mode; pixels in, logits out.

    Args:
        name: such as ``fashion-mnist/lenet5/shared-s16``.

    Raises:
        UserError: there is no such entry, the package is not installed, or the file is damaged.
    """
    return load_model(zoo.path(name, WEIGHTS))


def load_uap(name: str) -> UniversalPerturbation:
    """Load the universal perturbation of a network's audit, crafted on it or on a surrogate; see :func:`load`."""
    return UniversalPerturbation.load(zoo.path(name, UAP))


def load_audit(name: str) -> AuditResult:
    """Load the audit of a network; see :func:`load`."""
    return AuditResult.load(zoo.path(name, AUDIT).parent)


def card(name: str) -> str:
    """Return the card of an entry, in Markdown, with the sha256 of its files; see :func:`load`."""
    text = zoo.path(name, CARD).read_text(encoding="utf-8")
    rows = "".join(f"| `{file}` | `{digest}` |\n" for file, digest in sorted(entry(name).files.items()))
    return f"{text.rstrip()}\n\n## Files\n\n| file | sha256 |\n|---|---|\n{rows}"


class Verification(Config):
    """Whether an entry is what its card says."""

    name: str
    passed: bool
    reason: str = ""
    """Why it did not pass."""
    clean: Rate | None = None
    """Accuracy on clean test images, measured again; None: it could not be, for the reason given."""
    uer: Rate | None = None
    """Error under the perturbation, likewise."""


def verify(name: str, *, device: str = "cpu") -> Verification:
    """Check every file of an entry by its digest, then score network and perturbation again on the same test images.

    Both rates have to be those of the manifest, up to one image in a thousand that rounding decides otherwise.

    Args:
        name: see :func:`load`.
        device: of the computations.

    Raises:
        UserError: there is no such entry.
    """
    one = entry(name)
    try:
        for file in one.files:
            zoo.path(name, file)
        model, uap, test = load(name).to(device), load_uap(name), data_room.load(one.data).test
        if test.fingerprint != one.test:
            raise UserError(f"the test images of {one.data} are not those that it was scored on")
        clean, uer = accuracy(model, test), universal_evasion(model, test, uap)
    except UserError as error:
        return Verification(name=one.name, passed=False, reason=str(error))
    reasons = [
        f"{what} is {now}, and was {before}"
        for what, now, before in (("accuracy", clean, one.clean), ("UER", uer, one.uer))
        if now.n != before.n or abs(now.value - before.value) > TOLERANCE
    ]
    return Verification(name=one.name, passed=not reasons, reason="; ".join(reasons), clean=clean, uer=uer)
