"""Formatting of numbers, and the sentences of the page built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gambeson.evaluation import Rate
from gambeson.evaluation.rates import SmallestEps
from gambeson.report.loading import Folder


def percent(value: float) -> str:
    """Write a share with one decimal: ``12.3 %``."""
    return f"{100 * value:.1f} %"


def interval(rate: Rate) -> str:
    """Write the ends of the 95 % interval, in per cent: ``[11.0, 13.7]``."""
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


@dataclass(frozen=True)
class EpsFormat:
    """Format of eps: k/255 for colour images, a decimal number otherwise."""

    norm: str
    colour: bool

    def text(self, eps: float) -> str:
        """Write eps in the shortest usual way: ``8/255`` or ``0.15``."""
        steps = round(eps * 255)
        if self.colour and self.norm == "inf" and steps and abs(eps * 255 - steps) < 1e-6:
            return f"{steps}/255"
        return f"{eps:.4g}"

    def decimal(self, eps: float) -> str:
        """Write eps as a decimal if :meth:`text` does not; else empty."""
        return "" if self.text(eps) == f"{eps:.4g}" else f"{eps:.4g}"

    @property
    def meaning(self) -> str:
        """Meaning of eps."""
        return "largest change of a pixel" if self.norm == "inf" else "Euclidean length of the pattern"


def count(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 model``, ``2,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bound(found: SmallestEps) -> tuple[str, ...]:
    """Write the smallest eps, its interval if there is one, and a note."""
    ends = () if found.low is None else (found.interval.strip(),)
    if found.censored:
        return f"> {found.value:.3g}", *ends, "no success up to there"
    if found.value == 0:
        return "0", *ends, "reached without any pattern"
    low = max(0.0, found.value - found.tolerance)
    return f"≤ {found.value:.3g}", *ends, f"no success at {low:.3g}" if low else "smallest eps tried"


def duration(seconds: float) -> str:
    """Write a time: ``41 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Write settings as rows of name and value; the name of a nested one is joined by dots."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def setting(folders: Sequence[Folder]) -> str:
    """Describe the experiment for readers who do not know universal perturbations."""
    material = folders[0].result.material
    what = "this model" if len(folders) == 1 else f"each of {len(folders)} models"
    return (
        f"For {what}, one fixed, faint pattern was made and added to all "
        f"{count(material.test, 'test image')} of {material.name}, none of which had been used to "
        "make it. How many does the model then get wrong?"
    )


def answer(folders: Sequence[Folder], eps: float | None, scale: EpsFormat) -> str:
    """Describe the result: the verdict of one model, or the weakest and the strongest of several."""
    if len(folders) == 1:
        return folders[0].result.verdict.summary
    if eps is None:
        return "The audits share no eps, so their rates cannot be compared: compare eps_uni in the table."
    weakest = max(folders, key=lambda folder: folder.at(eps).uer.value)
    worst = Rate.highest(folder.at(eps).uer for folder in folders)
    clean = weakest.result.clean.complement
    doubt = "" if weakest.trusted else " (its numbers are not to be trusted)"
    first = (
        f"The model {_quote(weakest.label)}{doubt} is broken most by one pattern: at eps {scale.text(eps)} "
        f"it gets {worst} of the test images wrong, against {clean} when clean."
    )
    trusted = [folder for folder in folders if folder.trusted]
    if not trusted:
        return f"{first} No model can be called robust, because none of the verdicts can be trusted."
    strongest = min(trusted, key=lambda folder: folder.at(eps).uer.value)
    least = Rate.lowest(folder.at(eps).uer for folder in trusted)
    among = "" if len(trusted) == len(folders) else " among those whose numbers can be trusted"
    if strongest is weakest:
        return f"{first} It is the only one whose numbers can be trusted."
    tie = " The two intervals overlap, so their order is not certain." if least.high >= worst.low else ""
    return f"{first} {_quote(strongest.label)} withstands best{among}, with {least} wrong.{tie}"


def _quote(label: str) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}"
