"""Hardening: fine-tuning of a trained model against perturbations, with an audit before and after and one report."""

from gambeson.hardening.job import harden
from gambeson.hardening.result import Hardened
from gambeson.hardening.run import HardenRun, plan_harden, run_harden
from gambeson.hardening.settings import Hardening, HardenPlan

__all__ = ["HardenPlan", "HardenRun", "Hardened", "Hardening", "harden", "plan_harden", "run_harden"]
