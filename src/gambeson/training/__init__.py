"""The loop that minimises a defence's objective, and the run folder it leaves."""

from gambeson.training.loop import train
from gambeson.training.recipe import PRESETS, Recipe
from gambeson.training.run import TrainingCost, TrainRun, plan, plan_training, run_training

__all__ = ["PRESETS", "Recipe", "TrainRun", "TrainingCost", "plan", "plan_training", "run_training", "train"]
