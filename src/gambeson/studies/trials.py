"""Searches by trials: what may be chosen, and Optuna, which proposes the next trial from the scores so far."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from gambeson.base import Config, Number, derive, required


class Range(Config):
    """The numbers between two, both included."""

    low: Number
    high: Number
    log: bool = False
    """Spread evenly over the logarithms, as for learning rates."""
    whole: bool = False
    """Whole numbers alone."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"expected low below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs positive numbers, got {self.low:g}")
        return self


def _range(value: Any) -> Any:
    return Range(**value) if isinstance(value, Mapping) else value


Choice = Annotated[Annotated[tuple[Any, ...], Field(min_length=1)] | Range, BeforeValidator(_range)]
"""Some values, or a range of numbers."""
NumberChoice = Annotated[Annotated[tuple[Number, ...], Field(min_length=1)] | Range, BeforeValidator(_range)]
"""Some numbers, or a range."""


def ends(choice: Choice) -> tuple[Any, ...]:
    """Return every value of some, or the least and the largest number of a range."""
    if not isinstance(choice, Range):
        return choice
    return tuple(int(end) if choice.whole else end for end in (choice.low, choice.high))


def propose(
    space: Mapping[str, Choice],
    now: Mapping[str, Any],
    done: Sequence[tuple[Mapping[str, Any], float]],
    seed: int,
) -> dict[str, Any]:
    """Return the settings of the next trial, by the tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna.

    The first trial is of the settings as they are, if they lie in the space. Each proposal follows from the trials
    before it and the seed alone, so that a search that was cut goes on as if it had not been.

    Args:
        space: what may be chosen, by the names of settings.
        now: the settings as they are.
        done: the trials so far with their scores, of which higher ones are better.
        seed: of the draws.

    Raises:
        UserError: Optuna is missing.
    """
    optuna = required("optuna", "a search by trials", "leave trials out")
    spread: dict[str, Any] = {}
    for name, choice in space.items():
        if not isinstance(choice, Range):
            spread[name] = optuna.distributions.CategoricalDistribution(choice)
        elif choice.whole:
            spread[name] = optuna.distributions.IntDistribution(int(choice.low), int(choice.high), log=choice.log)
        else:
            spread[name] = optuna.distributions.FloatDistribution(choice.low, choice.high, log=choice.log)
    if not done and all(_within(choice, now.get(name)) for name, choice in space.items()):
        return {name: now[name] for name in space}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=derive(seed, "trial", len(done)) % 2**32)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of categories such as tuples, which it can only not store in a database
            for params, score in done:
                study.add_trial(optuna.create_trial(params=dict(params), distributions=spread, value=score))
            return dict(study.ask(spread).params)
    finally:
        optuna.logging.set_verbosity(before)


def _within(choice: Choice, value: Any) -> bool:
    if not isinstance(choice, Range):
        return value in choice
    return isinstance(value, int | float) and choice.low <= value <= choice.high
