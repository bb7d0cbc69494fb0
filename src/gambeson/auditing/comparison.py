"""Comparison of two audits: did robustness regress? Paired tests on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from gambeson.auditing.audit import Audit, audit
from gambeson.auditing.context import Outcomes
from gambeson.auditing.display import doubt_of
from gambeson.auditing.gates import GateReport, Metric, Reading, judge_gates, parse_gates, place_of
from gambeson.auditing.results import AuditResult, DataInfo, ModelInfo
from gambeson.auditing.suite import Suite
from gambeson.base import Config, UserError, as_text, notebook
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import EpsUni
from gambeson.tasks import Counts, Difference
from gambeson.tasks.rate import Z95

LEVEL = 0.05
"""Probability, at the most, that any change is called clear where no rate has changed."""


class Change(Config):
    """How one rate differs between two models."""

    name: str
    """As gates have it: ``clean``, ``uer@0.1``, ``per_image:pgd`` or, of label maps, ``mean_iou@0.1``."""
    first: Rate
    second: Rate
    difference: Difference
    """The second less the first, with its 95 % interval. Paired: by Agresti and Min (2005), of label maps by bootstrap
    over images. Not paired: from the two intervals (Newcombe 1998)."""
    p: float
    """Two-sided. Paired: McNemar's exact test, of label maps Student's. Not paired: Fisher's exact test, of label maps
    normal."""
    adjusted: float
    """The same for all rates of the comparison at once (Holm 1979)."""
    outcome: Literal["worse", "better", "no clear change"]
    """Clear where ``adjusted`` is at most :data:`LEVEL`."""
    unpaired: str = ""
    """Why images were not compared one by one, so that the interval is wider; empty where they were."""
    lost: int | None = None
    """Paired: images that the first model alone gets right; None for label maps."""
    gained: int | None = None
    """Paired: images that the second alone gets right."""

    def __str__(self) -> str:
        return f"{self.first} to {self.second}: {self.difference}, {self.outcome} (p = {self.adjusted:.2g})"


class Comparison(notebook.ShownAsTable, Config):
    """Result of :func:`compare`.

    Intervals and tests are about the test images: each model's perturbations, and the models themselves, are held
    fixed. Another training or another seed may differ by more.
    """

    first: ModelInfo
    second: ModelInfo
    material: DataInfo
    """The data of the second."""
    trusted: tuple[bool, bool]
    """Whether the numbers of each can be trusted."""
    doubt: str = ""
    """What the numbers of the second are that are not trusted; empty if they are."""
    changes: list[Change]
    eps_uni: tuple[EpsUni, EpsUni]
    """Of each, untested."""
    notes: list[str] = Field(default_factory=list)
    """What else differs between the audits. Whole sentences."""

    @property
    def regressions(self) -> list[str]:
        """What became clearly worse, by name; ``trusted`` where the numbers of the first alone can be trusted."""
        lost = ["trusted"] if self.trusted[0] and not self.trusted[1] else []
        return lost + [change.name for change in self.changes if change.outcome == "worse"]

    @property
    def summary(self) -> str:
        """The conclusion in a sentence or two."""
        worse = self.regressions
        better = [change.name for change in self.changes if change.outcome == "better"]
        said = f"Clearly worse: {', '.join(worse)}." if worse else "No clear regression."
        said += f" Clearly better: {', '.join(better)}." if better else ""
        if self.doubt:
            said += f" The numbers of the second model are {self.doubt}: it may be weaker than they say."
        return said

    def gate(self, text: str | Sequence[str]) -> GateReport:
        """Judge gates: ``no-regression``, or changes such as ``clean>=-0.01`` and ``uer.high<=0.02``.

        ``no-regression`` is missed where something is clearly worse, and where the second model's numbers are not to be
        trusted. It holds for every change that the images cannot show; the upper end of an interval tells how much
        worse the model may still be, and ``uer.high<=0.02`` requires that to be at most 2 points.

        Raises:
            UserError: as :func:`gambeson.auditing.gates.parse_gates`.
        """
        return judge_gates(parse_gates(text, CHANGES), self, CHANGES)

    def _lines(self) -> tuple[str, dict[str, str]]:
        title = f"{self.first.label} to {self.second.label}, on {self.material.name}. {self.summary}"
        words = [f"{'>' if one.censored else 'at most'} {one.value:.3g}{one.interval}" for one in self.eps_uni]
        return title, {change.name: str(change) for change in self.changes} | {"eps_uni": " to ".join(words)}

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per rate."""
        return notebook.frame(
            [
                {"name": one.name, "first": one.first.value, "second": one.second.value}
                | one.difference.plain()
                | one.model_dump(include={"p", "adjusted", "outcome", "unpaired", "lost", "gained"})
                for one in self.changes
            ]
        )


