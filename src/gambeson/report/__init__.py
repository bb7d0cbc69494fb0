"""Finished runs as self-contained HTML pages that work offline, and in the formats of CI systems and model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gambeson.attacks import AdversarialPatch, UniversalPerturbation
from gambeson.base import load_tensors, replaceable, write_text
from gambeson.data import Split
from gambeson.evaluation import PlacementResult, Rate
from gambeson.evaluation.transfer import TransferResult
from gambeson.report import page, patch, pictures, study, summary, transfer
from gambeson.report.card import write_card
from gambeson.report.exchange import Finished, write_junit, write_sarif
from gambeson.report.loading import read_folders
from gambeson.report.patch import print_patch
from gambeson.studies.rows import StudyResult

__all__ = [
    "Finished",
    "print_patch",
    "write",
    "write_card",
    "write_first",
    "write_junit",
    "write_patch",
    "write_sarif",
    "write_study",
    "write_transfer",
]


def write(
    audits: Sequence[str | Path], out: str | Path, *, title: str | None = None, answer: str | None = None
) -> Path:
    """Write one HTML page about one or more audits of the same data.

    Everything in the page comes from the folders' files; nothing is recomputed. Equal folders give equal bytes.

    Args:
        audits: folders of finished audits, in the order of the page.
        out: the output file, replaced atomically.
        title: the page's heading; by default a plain one.
        answer: the sentences below it; by default about the weakest and the strongest of several models.

    Returns:
        The path of the page.

    Raises:
        UserError: no folder is given, a folder holds no finished audit, or the audits cannot be compared (other data,
            other norm).
    """
    found = page.build(read_folders([Path(folder) for folder in audits]), title, answer)
    return _written(out, page.render("audit", found))


def write_transfer(result: TransferResult, out: str | Path) -> Path:
    """Write one HTML page about a transfer table, and return its path."""
    return _written(out, page.render("transfer", transfer.build(result), plotly=False))


def write_patch(
    found: AdversarialPatch, rates: PlacementResult, images: Split, out: str | Path, *, seed: int = 0
) -> Path:
    """Write one HTML page about a patch and its placements, and return its path.

    Args:
        found: the patch.
        rates: what :func:`gambeson.evaluation.by_placement` returned for it.
        images: of which some are shown with the patch.
        out: the output file, replaced atomically.
        seed: of what is shown.
    """
    return _written(out, page.render("patch", patch.build(found, rates, images, seed), plotly=False))


def write_study(result: StudyResult, out: str | Path, root: Path | None = None) -> Path:
    """Write one HTML page about a study: claims, a table to sort and filter, and trade-offs; return its path.

    Args:
        result: what it has found.
        out: the output file.
        root: the folder of studies; the pages of its audits are then written to the folder ``NAME-audits`` beside
            ``out``, and the rows of the table lead there.
    """
    pages: dict[str, str] = {}
    for row in result.rows if root is not None else ():
        for label in row.verdicts:
            folder = Path(root or "") / row.folders[label] / "audit"
            if folder.is_dir():
                name = Path(f"{Path(out).stem}-audits", f"{study.plain_name(row, label)}.html")
                write([folder], Path(out).parent / name)
                pages[row.folders[label]] = name.as_posix()
    return _written(out, page.render("study", study.build(result, pages)))


@dataclass(frozen=True)
class _First:
    title: str
    summary: summary.Summary
    pattern: pictures.Pattern
    examples: list[pictures.Example]
    first: pictures.Example | None
    shown: str
    small: bool


def write_first(
    examples: str | Path,
    uap: UniversalPerturbation,
    rates: tuple[Rate, Rate],
    classes: Sequence[str],
    out: str | Path,
    *,
    title: str,
) -> Path:
    """Write a page about one perturbation that is not audited yet; opened in a browser, it reloads itself.

    Args:
        examples: the file of :func:`gambeson.auditing.stages.examples.save_examples`.
        uap: the perturbation.
        rates: the error on test images under it, and without it.
        classes: their names.
        out: the output file, replaced atomically.
        title: the page's heading.
    """
    tensors, _ = load_tensors(Path(examples), "test images")
    norm, eps = uap.about.norm, uap.about.eps
    shown = pictures.examples(tensors, classes)
    first = _First(
        title=title,
        summary=summary.first(*rates, eps, norm),
        pattern=pictures.pattern(uap.delta[0], eps, norm, "the model", f"UER {rates[0]}"),
        examples=shown,
        first=pictures.first_flipped(shown),
        shown=pictures.proportion(shown, *rates),
        small=max(uap.delta.shape[2:]) <= 96,
    )
    return _written(out, page.render("first", first, plotly=False))


def _written(out: str | Path, html: str) -> Path:
    replaceable(Path(out), "an HTML page")
    write_text(Path(out), html)
    return Path(out)
