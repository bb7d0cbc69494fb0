"""Training: recipes, the loop that minimises a defence's objective, cost estimates and run folders."""

from gambeson.training.loop import train
from gambeson.training.recipe import PRESETS, Recipe
from gambeson.training.run import TrainingCost, TrainRun, plan, plan_training, run_training

__all__ = ["PRESETS", "Recipe", "TrainRun", "TrainingCost", "plan", "plan_training", "run_training", "train"]
