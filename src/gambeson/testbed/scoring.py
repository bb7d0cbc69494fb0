"""Error rates of an audit, a detector or an attack suite on the testbed."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.base import (
    Config,
    UserError,
    as_text,
    environment,
    open_run,
    read_json,
    seeded,
    task,
    unknown_name,
    write_json,
)
from gambeson.base.user_code import canonical, file_of, is_spelling
from gambeson.data import Dataset
from gambeson.evaluation import Rate
from gambeson.models import fingerprint
from gambeson.models.external import load_function
from gambeson.testbed.entry import KINDS, Entry
from gambeson.testbed.judgement import AUDITORS, Judgement, NotAJudgement, as_judgement, broken, overstates
from gambeson.testbed.library import entry_of, models
from gambeson.testbed.outside import OUTSIDE, MissingPackageError
from gambeson.testbed.recipes import networks
from gambeson.testbed.truth import ground_truth

Auditor = Callable[[nn.Module, Dataset], object]
"""Maps a model and its data to a bool (can the model be trusted?) or to a :class:`Judgement`."""
BASE = "standard"
"""The undefended network, whose numbers decide whether an auditor's attacks broke a model."""


class Outcome(Config):
    """The judgement of an auditor on one model, and whether it was wrong."""

    name: str
    kind: str
    honest: bool
    judgement: Judgement
    broken: dict[str, bool] = Field(default_factory=dict)
    """If the auditor returned numbers: whether they are within the interval of the undefended network, or worse; ``per
    image`` for its accuracy, ``universal`` for its universal evasion rate."""
    wrong: Literal["", "missed", "accused"] = ""
    """``missed``: obfuscated, but considered robust; ``accused``: honest, but not trusted."""
    overstated: bool = False
    """Whether it is obfuscated and called more robust than it is, without a warning; see :func:`overstates`."""
    seconds: float


class TestbedRun(Config):
    """Settings of a folder of scores; models can be added later."""

    __test__: ClassVar[bool] = False

    kind: Literal["testbed"] = "testbed"
    auditor: str
    data: str
    seed: int


class TestbedScore(Config):
    """Error rates of an auditor, with 95 % Wilson intervals over models."""

    __test__: ClassVar[bool] = False  # not for pytest

    auditor: str
    data: str
    seed: int
    missed: Rate
    """Share of obfuscated models considered robust; n = 0 if there are none."""
    accused: Rate
    """Share of honest models not trusted."""
    overstated: Rate | None = None
    """Share of obfuscated models called clearly more robust than they are, without a warning."""
    by_kind: dict[str, Rate]
    """The rates of wrong judgements by family: ``missed``, and ``accused`` for ``honest``."""
    outcomes: list[Outcome]
    environment: dict[str, str]

    def wrong(self) -> list[Outcome]:
        """The models with a wrong judgement."""
        return [outcome for outcome in self.outcomes if outcome.wrong]


def score(
    auditor: str | Auditor,
    data: str = "digits",
    models: Sequence[str] | None = None,
    *,
    seed: int = 0,
    out: str | Path | None = None,
) -> TestbedScore:
    """Run an auditor on the models of the testbed, and measure its error rates.

    An obfuscated model is missed if the auditor trusts it and does not break it. An auditor that returns a bool can
    only distrust a model. One that returns numbers (see :class:`Judgement`) breaks a model if they are within the
    interval of those on the undefended network, or worse; it is then run on that network too. An honest model is
    accused if it is not trusted, however robust it is.

    Args:
        auditor: ``auditor(model, data)``, or the name of a built-in one: ``pgd``, ``quick``, ``standard``, ``full``; or
            an outside one, of the extra ``bench``: ``autoattack``, ``art``, ``foolbox``; or ``FILE.py:FUNCTION``.
            Torch's and Python's global generators are seeded before each call. A ``UserError`` counts as distrust, any
            other error is raised.
        data: a data set of the testbed.
        models: names of entries; None: all on this data.
        seed: of the auditor; the models are deterministic.
        out: folder for ``score.json`` and one file per model; an interrupted run resumes there. A model is scored again
            if its code, or that of the auditor, has changed.

    Raises:
        UserError: unknown auditor, data or model; an invalid return value of the auditor; the package of an
            outside one is not installed; or the folder contains the scores of another auditor.
    """
    name, auditor = auditor_named(auditor) if isinstance(auditor, str) else (_title(auditor), auditor)
    if not callable(auditor):
        raise UserError(
            f"the auditor is a {type(auditor).__name__}: expected a function of a model and its data, or a name"
        )
    entries = _chosen(data, models)
    folder = None if out is None else Path(as_text(out))
    if folder is not None:
        open_run(folder, TestbedRun(auditor=name, data=data, seed=seed), environment())
    work = _Work(auditor, data, seed, folder)
    outcomes = []
    with task(f"testbed: {name}", len(entries)) as advance:
        for entry in entries:
            outcomes.append(work.outcome(entry))
            advance()
    obfuscated = [outcome for outcome in outcomes if not outcome.honest]
    by_kind = {kind: [one for one in outcomes if one.kind == kind] for kind in KINDS}
    found = TestbedScore(
        auditor=name,
        data=data,
        seed=seed,
        missed=_rate(obfuscated),
        accused=_rate([outcome for outcome in outcomes if outcome.honest]),
        overstated=Rate.of(sum(outcome.overstated for outcome in obfuscated), len(obfuscated)),
        by_kind={kind: _rate(some) for kind, some in by_kind.items() if some},
        outcomes=outcomes,
        environment=environment(),
    )
    if folder is not None:
        write_json(folder / "score.json", found.plain())
    return found


