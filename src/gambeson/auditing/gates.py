"""Gates: conditions that the numbers of an audit must meet, such as ``uer<=0.2, clean>=0.9, trusted``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gambeson.auditing.display import worst_of
from gambeson.base import Config, UserError, eps_text, notebook, unknown_name
from gambeson.base.config import parse_number
from gambeson.base.errors import some
from gambeson.evaluation import Rate

if TYPE_CHECKING:
    from gambeson.auditing.results import AuditResult


class Reading(NamedTuple):
    """A number that a gate is about; its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    open_above: bool = False
    """Whether the true number is larger than ``value``, by an amount that is not known."""


Read = Callable[[Any, str], Reading | bool | str]
"""Reads a metric of a result, for what follows ``@`` or ``:`` in its name (or an empty text); text says why it has
none."""


class Metric(NamedTuple):
    """Something that gates are about."""

    meaning: str
    read: Read
    lowest: float = 0.0
    """The smallest number it may be compared with."""
    highest: float | None = 1.0
    """The largest one; None for an eps, which has no per cent."""
    word: bool = False
    """Whether it holds or not, and is compared with nothing."""
    after: str = ""
    """What may follow its name: ``@`` and an eps, or ``:`` and a name."""
    known: str = ""
    """Settings without which an audit has no such number, for :func:`refuse_unmeasured`."""


def _of(rate: Rate) -> Reading:
    return Reading(rate.value, rate.low, rate.high)


def _point(result: AuditResult, eps: str) -> Any:
    """Return the perturbation of an eps, or of the middle one, or why there is none."""
    if not eps:
        return result.middle
    known = [point.eps for point in result.universal]
    place = place_of(eps, known)
    return _no_eps(eps, known) if place is None else result.universal[place]


def place_of(text: str, known: Sequence[float]) -> int | None:
    """Return the place of the eps that a text means, the nearest; three digits, as tables show, are enough."""
    eps = parse_number(text)
    place = min(range(len(known)), key=lambda k: abs(known[k] - eps), default=None)
    return place if place is not None and math.isclose(known[place], eps, rel_tol=5e-3) else None


def _no_eps(eps: str, known: Sequence[float]) -> str:
    return f"the audit has no eps {eps}: its curve is at {', '.join(eps_text(one) for one in known)}"


def _at(attribute: str) -> Read:
    def read(result: AuditResult, eps: str) -> Reading | str:
        point = _point(result, eps)
        return point if isinstance(point, str) else _of(getattr(point, attribute))

    return read


def _perturbed_iou(result: AuditResult, eps: str) -> Reading | str:
    point = _point(result, eps)
    if isinstance(point, str):
        return point
    return NO_MAPS if point.iou is None else _of(point.iou.mean)


NO_MAPS = "labels are no maps, so there is no IoU"


def _per_image(result: AuditResult, name: str) -> Reading | str:
    if name:
        named = [one for one in result.per_image if one.attack == name]
        tried = ", ".join(sorted({one.attack for one in result.per_image})) or "none"
        return _of(named[0].accuracy) if named else f"the audit has no per-image attack {name}: it has {tried}"
    worst = worst_of(result)
    return "the audit has no per-image attack at its middle eps" if worst is None else _of(worst.accuracy)


def _highest(part: str) -> Read:
    def read(result: AuditResult, _: str) -> Reading | str:
        rates = [one.error for one in getattr(result, part)]
        return _of(Rate.highest(rates)) if rates else f"the audit has no {part} stage"

    return read


def _smallest(name: str) -> Read:
    def read(result: AuditResult, _: str) -> Reading | str:
        found = getattr(result, name)
        if found is None:
            return f"the audit has no {name}: it was left out"
        return Reading(found.value, found.low, found.high, open_above=found.censored)

    return read


def _check(result: AuditResult, name: str) -> bool | str:
    found = next((check for check in result.checks if _slug(check.name) == _slug(name)), None)
    if found is None:
        return str(unknown_name("check", name, [check.name for check in result.checks]))
    if found.passed is None:
        return f"it does not apply: {found.detail}"
    return found.passed or f"it failed: {found.detail}"


