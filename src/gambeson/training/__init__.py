"""The loop that minimises a defence's objective, and the run folder it leaves."""

from gambeson.training.loop import train
from gambeson.training.recipe import Recipe
from gambeson.training.run import TrainRun, run_training

__all__ = ["Recipe", "TrainRun", "run_training", "train"]
