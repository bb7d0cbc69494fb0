"""How to train, whatever the objective is: length, optimiser, schedule, augmentation, precision."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import Config, Number, unknown_name
from gambeson.defenses import Defense

PRESETS: dict[str, dict[str, Any]] = {
    "shared-adversarial": {
        "epochs": 65,
        "lr": 0.0025,
        "schedule": "steps",
        "milestones": (50,),
        "augment": "crop-flip",
    },
    "ensemble-adversarial-mnist": {
        "epochs": 12,
        "batch_size": 64,
        "optimizer": "adam",
        "lr": 0.001,
        "weight_decay": 0.0,
        "schedule": "constant",
    },
    "ensemble-adversarial-imagenet": {
        "epochs": 280,
        "batch_size": 800,
        "optimizer": "rmsprop",
        "lr": 0.045,
        "schedule": "steps",
        "decay_every": 2,
        "gamma": 0.94,
        "augment": "imagenet",
    },
    "learn2perturb": {
        "epochs": 350,
        "lr": 0.1,
        "nesterov": True,
        "weight_decay": 3e-4,
        "schedule": "steps",
        "milestones": (150, 250),
        "augment": "crop-flip",
    },
}
"""Recipes of the papers, by the name that ``Recipe(preset=NAME)`` reads; what they leave out is the default, ours.

``shared-adversarial``: Mummadi et al. 2019 on CIFAR-10, at a rate that asks for pretrained weights (augmentation ours).
``ensemble-adversarial-mnist``: the released code of Tramèr et al. 2018. ``ensemble-adversarial-imagenet``: that paper's
ens3 and ens4 on ImageNet, 50 machines of 16 images; the weights of Kurakin et al. 2017, whose recipe it goes on with,
are the defence's: ``EnsembleAdversarial(weight=0.3, random_eps=True, mixing="half", attack="step-ll")``.
``learn2perturb``: the released script of Jeddi et al. 2020.
"""


class Recipe(Config):
    """An optimiser and a schedule. The defaults are ours unless a preset of a paper sets them.

    ``Recipe(preset=NAME)`` starts from one of :data:`PRESETS`; fields given beside it replace the preset's. The object,
    and with it ``run.yaml``, holds the fields and not the name.

    Raises:
        UserError: a preset is unknown, or a value is out of its range.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all processes; the last, smaller batch of an epoch is left out."""
    lr: Annotated[Number, Field(gt=0)] = 0.05
    """Learning rate at the start (after the warm-up)."""
    optimizer: Literal["sgd", "adam", "rmsprop"] = "sgd"
    """``adam`` has its customary moments (Tramèr et al. 2018 on MNIST: lr 0.001). ``rmsprop`` is that of Inception
    networks (Szegedy et al. 2016, section 8: decay 0.9, epsilon 1), on ImageNet in Tramèr et al. 2018."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Of ``sgd`` and ``rmsprop``."""
    nesterov: bool = False
    """Of ``sgd``."""
    weight_decay: Annotated[Number, Field(ge=0)] = 5e-4
    """On every parameter, as in the papers' settings."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """``cosine`` falls to zero at the end; ``steps`` multiplies by ``gamma`` after each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``steps`` multiplies the learning rate."""
    decay_every: Annotated[int, Field(ge=0)] = 0
    """``steps`` multiplies the learning rate after every so many epochs as well; 0: at the milestones only."""
    gamma: Annotated[Number, Field(gt=0, le=1)] = 0.1
    warmup: Annotated[Number, Field(ge=0)] = 0.0
    """Epochs over which the learning rate rises from zero in a straight line."""
    augment: Literal["none", "crop", "crop-flip", "imagenet"] = "none"
    """``crop``: random shifts by up to 4 pixels; ``crop-flip``: and mirror images; ``imagenet``: a random box of 8 to
    100 % of the area, enlarged, and mirror images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training forwards; perturbations and verdicts stay in float32."""
    channels_last: bool = False
    """Lay the weights of convolutions out by pixel, and with them all that flows through: the same network, rounded
    differently, and often faster where it has many channels."""
    select: Literal["last", "best", "best-universal", "best-pgd"] = "last"
    """Which epoch's weights to keep. By the validation split, ``best`` has the lowest clean error,
    ``best-universal`` the lowest universal evasion rate, ``best-pgd`` the highest accuracy under PGD; the latter two
    among the epochs that ``robust_every`` measures."""
    robust_every: Annotated[int, Field(ge=0)] = 0
    """Measure short attacks on the validation split after every so many epochs, and after the last; 0: never."""
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of weights and statistics with this decay a step; it is what is validated
    and handed back."""
    freeze_statistics: bool = False
    """Leave BatchNorm's running statistics as they are, for fine-tuning."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one before it, for fine-tuning."""
    track: Literal["none", "tensorboard", "mlflow"] = "none"
    """Where the epochs' numbers go beside ``metrics.jsonl``; needs the extra ``track``."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("preset") is None:
            return fields
        name = fields["preset"]
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return PRESETS[name] | {key: value for key, value in fields.items() if key != "preset"}

    @model_validator(mode="after")
    def _check_selection(self) -> Recipe:
        if self.select.startswith("best-") and not self.robust_every:
            raise ValueError(f"select {self.select!r} needs robust_every of 1 or more, got 0")
        return self

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run: a function of nothing else."""
        epoch = step / steps_per_epoch
        rise = min(1.0, (epoch + 1 / steps_per_epoch) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            return self.lr * rise * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.schedule == "steps":
            falls = sum(epoch >= milestone for milestone in self.milestones)
            return self.lr * rise * self.gamma ** (falls + (int(epoch / self.decay_every) if self.decay_every else 0))
        return self.lr * rise


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
