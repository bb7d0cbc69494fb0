"""Evaluation: rates with intervals, controls, attack suites, eps_uni and transfer tables."""

from gambeson.evaluation.attack_run import AttackRun, run_attack
from gambeson.evaluation.attack_suite import SuiteResult, SuiteRun, run_suite, standard_suite
from gambeson.evaluation.binarization import BinarizationResult, BinarizationTest, binarization_test, binarization_tests
from gambeson.evaluation.classes import Auc, ClassRates, ClassView, area_under_curve, by_class
from gambeson.evaluation.edits import STANDARD_EDITS, EditedRates, EditsResult, under_edits
from gambeson.evaluation.eps_uni import eps_adv, eps_uni
from gambeson.evaluation.export_check import Exported, run_export
from gambeson.evaluation.outcome import accuracy_under, outcome, outcome_under
from gambeson.evaluation.perceptibility import edge_correlation, visibility
from gambeson.evaluation.placement import PlacedRate, PlacementResult, by_placement
from gambeson.evaluation.targeted import TargetMeasure, TargetSuccess, target_success
from gambeson.evaluation.transfer import TransferResult, TransferRun, run_transfer
from gambeson.evaluation.uap_score import MapScore, UapScore, score_uap
from gambeson.evaluation.universal import (
    accuracy,
    confusion,
    control_rates,
    fooling_rate,
    mean_iou,
    rates_beside,
    strongest,
    universal_evasion,
)
from gambeson.models.black_box.base import BlackBox, BudgetSpent
from gambeson.models.black_box.http import HttpModel
from gambeson.models.black_box.local import FunctionModel, OnnxModel
from gambeson.models.loading import LoadedModel, load_model
from gambeson.tasks import Confusion, Difference, Rate

__all__ = [
    "STANDARD_EDITS",
    "AttackRun",
    "Auc",
    "BinarizationResult",
    "BinarizationTest",
    "BlackBox",
    "BudgetSpent",
    "ClassRates",
    "ClassView",
    "Confusion",
    "Difference",
    "EditedRates",
    "EditsResult",
    "Exported",
    "FunctionModel",
    "HttpModel",
    "LoadedModel",
    "MapScore",
    "OnnxModel",
    "PlacedRate",
    "PlacementResult",
    "Rate",
    "SuiteResult",
    "SuiteRun",
    "TargetMeasure",
    "TargetSuccess",
    "TransferResult",
    "TransferRun",
    "UapScore",
    "accuracy",
    "accuracy_under",
    "area_under_curve",
    "binarization_test",
    "binarization_tests",
    "by_class",
    "by_placement",
    "confusion",
    "control_rates",
    "edge_correlation",
    "eps_adv",
    "eps_uni",
    "fooling_rate",
    "load_model",
    "mean_iou",
    "outcome",
    "outcome_under",
    "rates_beside",
    "run_attack",
    "run_export",
    "run_suite",
    "run_transfer",
    "score_uap",
    "standard_suite",
    "strongest",
    "target_success",
    "under_edits",
    "universal_evasion",
    "visibility",
]
