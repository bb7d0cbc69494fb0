"""Honest numbers: rates with intervals, controls beside attacks, checks that can overturn a verdict."""

from gambeson.evaluation.attack_run import AttackRun, run_attack
from gambeson.evaluation.black_box import BlackBox, BudgetSpent
from gambeson.evaluation.cascade import Cascade, CascadeResult, run_cascade
from gambeson.evaluation.eps_uni import eps_adv, eps_uni
from gambeson.evaluation.exporting import Exported, run_export
from gambeson.evaluation.http_scores import HttpScores
from gambeson.evaluation.local_scores import FunctionScores, OnnxScores
from gambeson.evaluation.outcome import Outcome, accuracy_under, outcome, outcome_under
from gambeson.evaluation.rates import Rate
from gambeson.evaluation.standard import standard_attacks
from gambeson.evaluation.subjects import LoadedModel, load_subject
from gambeson.evaluation.transfer import TransferResult, TransferRun, run_transfer
from gambeson.evaluation.universal import accuracy, control_rates, fooling_rate, strongest, universal_evasion

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
