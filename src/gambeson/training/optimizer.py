"""The optimiser of a run: which parameters move, at which share of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gambeson.defenses import Defense
from gambeson.training.recipe import Recipe


def make_optimizer(model: nn.Module, defense: Defense, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimiser; each group's ``lr_scale`` multiplies the learning rate of the schedule."""
    special = defense.groups(model)
    taken = {parameter for group in special for parameter in group["params"]}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p not in taken]
    groups: list[dict[str, Any]] = [*_by_depth(rest, recipe.layer_decay), *special]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=recipe.lr, alpha=0.9, eps=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def freeze_statistics(model: nn.Module) -> None:
    """Hold the running statistics of every BatchNorm, as they are used in evaluation; weights still move."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _by_depth(named: list[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """One group a module with parameters, in the order of the model, the last at full rate."""
    if decay == 1:
        return [{"params": [parameter for _, parameter in named]}]
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        modules.setdefault(name.rpartition(".")[0], []).append(parameter)
    depth = len(modules) - 1
    return [{"params": several, "lr_scale": decay ** (depth - k)} for k, several in enumerate(modules.values())]
