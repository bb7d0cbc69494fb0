"""Attacks of Foolbox, torchattacks and ART, called as ours are.

The peers come with the extra ``bench``; the library itself never imports them. Their attacks are built here by the
names that they have there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gambeson.studies.bench import Attack, BenchSettings

warnings.filterwarnings("ignore")


def foolbox_attack(kind: str, *, eps: float | None, targeted: bool = False, **settings: Any) -> Attack:
    """Build an attack of Foolbox; called with labels, or with targets where ``targeted``.

    Args:
        kind: name in ``foolbox.attacks``.
        eps: radius; None leaves a minimal-norm attack without a bound.
        targeted: whether labels are targets to reach.
        settings: of that class.
    """
    import foolbox

    attack = getattr(foolbox.attacks, kind)(**settings)

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        goal = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
        return attack(wrapped, x, goal(y), epsilons=eps)[1]

    return run


class Grey(nn.Module):
    """A model of one channel that takes three and looks at their mean, for attacks that know colour images only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the model's logits of the mean channel."""
        return self.model(x.mean(1, keepdim=True))


def torchattacks_attack(kind: str, *, targeted: bool = False, colour: bool = False, **settings: Any) -> Attack:
    """Build an attack of torchattacks; called with labels, or with targets where ``targeted``.

    Args:
        kind: name in ``torchattacks``.
        targeted: whether labels are targets to reach.
        colour: the attack takes three channels whatever the model does; grey images are given it three times. The
            three have one gradient, so that without random draws they stay equal.
        settings: of that class.
    """
    import torchattacks

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grey = colour and x.shape[1] == 1
        attack = getattr(torchattacks, kind)(Grey(model) if grey else model, **settings)
        if targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        moved = attack(x.expand(-1, 3, -1, -1) if grey else x, y)
        return moved[:, :1] if grey else moved

    return run


def art_attack(kind: str, **settings: Any) -> Attack:
    """Build an attack of ART; called with labels, or with targets where the settings say ``targeted``.

    Args:
        kind: name in ``art.attacks.evasion``, or ``ProjectedGradientDescentPyTorch``.
        settings: of that class; the batch is whole where they do not say otherwise.
    """
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        wrapped = PyTorchClassifier(
            model,
            nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=classes,
            clip_values=(0, 1),
            device_type="cpu",
        )
        attack = getattr(evasion, kind)(wrapped, **({"batch_size": len(x)} | settings))
        if hasattr(attack, "verbose"):
            attack.verbose = False
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return run


def foolbox_pgd(settings: BenchSettings) -> Attack:
    """Foolbox's LinfPGD at the same steps."""
    return foolbox_attack("LinfPGD", eps=settings.eps, rel_stepsize=0.25, steps=settings.steps)


def torchattacks_pgd(settings: BenchSettings) -> Attack:
    """Torchattacks' PGD at the same steps."""
    return torchattacks_attack("PGD", eps=settings.eps, alpha=settings.eps / 4, steps=settings.steps)


def art_pgd(settings: BenchSettings) -> Attack:
    """ART's ProjectedGradientDescentPyTorch at the same steps."""
    return art_attack(
        "ProjectedGradientDescentPyTorch",
        eps=settings.eps,
        eps_step=settings.eps / 4,
        max_iter=settings.steps,
        num_random_init=1,
    )


PEERS = {"foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd, "art": art_pgd}
BUILD: dict[str, Callable[..., Attack]] = {
    "foolbox": foolbox_attack,
    "torchattacks": torchattacks_attack,
    "art": art_attack,
}
"""How an attack of each peer is built from its name and settings."""
