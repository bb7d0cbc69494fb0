"""Typed, validated, frozen, keyword-only settings: the one object behind YAML, command-line flags and Python."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from gambeson.base.errors import UnknownSetting, UserError


def parse_number(value: Any) -> Any:
    """Read ``"8/255"`` or ``"0.03"`` as a float; anything that is not text passes through.

    Raises:
        ValueError: the text is not a number or a fraction of two numbers, or divides by zero.
    """
    if not isinstance(value, str):
        return value
    try:
        top, *bottom = (float(part) for part in value.split("/"))
        number = top if not bottom else top / bottom[0]
    except ValueError:
        raise ValueError(f"{value!r} is not a number; write 0.1 or a fraction such as 8/255") from None
    except ZeroDivisionError:
        raise ValueError(f"{value!r} divides by zero; write a fraction such as 8/255") from None
    if len(bottom) > 1:
        raise ValueError(f"{value!r} is not a number; write 0.1 or a fraction such as 8/255")
    return number


def eps_text(eps: float) -> str:
    """Write a radius as it is usually given: ``0.15``, ``8/255``, else with four digits."""
    if abs(float(short := f"{eps:.3g}") - eps) < 1e-9:
        return short
    steps = round(255 * eps)
    return f"{steps}/255" if steps and abs(255 * eps - steps) < 5e-4 else f"{eps:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


Number = Annotated[float, BeforeValidator(_finite), BeforeValidator(parse_number)]
"""A finite float that may be written as text, fractions included: ``8/255``."""


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return " ".join("".join(" " if unicodedata.category(one) in _NO_TEXT else one for one in value).split())


_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of control characters, of halves of characters, and of line and paragraph separators."""
Label = Annotated[str, BeforeValidator(_plain)]
"""A name for tables, pages and files: one line, of characters that each of them can hold."""


class Config(BaseModel):
    """Base of every configuration: frozen, keyword-only, and closed (an unknown field is an error).

    Raises:
        UnknownSetting: a field is missing or unknown.
        UserError: a value is out of its range; the message is one sentence.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise config_error(error, type(self).__name__, type(self).model_fields) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which are taken as they are.

        Raises:
            UnknownSetting: a field is unknown; pydantic's own copy would take it and change nothing.
        """
        for field in update or {}:
            if field not in type(self).model_fields:
                raise UnknownSetting(
                    f"{type(self).__name__} has no setting {field!r}: {nearest(field, type(self).model_fields)}"
                )
        made = super().model_copy(update=update, deep=deep)
        if update:  # what was computed from the old values and kept
            for name in made.__dict__.keys() - type(self).model_fields.keys():
                del made.__dict__[name]
        return made

    def plain(self) -> dict[str, Any]:
        """Every field as plain data, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.plain().items())})"


def nearest(field: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the nearest known one, or all."""
    names = sorted(known)
    near = [name for name in names if name.startswith(field) or field.startswith(name)][:1]
    near = near or difflib.get_close_matches(field, names, n=1, cutoff=_ALIKE)
    return f"did you mean {near[0]}?" if near else f"choose among {', '.join(names)}"


_ALIKE = 0.8
"""Likeness from which a name is taken for a misspelling: steps is no eps, and momentm is momentum."""
_KINDS = {
    "tuple_type": "expected a list, such as [1, 2]",
    "list_type": "expected a list, such as [1, 2]",
    "dict_type": "expected settings by name, such as {name: value}",
    "model_type": "expected settings by name, such as {name: value}",
}
"""What pydantic calls by the names of Python's types."""


def config_error(error: ValidationError, owner: str, known: Iterable[str]) -> UserError:
    """Turn pydantic's report into one sentence: its first problem, with the field and the value given."""
    # A misspelt setting explains a missing one, so it is named first.
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    path = tuple(str(part) for part in problem["loc"] if "[" not in str(part))  # without pydantic's names of forms
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, UserError) and inner.path:  # of a nested object, or of the setting beside this one
        path = path[:-1] + inner.path[1:] if inner.path[0] == ".." else path + inner.path
        return type(inner)(str(inner), path, inner.reason)
    field = ".".join(path) or owner
    if problem["type"] == "missing":
        return UnknownSetting(f"{owner} needs {field}: give it, for example {field}=...", path, f"it needs {field}")
    if problem["type"] == "extra_forbidden":
        reason = f"no setting {field!r}: {nearest(field, known)}"
        return UnknownSetting(f"{owner} has {reason}", path, f"there is {reason}")
    reason = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "expected ", 1)
    reason = _KINDS.get(problem["type"], reason)
    if problem["type"] == "too_short":
        reason = f"expected {problem['ctx']['min_length']} or more"
    if path and not isinstance(problem["input"], dict):
        return UserError(f"{owner}.{field} = {_shown(problem['input'])}: {reason}", path, reason)
    return UserError(f"{owner}: {reason}", path, reason)


_LONG = 200
"""Characters of a value that an error repeats."""


def _shown(value: object) -> str:
    """Return a value for a sentence: of tensors and arrays the shape and type, of long texts the beginning."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."
