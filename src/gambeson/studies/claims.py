"""Claims: falsifiable statements about the numbers of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gambeson.base import Config, Number, UserError
from gambeson.studies.measures import Metric

At = Literal["steps", "seconds"]


def _side(value: Any) -> Any:
    return {"defense": value} if isinstance(value, str) else value


class Side(Config):
    """One side of a comparison."""

    defense: str = ""
    """Its label in the study; empty in a correlation, which is taken over all."""
    metric: Metric | None = None
    """None: the claim's."""
    variant: str = ""
    """Values of the grid, such as ``sigma 0.5``. Empty: the variant with the best score on validation (see
    :class:`gambeson.studies.study.Search`), or all of them where fronts are compared."""


class Keeping(Config):
    """Which variants may be chosen: those that keep most of another defence's accuracy on validation."""

    than: str
    """The other defence's label."""
    drop: Annotated[Number, Field(ge=0, lt=1)] = 0.01
    """How much lower the accuracy on clean validation images may be: 0.01 is one point."""


AnySide = Annotated[Side, BeforeValidator(_side)]


class Claim(Config):
    """A statement about two defences, or two measurements of one, which a study can refute.

    The effect is computed seed by seed, from models that share their seed, and has an interval by Student's
    distribution over the seeds. The claim is *reproduced* where the whole interval is on its side of the margin, *not
    reproduced* where the whole is on the other, and else *undecided*.
    """

    statement: str
    """In words."""
    source: str = ""
    """Paper and section."""
    metric: Metric | None = None
    of: AnySide
    to: AnySide | None = None
    how: Literal["difference", "ratio", "value", "correlation"] = "difference"
    """``difference`` of minus to; ``ratio`` of over to (its interval is computed on logarithms); ``value``: of alone;
    ``correlation``: over all models of a seed, how much higher the absolute rank correlation of ``of.metric`` with the
    claim's metric is than that of ``to.metric``."""
    at_least: Number | None = None
    """The margin that the effect has to reach."""
    at_most: Number | None = None
    """The margin that the effect may not exceed; one of the two is given."""
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95
    """Of the two-sided interval."""
    matched: Metric | None = None
    """Compare the two sides' fronts at equal values of this metric, such as the clean accuracy, instead of single
    variants: every front is interpolated, on logarithms for a ratio, at values that both have; no extrapolation."""
    keeping: Keeping | None = None
    data: tuple[str, ...] = ()
    """The data sets that it is about; empty: all."""
    models: tuple[str, ...] = ()
    """The architectures; likewise."""
    at: tuple[At, ...] = ()
    """What the compared trainings have in common; empty: each of the study's. ``[steps]`` for one model against itself,
    or where a step of both takes the same."""
    need: Literal["all", "any"] = "all"
    """Whether it has to hold on all of them, or on any. One of them alone then decides that it does not, or that it
    does, at the confidence of Bonferroni's correction; with ``any`` the intervals are those."""

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("expected a margin: either at_least or at_most")
        if self.how in ("difference", "ratio") and self.to is None:
            raise ValueError(f"a {self.how} has two sides: give to")
        if self.how == "correlation" and (self.of.metric is None or self.metric is None):
            raise ValueError("a correlation is of of.metric with metric: give both")
        if self.how != "correlation" and any(not side.defense for side in self.sides):
            raise ValueError("each side names its defence")
        if self.how in ("difference", "ratio") and self.of == self.to:
            raise ValueError(f"both sides are {self.of.defense}, of the same metric and variant: name another one")
        if self.how == "ratio" and min(self.margin, 1) <= 0:
            raise ValueError(f"a ratio has a positive margin, got {self.margin:g}")
        for side in self.sides:
            if side.metric is None and self.metric is None:
                raise ValueError("expected a metric, of the claim or of each side")
        return self

    @property
    def sides(self) -> list[Side]:
        """Both sides, or the only one."""
        return [self.of, *([] if self.to is None else [self.to])]

    @property
    def margin(self) -> float:
        """The margin."""
        return self.at_most if self.at_least is None else self.at_least  # type: ignore[return-value]

    @property
    def defenses(self) -> list[str]:
        """Labels of every defence that it names."""
        named = [side.defense for side in self.sides] + ([self.keeping.than] if self.keeping else [])
        return [name for name in named if name]

    @property
    def metrics(self) -> list[str]:
        """Every metric that it names."""
        named = [self.metric, self.matched, *(side.metric for side in self.sides)]
        return [name for name in named if name]

    def reads(self, defense: str, variant: str) -> set[str]:
        """Labels of what it reads of a model; empty: nothing."""
        keeps = self.keeping is not None and self.keeping.than == defense
        found = {"train"} if keeps else set()
        for side in self.sides:
            if side.defense in ("", defense) and side.variant in ("", variant):
                metrics = {self.metric, side.metric} if self.how == "correlation" else {side.metric or self.metric}
                found |= {"train", *(metric.partition(".")[0] for metric in metrics | {self.matched} if metric)}
        return found

    def check(self, seeds: Sequence[int]) -> None:
        """Refuse what no seed could decide.

        Raises:
            UserError: there is a single seed.
        """
        if len(seeds) < 2:
            raise UserError(
                f"a study with claims has {len(seeds)} seed: an interval over seeds needs 2 or more; give seeds: 3"
            )
