"""Recipes: training length, optimiser, schedule, augmentation and precision, independent of the objective."""

from __future__ import annotations

import math
import warnings
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import Config, Number, unknown_name
from gambeson.base.errors import DataWarning
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
    "segmentation": {
        "epochs": 30,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 0.004,
        "weight_decay": 0.0,
        "warmup": 1.0,
        "augment": "crop-flip",
    },
}
"""Recipes of the papers and one for label maps, for ``Recipe(preset=NAME)``; omitted fields have our defaults.

``shared-adversarial``: Mummadi et al. 2019 on CIFAR-10, with a learning rate for pretrained weights (augmentation
ours). ``ensemble-adversarial-mnist``: the released code of Tramèr et al. 2018. ``ensemble-adversarial-imagenet``: that
paper's ens3 and ens4 on ImageNet, 50 machines of 16 images; the weights of Kurakin et al. 2017, whose recipe it
follows, are settings of the defence: ``EnsembleAdversarial(weight=0.3, random_eps=True, mixing="half",
attack="step-ll")``. ``learn2perturb``: the released script of Jeddi et al. 2020. ``segmentation`` (ours): a small
network trained from scratch on some thousands of label maps; the default of ``gambeson train`` for them.
"""


_OF_STEPS = ("milestones", "decay_every", "gamma")
"""Fields that have an effect on the schedule ``steps`` alone."""


class Recipe(Config):
    """An optimiser and a schedule. The defaults are ours unless a preset sets them.

    ``Recipe(preset=NAME)`` starts from one of :data:`PRESETS`; fields given with it override the preset's. The object,
    and hence ``run.yaml``, stores the fields, not the name.

    Raises:
        UserError: a preset is unknown, or a value is out of its range.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images per step over all processes; a smaller last batch of an epoch is left out."""
    lr: Annotated[Number, Field(gt=0)] = 0.05
    """Initial learning rate (after the warm-up)."""
    optimizer: Literal["sgd", "adam", "rmsprop"] = "sgd"
    """``adam`` has its default moments (Tramèr et al. 2018 on MNIST: lr 0.001). ``rmsprop`` is that of Inception
    networks (Szegedy et al. 2016, section 8: decay 0.9, epsilon 1), on ImageNet in Tramèr et al. 2018."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Momentum of ``sgd`` and ``rmsprop``."""
    nesterov: bool = False
    """Nesterov momentum, for ``sgd``."""
    weight_decay: Annotated[Number, Field(ge=0)] = 5e-4
    """Weight decay of every parameter, as in the papers' settings."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """``cosine`` falls to zero at the end; ``steps`` multiplies by ``gamma`` after each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``steps`` multiplies the learning rate."""
    decay_every: Annotated[int, Field(ge=0)] = 0
    """``steps`` also multiplies the learning rate after every so many epochs; 0: only at the milestones."""
    gamma: Annotated[Number, Field(gt=0, le=1)] = 0.1
    warmup: Annotated[Number, Field(ge=0)] = 0.0
    """Epochs of linear warm-up from zero."""
    augment: Literal["none", "crop", "crop-flip", "imagenet"] = "none"
    """``crop``: random shifts by up to 4 pixels; ``crop-flip``: also horizontal flips; ``imagenet``: random resized
    crops of 8 to 100 % of the area, and flips."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the training forwards; crafting and scoring stay in float32."""
    channels_last: bool = False
    """Use the channels-last memory layout: the same network with different rounding, often faster with many
    channels."""
    select: Literal["last", "best", "best-universal", "best-pgd", "best-robust"] = "last"
    """The epoch whose weights are kept. On validation, ``best`` has the lowest clean error (of label maps the highest
    mean IoU), ``best-universal`` the lowest universal evasion rate, ``best-pgd`` the highest accuracy under PGD, and
    ``best-robust`` the highest mean of the accuracies under both; the latter three among the epochs measured by
    ``robust_every``."""
    least_accuracy: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Accuracy on clean validation images below which ``select`` takes no epoch."""
    robust_every: Annotated[int, Field(ge=0)] = 0
    """Run short attacks on validation after every so many epochs, and after the last; 0: never."""
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of weights and statistics, which is then validated and
    returned."""
    ema_warmup: bool = False
    """Whether the decay of step n is at most (1 + n) / (10 + n), so that short trainings forget their first weights."""
    freeze_statistics: bool = False
    """Freeze BatchNorm's running statistics, for fine-tuning."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer to the previous one, for fine-tuning."""
    track: Literal["none", "tensorboard", "mlflow"] = "none"
    """Tracker of the epochs' numbers, in addition to ``metrics.jsonl``; needs the extra ``track``."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("preset") is None:
            return fields
        name = fields["preset"]
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        given = {key: value for key, value in fields.items() if key != "preset"}
        other = "schedule" in given and given["schedule"] != PRESETS[name].get("schedule")
        return {k: v for k, v in PRESETS[name].items() if not (other and k in _OF_STEPS)} | given

    @model_validator(mode="after")
    def _check_selection(self) -> Recipe:
        if self.select.startswith("best-") and not self.robust_every:
            raise ValueError(f"select {self.select!r} needs robust_every of 1 or more, got 0")
        if self.select == "last" and self.least_accuracy:
            raise ValueError("least_accuracy is for choosing an epoch: give select, such as best")
        idle = [name for name in _OF_STEPS if getattr(self, name) != type(self).model_fields[name].default]
        if self.schedule != "steps" and idle:
            said = f"{idle[0]} has no effect on the schedule {self.schedule!r}: set schedule=steps"
            warnings.warn(said, stacklevel=2)
        if self.warmup > self.epochs:
            warnings.warn(
                f"a warmup of {self.warmup:g} epochs is longer than the training of {self.epochs}, which never reaches "
                "lr: give a shorter one",
                stacklevel=2,
            )
        return self

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        epoch = step / steps_per_epoch
        rise = min(1.0, (epoch + 1 / steps_per_epoch) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            return self.lr * rise * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.schedule == "steps":
            falls = sum(epoch >= milestone for milestone in self.milestones)
            return self.lr * rise * self.gamma ** (falls + (int(epoch / self.decay_every) if self.decay_every else 0))
        return self.lr * rise


def recipe_for(defense: Defense, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe, with those of the defence where they are not given; a preset replaces those."""
    return given if given.get("preset") is not None else {**defense.recipe, **given}


def fitted(fields: dict[str, Any], images: int) -> dict[str, Any]:
    """Return the fields of a recipe, with a batch that so many training images fill where none was asked for."""
    size = Recipe(**fields).batch_size
    if "batch_size" in fields or not 0 < images < size:
        return fields
    fewer = 1 << (images.bit_length() - 1)
    warnings.warn(
        f"a batch has {fewer} images in place of {size}, for there are only {images} to train on",
        DataWarning,
        stacklevel=3,
    )
    return fields | {"batch_size": fewer}


def make_optimizer(model: nn.Module, defense: Defense, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimiser; the ``lr_scale`` of a group multiplies the scheduled learning rate."""
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
        fused=all(parameter.is_cuda for parameter in model.parameters()) or None,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def freeze_statistics(model: nn.Module) -> None:
    """Freeze the running statistics of every BatchNorm and use them; weights are still trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _by_depth(named: list[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """One group per module with parameters, in model order, the last at the full rate."""
    if decay == 1:
        return [{"params": [parameter for _, parameter in named]}]
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        modules.setdefault(name.rpartition(".")[0], []).append(parameter)
    depth = len(modules) - 1
    return [{"params": several, "lr_scale": decay ** (depth - k)} for k, several in enumerate(modules.values())]
