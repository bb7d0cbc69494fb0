"""The zoo: trained networks and universal perturbations by name, each with its card, training run and audit.

A network's name with ``zoo:`` before it is a model wherever a model is named, and its perturbation wherever the file of
one is. The files come with the package ``gambeson-zoo``.

>>> import gambeson as gb
>>> model = gb.zoo.load("digits/lenet5/standard")
>>> uap = gb.zoo.load_uap("digits/lenet5/standard")
>>> gb.evaluation.universal_evasion(model, gb.data.load("digits"), uap).value > 0.3
True
"""

from gambeson.models.zoo import Entry, entry
from gambeson.zoo.library import Verification, card, list, load, load_audit, load_uap, verify

__all__ = ["Entry", "Verification", "card", "entry", "list", "load", "load_audit", "load_uap", "verify"]
