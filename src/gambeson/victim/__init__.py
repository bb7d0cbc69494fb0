"""A model while it is attacked: frozen, counted, and given back exactly as it was."""

from gambeson.victim.fold import folded
from gambeson.victim.look import Look, look_at
from gambeson.victim.scoring import Score, predict, score
from gambeson.victim.victim import Victim, frozen

__all__ = ["Look", "Score", "Victim", "folded", "frozen", "look_at", "predict", "score"]
