"""A model while it is attacked: frozen, counted, and given back exactly as it was."""

from gambeson.victim.fold import folded
from gambeson.victim.scoring import Score, predict, score
from gambeson.victim.victim import Victim, frozen

__all__ = ["Score", "Victim", "folded", "frozen", "predict", "score"]
