"""Models under attack: frozen, counted and restored; averages over models and samples; scoring."""

from gambeson.victim.averaged import (
    EOT_SAMPLES,
    Average,
    AveragedVictim,
    EditedVictim,
    ModelAverage,
    Source,
    as_victim,
)
from gambeson.victim.bn_folding import FoldedModel, fold_batchnorms, signature
from gambeson.victim.inspect import ModelTraits, inspect_model
from gambeson.victim.scoring import (
    ABSTAIN,
    DEFAULT_VOTES,
    Score,
    auto_batch_size,
    majority,
    nothing_counts,
    predict,
    predict_batches,
    predicted,
    score,
    score_batches,
    vote,
    votes_of,
    votes_right,
)
from gambeson.victim.temperature import Temperature, calibrating, rescaled
from gambeson.victim.victim import BatchNormMode, FastPath, Precision, Victim, copied, frozen

__all__ = [
    "ABSTAIN",
    "DEFAULT_VOTES",
    "EOT_SAMPLES",
    "Average",
    "AveragedVictim",
    "BatchNormMode",
    "EditedVictim",
    "FastPath",
    "FoldedModel",
    "ModelAverage",
    "ModelTraits",
    "Precision",
    "Score",
    "Source",
    "Temperature",
    "Victim",
    "as_victim",
    "auto_batch_size",
    "calibrating",
    "copied",
    "fold_batchnorms",
    "frozen",
    "inspect_model",
    "majority",
    "nothing_counts",
    "predict",
    "predict_batches",
    "predicted",
    "rescaled",
    "score",
    "score_batches",
    "signature",
    "vote",
    "votes_of",
    "votes_right",
]
