"""A testbed for robustness evaluations: obfuscated models whose ground truth is known, and honest ones beside them.

Anyone can score an audit, a detector or an attack suite on it: how many of the obfuscated models does it believe, and
how many of the honest ones does it accuse?

>>> import gambeson as gb
>>> score = gb.testbed.score(lambda model, data: True, models=["four grey levels", "standard"])
>>> score.missed.value, score.accused.value
(1.0, 0.0)
"""

from gambeson.testbed.auditors import AUDITORS
from gambeson.testbed.entry import KINDS, Entry
from gambeson.testbed.judgement import Judgement, broken
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