def _slug(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _trusted(result: AuditResult, _: str) -> bool | str:
    failed = ", ".join(check.name for check in result.checks if check.passed is False)
    return result.verdict.trusted or (f"failed: {failed}" if failed else "not every check was run")


METRICS: Mapping[str, Metric] = {
    "clean": Metric("accuracy on clean images", lambda result, _: _of(result.clean)),
    "uer": Metric("universal evasion rate at the middle eps, or at EPS", _at("uer"), after="@"),
    "fooling": Metric("fooling rate, likewise", _at("fooling"), after="@"),
    "per_image": Metric("accuracy under the worst per-image attack, or under the one named", _per_image, after=":"),
    "transfer": Metric("highest error under perturbations of other models", _highest("transfer"), known="transfer"),
    "corruption": Metric("highest error under noise", _highest("corruption"), known="corruption"),
    "eps_uni": Metric("smallest eps of one perturbation", _smallest("eps_uni"), highest=None),
    "eps_adv": Metric("smallest eps per image", _smallest("eps_adv"), highest=None, known="eps_adv"),
    "mean_iou": Metric("mean IoU under the perturbation", _perturbed_iou, after="@", known="maps"),
    "clean_iou": Metric(
        "mean IoU on clean images",
        lambda result, _: NO_MAPS if result.iou is None else _of(result.iou.mean),
        known="maps",
    ),
    "trusted": Metric("no check failed", _trusted, word=True, known="trusted"),
    "check": Metric("this check passed", _check, word=True, after=":"),
}
"""The metrics of an audit."""

_COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
_FORM = re.compile(
    r"(?P<name>[A-Za-z][A-Za-z_-]*)(?:@(?P<eps>[\d./eE+-]+?)|:(?P<of>[^<>=]+?))?(?:\.(?P<end>low|high))?"
    r"\s*(?:(?P<sign><=|>=|<|>)\s*(?P<number>[^<>=]+))?"
)


class Gate(Config):
    """One condition; see :func:`parse_gates`."""

    text: str
    """As it was given."""
    metric: str
    of: str = ""
    """What follows ``@`` or ``:`` in the name of the metric."""
    end: str = ""
    """``low`` or ``high`` for an end of the interval; empty for the value."""
    sign: str = ""
    number: float | None = None


class GateResult(Config):
    """What came of one gate."""

    gate: str
    value: float | bool | None
    """None where the audit has no such number."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    required: str
    """What was required, such as ``<= 0.2``, or of an end of the interval ``high <= 0.2``."""
    held: bool
    reason: str = ""
    """Why it was missed, where the number alone does not say so."""


class GateReport(notebook.ShownAsTable, Config):
    """What came of several gates."""

    gates: list[GateResult]

    @property
    def held(self) -> bool:
        """Whether all of them held."""
        return all(gate.held for gate in self.gates)

    def _lines(self) -> tuple[str, dict[str, str]]:
        missed = sum(not gate.held for gate in self.gates)
        title = "All gates held" if not missed else f"{missed} of {len(self.gates)} gates missed"
        return title, {gate.gate: f"{'held' if gate.held else 'MISSED'}: {describe(gate)}" for gate in self.gates}

    def to_frame(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per gate."""
        return notebook.frame([gate.plain() for gate in self.gates])


def describe(gate: GateResult) -> str:
    """Say what was found and what was required: ``0.183 [0.15, 0.22], required <= 0.2``."""
    parts = [] if gate.value is None else [measured(gate)]
    return ", ".join([*parts, f"required {gate.required}", *filter(None, [gate.reason])])


def measured(gate: GateResult) -> str:
    """Write the number of a gate with its interval: ``0.183 [0.15, 0.22]``, or ``yes`` and ``no``."""
    if gate.value is None or isinstance(gate.value, bool):
        return {None: "not measured", True: "yes", False: "no"}[gate.value]
    low, high = ("more" if end is None else f"{end:.4g}" for end in (gate.low, gate.high))
    return f"{gate.value:.4g}" + ("" if gate.low is None else f" [{low}, {high}]")


def parse_gates(text: str | Sequence[str], metrics: Mapping[str, Metric] = METRICS) -> list[Gate]:
    """Read gates that are separated by commas.

    A gate is a metric, a comparison (``<=``, ``<``, ``>=``, ``>``) and a number, as in ``uer<=0.2``, ``clean>=90 %``,
    ``eps_uni>=8/255``; or a word that is to hold, ``trusted`` or ``check:NAME``. ``uer@8/255`` is the metric at that
    eps. A gate compares the value; ``uer.high<=0.2`` compares the upper end of its 95 % interval, ``clean.low>=0.9``
    the lower one, so that it holds only where the data shows it.

    Args:
        text: the gates, in one text or in several.
        metrics: what they may be about.

    Raises:
        UserError: a gate has another form, its metric is unknown, or its number is none that the metric can have.
    """
    texts = [text] if isinstance(text, str) else list(text)
    parts = [part.strip() for one in texts for part in one.split(",")]
    if not all(parts) or not parts:
        raise UserError(
            f"a gate in {some(map(repr, texts)) or 'an empty list'} is empty: expected for example 'uer<=0.2, "
            "clean>=0.9, trusted'"
        )
    return list(dict.fromkeys(_parse(part, metrics) for part in parts))


def _parse(text: str, metrics: Mapping[str, Metric]) -> Gate:
    form = _FORM.fullmatch(
        text.replace("\N{LESS-THAN OR EQUAL TO}", "<=").replace("\N{GREATER-THAN OR EQUAL TO}", ">=")
    )
    if form is None:
        raise UserError(
            f"gate {text!r}: expected METRIC<=NUMBER, with <=, <, >= or >, such as uer<=0.2 or uer@8/255.high<=20 %"
        )
    given = form["name"].lower()
    names = {_slug(name): name for name in metrics}
    if _slug(given) not in names:
        raise UserError(f"gate {text!r}: unknown metric {given!r}: choose among {spelt(metrics)}")
    name = names[_slug(given)]
    metric, of = metrics[name], (form["eps"] or form["of"] or "").strip()
    if of and metric.after != ("@" if form["eps"] else ":"):
        raise UserError(f"gate {text!r}: {name} has no @EPS or :NAME of this kind: choose among {spelt(metrics)}")
    if form["eps"]:
        _number(text, of, None, 0.0)
    if metric.word:
        if form["sign"] or form["end"]:
            raise UserError(f"gate {text!r}: {name} holds or does not: write it without a comparison")
        if metric.after and not of:
            raise UserError(f"gate {text!r}: expected {name}:NAME, such as {name}:stateless")
        return Gate(text=text, metric=name, of=of)
    if not form["sign"]:
        raise UserError(f"gate {text!r}: expected a comparison with a number, such as {name}<=0.2")
    number = _number(text, form["number"].strip(), metric.highest, metric.lowest)
    return Gate(text=text, metric=name, of=of, end=form["end"] or "", sign=form["sign"], number=number)


def spelt(metrics: Mapping[str, Metric]) -> str:
    """List metrics as gates spell them."""
    ends = {"@": "[@EPS]", ":": "[:NAME]", "": ""}
    return ", ".join(f"{name}{ends[metric.after]}" for name, metric in metrics.items())


def _number(gate: str, text: str, highest: float | None, lowest: float) -> float:
    """Read a number, in per cent where it is a share."""
    percent = text.endswith("%")
    try:
        number = float(parse_number(text.rstrip("% ") if percent else text)) / (100 if percent else 1)
    except ValueError as error:
        raise UserError(f"gate {gate!r}: {error}") from None
    if percent and highest is None:
        raise UserError(f"gate {gate!r}: an eps has no per cent: write 0.1 or 8/255")
    if not (lowest <= number <= (math.inf if highest is None else highest)) or math.isinf(number):
        top = "" if highest is None else f" to {highest:g}"
        hint = "" if percent or highest is None or not 1 < number <= 100 else f"; {number:g} % is {number / 100:g}"
        raise UserError(f"gate {gate!r}: {text} is no number from {lowest:g}{top}{hint}")
    return number


def judge_gates(gates: Sequence[Gate], result: Any, metrics: Mapping[str, Metric] = METRICS) -> GateReport:
    """Judge every gate. What a result does not have is missed, with the reason.

    Args:
        gates: of :func:`parse_gates`.
        result: an ``AuditResult``, or what the metrics are of.
        metrics: those the gates were read with.
    """
    return GateReport(gates=[_judge(gate, metrics[gate.metric].read(result, gate.of)) for gate in gates])


def _judge(gate: Gate, found: Reading | bool | str) -> GateResult:
    required = "yes" if gate.number is None else f"{gate.end} {gate.sign} {gate.number:.4g}".strip()
    about = {"gate": gate.text, "required": required}
    if gate.number is None:
        held = found is True
        return GateResult(**about, value=held, held=held, reason=found if isinstance(found, str) else "")
    if isinstance(found, bool | str):
        return GateResult(**about, value=None, held=False, reason=str(found))
    compared = getattr(found, gate.end) if gate.end else found.value
    held, reason = compared is not None and _COMPARE[gate.sign](compared, gate.number), ""
    if compared is None:
        reason = "its interval has no such end"
    elif found.open_above and gate.end != "low":  # eps_uni, where the search ended without success
        if gate.sign.startswith("<"):
            held, reason = False, f"it is more than {found.value:.4g}, by an unknown amount"
        elif not held:
            reason = f"the search ended at {found.value:.4g}, and it may be more"
    return GateResult(**about, value=found.value, low=found.low, high=found.high, held=held, reason=reason)


def refuse_unmeasured(
    gates: Sequence[Gate], eps: Sequence[float], checks: Sequence[str], missing: Mapping[str, str]
) -> None:
    """Refuse gates about numbers that an audit will not have, before it begins.

    Args:
        gates: of :func:`parse_gates`.
        eps: radii of its curve.
        checks: names of its checks.
        missing: why it will have no numbers of a kind (:attr:`Metric.known`), or none of a name (``check:NAME``).

    Raises:
        UserError: one is, with the reason.
    """
    named = {_slug(name): reason for name, reason in missing.items()}
    for gate in gates:
        reason = missing.get(METRICS[gate.metric].known, "") or named.get(_slug(f"{gate.metric}:{gate.of}"), "")
        if METRICS[gate.metric].after == "@" and gate.of and place_of(gate.of, eps) is None:
            reason = _no_eps(gate.of, eps)
        if gate.metric == "check" and _slug(gate.of) not in map(_slug, checks):
            reason = str(unknown_name("check", gate.of, checks))
        if reason:
            raise UserError(f"gate {gate.text!r}: {reason}")
