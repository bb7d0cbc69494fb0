"""A model while it is attacked: frozen, counted, and given back exactly as it was."""

from gambeson.victim.bn_folding import Folded, folded
from gambeson.victim.inspect import Look, look_at
from gambeson.victim.scoring import (
    DRAWS,
    NO_ANSWER,
    Score,
    auto_batch_size,
    counting,
    majority,
    nothing_counts,
    predict,
    predicted,
    right_answers,
    score,
    vote,
    votes_of,
    votes_right,
)
from gambeson.victim.victim import BatchNormMode, Fast, Precision, Victim, frozen

__all__ = [
    "DRAWS",
    "NO_ANSWER",
    "BatchNormMode",
    "Fast",
    "Folded",
    "Look",
    "Precision",
    "Score",
    "Victim",
    "auto_batch_size",
    "counting",
    "folded",
    "frozen",
    "look_at",
    "majority",
    "nothing_counts",
    "predict",
    "predicted",
    "right_answers",
    "score",
    "vote",
    "votes_of",
    "votes_right",
]
