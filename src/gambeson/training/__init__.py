"""Training: recipes, the loop that minimises a defence's objective, cost estimates and run folders."""

from gambeson.training.loop import train
from gambeson.training.recipe import PRESETS, Recipe
from gambeson.training.run import Plan, TrainRun, plan, plan_training, run_training

__all__ = ["PRESETS", "Plan", "Recipe", "TrainRun", "plan", "plan_training", "run_training", "train"]
