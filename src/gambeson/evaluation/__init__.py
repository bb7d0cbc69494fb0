"""Honest numbers: rates with intervals, controls beside attacks, checks that can overturn a verdict."""

from gambeson.evaluation.attack_run import AttackRun, run_attack
from gambeson.evaluation.attack_suite import Cascade, CascadeResult, run_cascade, standard_attacks
from gambeson.evaluation.eps_uni import eps_adv, eps_uni
from gambeson.evaluation.export_check import Exported, run_export
from gambeson.evaluation.outcome import Outcome, accuracy_under, outcome, outcome_under
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.transfer import TransferResult, TransferRun, run_transfer
from gambeson.evaluation.universal import accuracy, control_rates, fooling_rate, strongest, universal_evasion
from gambeson.models.black_box.base import BlackBox, BudgetSpent
from gambeson.models.black_box.http import HttpScores
from gambeson.models.black_box.local import FunctionScores, OnnxScores
from gambeson.models.loading import LoadedModel, load_subject

__all__ = [
    "AttackRun",
    "BlackBox",
    "BudgetSpent",
    "Cascade",
    "CascadeResult",
    "Exported",
    "FunctionScores",
    "HttpScores",
    "LoadedModel",
    "OnnxScores",
    "Outcome",
    "Rate",
    "TransferResult",
    "TransferRun",
    "accuracy",
    "accuracy_under",
    "control_rates",
    "eps_adv",
    "eps_uni",
    "fooling_rate",
    "load_subject",
    "outcome",
    "outcome_under",
    "run_attack",
    "run_cascade",
    "run_export",
    "run_transfer",
    "standard_attacks",
    "strongest",
    "universal_evasion",
]
