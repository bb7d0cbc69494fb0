"""A testbed for robustness evaluations: obfuscated and honest models with known ground truth.

It measures the error rates of an audit, a detector or an attack suite: the share of obfuscated models it misses, and of
honest ones it accuses.

>>> import gambeson as gb
>>> score = gb.testbed.score(lambda model, data: True, models=["four grey levels", "standard"])
>>> score.missed.value, score.accused.value
(1.0, 0.0)
"""

from gambeson.testbed.entry import KINDS, Entry
from gambeson.testbed.judgement import AUDITORS, Judgement, broken
from gambeson.testbed.library import TestbedModel, load, models
from gambeson.testbed.recipes import DATA, networks, networks_on
from gambeson.testbed.scoring import Outcome, TestbedScore, score
from gambeson.testbed.truth import GroundTruth

__all__ = [
    "AUDITORS",
    "DATA",
    "KINDS",
    "Entry",
    "GroundTruth",
    "Judgement",
    "Outcome",
    "TestbedModel",
    "TestbedScore",
    "broken",
    "load",
    "models",
    "networks",
    "networks_on",
    "score",
]