def compare(
    first: object,
    second: object,
    data: object = None,
    *,
    suite: str | Suite = "quick",
    seed: int = 0,
    out: str | Path | None = None,
) -> Comparison:
    """Compare two models: which rates became clearly worse, which better, and by how much.

    Clean accuracy, the UER at each eps (under the perturbation crafted for each model) and the accuracy under each
    per-image attack are compared image by image, where both audits report on the same test images. Audits on
    other images of the same data, and of versions that kept no ``outcomes.safetensors``, are compared by their rates.

    Args:
        first: the earlier model: the folder of a finished audit, an :class:`Audit`, or a module, which is audited.
        second: the later one, likewise.
        data: of the audits of modules, as :func:`gambeson.audit` takes it.
        suite: of these audits.
        seed: of these audits.
        out: folder of these audits, ``first`` and ``second``; an interrupted one resumes.

    Raises:
        UserError: a folder has no finished audit, or a broken one; the audits differ in data, classes, norm, eps or
            any other setting; one of them only had queries.
    """

    def read(given: object, name: str) -> tuple[AuditResult, Outcomes]:
        if isinstance(given, str | Path):
            return AuditResult.load(given), Outcomes(Path(given))
        if isinstance(given, nn.Module):
            if data is None:
                raise UserError("models are audited before they are compared: give data as well")
            given = audit(given, data, suite, None if out is None else Path(as_text(out)) / name, seed=seed, label=name)
        if isinstance(given, AuditResult):
            return given, Outcomes()
        if not isinstance(given, Audit):
            raise UserError(f"{type(given).__name__} cannot be compared: expected an audit, its folder, or a module")
        return given.results, given.outcomes

    (before, was), (after, now) = read(first, "first"), read(second, "second")
    _check_pair(before, after)
    rates, others = _rates(before), _rates(after)
    changes = [_changed(name, rates[name], others[name], was, now) for name in rates if name in others]
    return Comparison(
        first=before.subject,
        second=after.subject,
        material=after.material,
        trusted=(before.verdict.trusted, after.verdict.trusted),
        doubt=doubt_of(after),
        changes=_judged(changes),
        eps_uni=(before.eps_uni, after.eps_uni),
        notes=_notes(before, after),
    )