def auditor_named(name: str) -> tuple[str, Callable[..., Any]]:
    """Return an auditor by name: a built-in one, or ``FILE.py:FUNCTION``.

    Raises:
        UserError: no auditor of that name, or no such function in the file.
    """
    known = AUDITORS | OUTSIDE
    if name in known:
        return name, known[name]
    if not is_spelling(name):
        raise unknown_name("auditor", name, [*known, "FILE.py:FUNCTION"])
    if not file_of(name).is_file():
        raise UserError(f"{file_of(name)} does not exist: --auditor FILE.py:FUNCTION names a function of your own file")
    return canonical(name), load_function(name)


def _rate(outcomes: list[Outcome]) -> Rate:
    return Rate.of(sum(bool(outcome.wrong) for outcome in outcomes), len(outcomes))


def _chosen(data: str, names: Sequence[str] | None) -> list[Entry]:
    known = models(data)
    if names is None:
        return known
    if isinstance(names, str) or not names:
        raise UserError(f"models = {names!r}: expected a list of names of `gambeson testbed list`, or None for all")
    return [entry_of(name, data) for name in dict.fromkeys(names)]


def _title(auditor: Auditor) -> str:
    kind = auditor if hasattr(auditor, "__qualname__") else type(auditor)
    return f"{kind.__module__}.{kind.__qualname__}"


class _Work:
    """Judges the entries, reusing stored judgements of the same code."""

    def __init__(self, auditor: Auditor, data: str, seed: int, folder: Path | None) -> None:
        self.auditor, self.data, self.seed, self.folder = auditor, data, seed, folder
        self.nets = networks(data)
        self.code = _code_of(auditor)
        self.base: Judgement | None = None

    def outcome(self, entry: Entry) -> Outcome:
        judgement, seconds = self.judge(entry)
        brought: dict[str, bool] = {}
        if not entry.honest and judgement.robust is None and judgement.numbers:
            if self.base is None:
                self.base = self.judge(entry_of(BASE, self.data))[0]
            brought = broken(judgement, self.base)
        robust = judgement.robust if judgement.robust is not None else not any(brought.values())
        wrong: Literal["", "missed", "accused"] = ""
        if entry.honest and not judgement.trusted:
            wrong = "accused"
        elif not entry.honest and judgement.trusted and robust:
            wrong = "missed"
        return Outcome(
            name=entry.name,
            kind=entry.kind,
            honest=entry.honest,
            judgement=judgement,
            broken=brought,
            wrong=wrong,
            overstated=self.overstates(entry, judgement),
            seconds=seconds,
        )

    def overstates(self, entry: Entry, judgement: Judgement) -> bool:
        if entry.honest or not judgement.trusted:
            return False
        return overstates(judgement, ground_truth(entry, self.data))

    def judge(self, entry: Entry) -> tuple[Judgement, float]:
        model = entry.build(self.nets)
        made_of = {"entry": entry.signature, "weights": fingerprint(model), "auditor": self.code}
        file = None if self.folder is None else self.folder / "models" / f"{entry.file_name}.json"
        if file is not None and file.is_file() and self.code is not None:
            with suppress(UserError):  # damaged: judged again
                kept = read_json(file)
                if kept.get("made_of") == made_of:
                    return Judgement(**kept["judgement"]), float(kept["seconds"])
        began = time.perf_counter()
        try:
            with seeded(self.seed, "auditor", entry.name), torch.enable_grad():
                judgement = as_judgement(self.auditor(model, copy.deepcopy(self.nets.data)), entry.name)
        except (NotAJudgement, MissingPackageError):
            raise
        except UserError as error:  # a refusal counts as distrust
            judgement = Judgement(trusted=False, reasons=[f"refused: {error}"])
        seconds = time.perf_counter() - began
        if file is not None:
            write_json(file, {"made_of": made_of, "judgement": judgement.plain(), "seconds": seconds})
        return judgement, seconds


def _code_of(auditor: Any) -> str | None:
    """Hash the auditor's own code and settings, without the functions it calls.

    None if they cannot be established: judgements of such an auditor are never reused.
    """
    if isinstance(auditor, functools.partial):
        parts = [_code_of(auditor.func), repr(auditor.args), repr(sorted(auditor.keywords.items()))]
    elif inspect.isfunction(auditor):
        cells = [cell.cell_contents for cell in auditor.__closure__ or ()]
        code = auditor.__code__
        parts = [_source(auditor), code.co_code.hex(), repr(code.co_consts), repr(auditor.__defaults__), repr(cells)]
    else:
        parts = [_source(type(auditor)), repr(sorted(vars(auditor).items())) if hasattr(auditor, "__dict__") else ""]
    if any(part is None or " at 0x" in part for part in parts):  # an address says nothing about what is there
        return None
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:12]


def _source(owner: Any) -> str | None:
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return None
