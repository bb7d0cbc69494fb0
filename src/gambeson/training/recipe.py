"""How to train, whatever the objective is: length, optimiser, schedule, augmentation, precision."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gambeson.base import Config, Number


class Recipe(Config):
    """An optimiser and a schedule. The defaults are ours unless a preset of a paper sets them."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all processes; the last, smaller batch of an epoch is left out."""
    lr: Annotated[Number, Field(gt=0)] = 0.05
    """Learning rate at the start (after the warm-up)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Momentum belongs to ``sgd``; ``adam`` has its customary moments (Tramèr et al. 2018 on MNIST: lr 0.001)."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[Number, Field(ge=0)] = 5e-4
    """On every parameter, as in the papers' settings."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """``cosine`` falls to zero at the end; ``steps`` multiplies by ``gamma`` after each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``steps`` multiplies the learning rate."""
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
            return self.lr * rise * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * rise