def _check_pair(first: AuditResult, second: AuditResult) -> None:
    for part in ("name", "classes", "shape", "unit"):
        one, other = getattr(first.material, part), getattr(second.material, part)
        if one != other:
            if part == "classes":
                one, other = (f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (one, other))
            raise UserError(
                f"the audits are on other data ({part}: {one} and {other}): audit both models on the same data"
            )
    if first.subject.black_box != second.subject.black_box:
        raise UserError(
            "one model is a black box and the other is not, so that they were attacked in other ways: audit both alike"
        )
    settings = {**first.settings, **second.settings}
    unlike = [name for name in settings if first.settings.get(name) != second.settings.get(name)]
    if unlike:
        unlike.sort(key=lambda name: name == "checks")  # the longest says least
        values = {name: [_short(each.settings.get(name)) for each in (first, second)] for name in unlike[:3]}
        named = [f"{name}: {' and '.join(both)}" for name, both in values.items()]
        more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise UserError(
            f"the audits differ in their settings ({'; '.join(named)}{more}), so a difference says nothing of the "
            "models: audit both with the same suite, as `gambeson audit --config` of one run.yaml does"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."


def _rates(result: AuditResult) -> dict[str, Rate]:
    found = {"clean": result.clean}
    found |= {f"uer@{point.eps:.4g}": point.uer for point in result.universal}
    for one in result.per_image:  # an attack of the user's own may have the same name, and comes later
        found.setdefault(f"per_image:{one.attack}", one.accuracy)
    if result.iou is not None:
        found["clean_iou"] = result.iou.mean
    return found | {f"mean_iou@{point.eps:.4g}": point.iou.mean for point in result.universal if point.iou is not None}


def _notes(first: AuditResult, second: AuditResult) -> list[str]:
    told = {
        "seed": (first.seed, second.seed),
        "number of training images": (first.material.train, second.material.train),
        **{key: (first.environment.get(key), second.environment.get(key)) for key in ("gambeson", "torch", "device")},
    }
    return [f"The audits differ in {what}: {one} and {other}." for what, (one, other) in told.items() if one != other]


def _changed(name: str, first: Rate, second: Rate, was: Outcomes, now: Outcomes) -> Change:
    sign = -1 if name.startswith("uer") else 1
    pair = _pair(name, first, second, was, now)
    about: dict[str, Any] = {"name": name, "first": first, "second": second}
    if isinstance(pair, str):
        difference, p = _unpaired(first, second)
        about |= {"unpaired": pair}
    elif int(pair[0].total.max()) > 1:
        difference, p = _maps(*pair, sign)
    else:
        counted = pair[0].total > 0
        one, other = (counts.right[counted] > 0 for counts in pair)
        about |= {"lost": (lost := int((one & ~other).sum())), "gained": (gained := int((other & ~one).sum()))}
        difference, p = _images(lost, gained, len(one), sign)
    worse = sign * difference.value < 0
    return Change(**about, difference=difference, p=p, adjusted=p, outcome="worse" if worse else "better")


def _pair(name: str, first: Rate, second: Rate, was: Outcomes, now: Outcomes) -> tuple[Counts, Counts] | str:
    """Return the outcomes of the same images under both, or why there are none."""
    one, other = was.of(name), now.of(name)
    if one is None or other is None:
        return "outcomes per image were not kept"
    if was.test != now.test:
        return "the test images or their labels differ"
    if not torch.equal(one[0], other[0]) or not torch.equal(one[1].total, other[1].total):
        return "other images were drawn from the test split"
    for counts, rate in ((one[1], first), (other[1], second)):
        share = 1 - counts.accuracy.value if name.startswith("uer") else counts.accuracy.value
        if counts.images != rate.n or abs(share - rate.value) > 1e-9:
            return "the outcomes that were kept do not give the reported rate"
    return one[1], other[1]


def _images(lost: int, gained: int, n: int, sign: int) -> tuple[Difference, float]:
    """Compare n images that have one answer each."""
    from scipy.stats import binomtest

    changed = lost + gained
    p = float(binomtest(lost, changed).pvalue) if changed else 1.0
    return Difference.of_pairs(*((gained, lost) if sign > 0 else (lost, gained)), n), p


def _maps(first: Counts, second: Counts, sign: int) -> tuple[Difference, float]:
    """Compare label maps by the bootstrap over images; the test is that of the interval.

    Its p is at least that of as many images that all changed in one direction, which chance does once in 2^(n - 1).
    """
    from scipy.special import stdtr, stdtrit

    rows = [torch.stack([counts.right, counts.total], 1) for counts in (second, first)]
    found = Difference.of(rows[0], rows[1], lambda sums: sums[:, 0] / sums[:, 1].clamp(min=1), first.images)
    if sign < 0:
        found = Difference(value=-found.value, low=-found.high, high=-found.low, n=found.n)
    freedom = max(1, found.n - 1)
    half = max(found.high - found.value, found.value - found.low)
    p = float(2 * stdtr(freedom, -abs(found.value) / half * stdtrit(freedom, 0.975)))
    return found, max(p, 2.0 ** (1 - max(1, found.n)))


def _unpaired(first: Rate, second: Rate) -> tuple[Difference, float]:
    """Compare two rates of other images, from their intervals."""
    from scipy.stats import fisher_exact, norm

    value = second.value - first.value
    low = value - sqrt((second.value - second.low) ** 2 + (first.high - first.value) ** 2)
    high = value + sqrt((second.high - second.value) ** 2 + (first.value - first.low) ** 2)
    if first.effective is None and second.effective is None:
        table = [[round(rate.value * rate.n), rate.n - round(rate.value * rate.n)] for rate in (first, second)]
        p = float(fisher_exact(table).pvalue)
    else:
        towards_zero = (value - low if value > 0 else high - value) / Z95
        p = float(2 * norm.sf(abs(value) / max(towards_zero, 1e-12)))
    return Difference(value=value, low=low, high=high, n=min(first.n, second.n)), p


def _judged(changes: list[Change]) -> list[Change]:
    """Adjust the tests for their number (Holm 1979), and say which changes are clear."""
    found, largest = {}, 0.0
    for k, change in enumerate(sorted(changes, key=lambda one: one.p)):
        largest = max(largest, min(1.0, (len(changes) - k) * change.p))
        unclear = {} if largest <= LEVEL else {"outcome": "no clear change"}
        found[change.name] = change.model_copy(update={"adjusted": largest, **unclear})
    return [found[change.name] for change in changes]


def _reading(result: Comparison, names: list[str], what: str) -> Reading | str:
    if len(names) != 1:
        known = ", ".join(names or [one.name for one in result.changes])
        return f"{'say which' if names else f'{what} was not compared'}: choose among {known}"
    found = next(one.difference for one in result.changes if one.name == names[0])
    return Reading(found.value, found.low, found.high)


def _at_eps(metric: str) -> Any:
    def read(result: Comparison, eps: str) -> Reading | str:
        names = [one.name for one in result.changes if one.name.startswith(f"{metric}@")]
        if not eps:
            return _reading(result, names[len(names) // 2 :][:1], metric)
        place = place_of(eps, [float(name.partition("@")[2]) for name in names])
        return _reading(result, [] if place is None else [names[place]], metric)

    return read


def _named(metric: str) -> Any:
    def read(result: Comparison, of: str) -> Reading | str:
        wanted = f"{metric}:{of}" if of else metric
        names = [one.name for one in result.changes if one.name == wanted or one.name.startswith(f"{wanted}:")]
        return _reading(result, names, wanted)

    return read


def _no_regression(result: Comparison, _: str) -> bool | str:
    if result.regressions:
        return f"clearly worse: {', '.join(result.regressions)}"
    return result.trusted[1] or f"the numbers of the second model are {result.doubt}"


CHANGES: Mapping[str, Metric] = {
    "no-regression": Metric("nothing is clearly worse, and the second can be trusted", _no_regression, word=True),
    "clean": Metric("change of the accuracy on clean images", _named("clean"), lowest=-1),
    "uer": Metric("change of the universal evasion rate at the middle eps, or at EPS", _at_eps("uer"), -1, after="@"),
    "per_image": Metric("change of the accuracy under a per-image attack", _named("per_image"), -1, after=":"),
    "clean_iou": Metric("change of the mean IoU on clean images", _named("clean_iou"), lowest=-1),
    "mean_iou": Metric("change of the mean IoU under the perturbation", _at_eps("mean_iou"), lowest=-1, after="@"),
}
"""What gates of a comparison are about: the second model's number less the first one's."""
