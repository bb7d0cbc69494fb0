"""Outside auditors: AutoAttack with its flags, and PGD of ART and of Foolbox, on the same images as each other.

Their packages come with the extra ``bench`` and are imported only when such an auditor is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gambeson.base import UserError
from gambeson.data import Dataset
from gambeson.evaluation import Rate
from gambeson.testbed.entry import spread
from gambeson.testbed.judgement import Judgement
from gambeson.testbed.recipes import DATA

IMAGES, BATCH = 250, 250
MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of AutoAttack's standard version, in its order."""
DYNAMIC = frozenset({"grad", "backward", "_make_grads"})
"""Functions whose call within a forward pass raises AutoAttack's flag of dynamic defences."""
Attack = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""A member's name, images and labels to perturbed images."""


def package(name: str) -> Any:
    """Import a package of the extra ``bench``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the auditor needs {name}, which cannot be imported ({error}): pip install 'gambeson[bench]'"
        ) from None


class MissingPackageError(UserError):
    """The package of an auditor is not installed: no judgement of a model."""


@torch.no_grad()
def _right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(BATCH)]) == y


def flags_of_forward(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """Return the flags that AutoAttack raises before it attacks: randomised, softmax output, dynamic.

    Args:
        model: images to logits.
        x: (N, C, H, W), its first batch.
        y: (N,) labels.
    """
    with torch.no_grad():
        z = [model(x) for _ in range(5)]
    units = [F.normalize(each.flatten(1)) for each in z]
    moved = max(float((unit - units[0]).norm(dim=1).max()) for unit in units)
    correct = {int((each.argmax(1) == y).sum()) for each in z}
    found = []
    if len(correct) > 1 or moved > 1e-4:
        found.append("randomised")
    first = z[0]
    if first.max() < 1 + 1e-5 and first.min() > -1e-5 and bool(((first.sum(-1) - 1).abs() < 1e-5).all()):
        found.append("softmax output")
    called: set[str] = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(frame.f_code.co_name)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model(x)
    finally:
        sys.settrace(before)
    if called & DYNAMIC:
        found.append("dynamic")
    return found


def zero_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float) -> int:
    """Return for how many images the targeted difference-of-logits ratio has a gradient of exactly zero.

    At a uniform random start in the ball, as where AutoAttack's targeted APGD starts, towards the most likely wrong
    class.
    """
    with torch.enable_grad():
        start = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
        z = model(start)
        order = z.detach().argsort(1, descending=True)
        target = torch.where(order[:, 0] == y, order[:, 1], order[:, 0])
        top = z.sort(1, descending=True).values
        ours, wrong = z.gather(1, y[:, None])[:, 0], z.gather(1, target[:, None])[:, 0]
        ratio = (wrong - ours) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)
        gradient = torch.autograd.grad(ratio.sum(), start)[0]
    return int((gradient.flatten(1).abs().sum(1) == 0).sum())


def _members(model: nn.Module, eps: float, classes: int) -> Attack:
    """Return AutoAttack's members from pyautoattack, else from torchattacks."""
    try:
        kind = package("pyautoattack").AutoAttack
    except MissingPackageError:
        attacks = package("torchattacks")
        shared = {"eps": eps, "norm": "Linf", "seed": 0, "n_restarts": 1}
        made = {
            "apgd-ce": attacks.APGD(model, loss="ce", steps=100, **shared),
            "apgd-t": attacks.APGDT(model, n_classes=classes, steps=100, **shared),
            "fab-t": attacks.FAB(model, n_classes=classes, multi_targeted=True, steps=100, **shared),
            "square": attacks.Square(model, n_queries=5000, **shared),
        }
        return lambda name, x, y: made[name](x, y).detach()
    suite = kind(model, norm="Linf", eps=eps, version="standard", device="cpu", seed=0)
    suite.logger.setLevel("CRITICAL")  # its flags are raised here

    def run(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        suite.attacks_to_run = [name]
        return suite.run_standard_evaluation(x, y, batch_size=BATCH)[0]

    return run


def autoattack(model: nn.Module, data: Dataset) -> Judgement:
    """AutoAttack's standard version; a model that raises one of its flags is not trusted.

    The flags are our own reading of its published checks (Croce and Hein 2020; ``fra31/auto-attack``), whichever
    package attacks: randomised, softmax output, dynamic, zero gradient, and Square breaking more than 0.2 points
    beyond the other three.
    """
    eps = DATA[data.name].radius
    x, y = spread(data.test, IMAGES)
    return with_flags(model, _members(model, eps, data.num_classes), x, y, eps)


def with_flags(model: nn.Module, attack: Attack, x: torch.Tensor, y: torch.Tensor, eps: float) -> Judgement:
    """Run AutoAttack's members one after the other, each on what the earlier ones left, and collect the flags."""
    try:
        raised = flags_of_forward(model, x[:BATCH], y[:BATCH])
        standing = _right(model, x, y)
        left = [float(standing.float().mean())]
        for name in MEMBERS:
            rows = standing.nonzero()[:, 0]
            if not len(rows):
                break
            if name == "apgd-t" and zero_gradients(model, x[rows], y[rows], eps):
                raised.append("zero gradient")
            standing[rows] = _right(model, attack(name, x[rows], y[rows]), y[rows])
            left.append(float(standing.float().mean()))
    except (RuntimeError, ValueError, IndexError) as error:  # it does not survive the model, and everybody sees it
        return Judgement(trusted=False, reasons=[f"AutoAttack failed: {type(error).__name__}: {error}"])
    if len(left) == len(MEMBERS) + 1 and left[-1] < left[-2] - 0.002:
        raised.append("Square helps")
    return Judgement(trusted=not raised, accuracy=Rate.of(int(standing.sum()), len(y)), reasons=raised)


def art(model: nn.Module, data: Dataset) -> Judgement:
    """PGD of the Adversarial Robustness Toolbox, 40 steps of a tenth of eps; it warns of nothing."""
    estimators, attacks = package("art.estimators.classification"), package("art.attacks.evasion")
    eps = DATA[data.name].radius
    x, y = spread(data.test, IMAGES)
    shape, loss = tuple(data.train.shape), nn.CrossEntropyLoss()
    wrapped = estimators.PyTorchClassifier(
        model, loss=loss, input_shape=shape, nb_classes=data.num_classes, clip_values=(0, 1), device_type="cpu"
    )
    attack = attacks.ProjectedGradientDescent(
        wrapped, eps=eps, eps_step=eps / 10, max_iter=40, num_random_init=1, batch_size=BATCH, verbose=False
    )
    return _alone(model, lambda: torch.from_numpy(attack.generate(x.numpy(), y.numpy())), y)


def foolbox(model: nn.Module, data: Dataset) -> Judgement:
    """PGD of Foolbox with its defaults, 40 steps of a thirtieth of eps; it warns of nothing."""
    peer = package("foolbox")
    eps = DATA[data.name].radius
    x, y = spread(data.test, IMAGES)
    wrapped = peer.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return _alone(model, lambda: peer.attacks.LinfPGD(steps=40)(wrapped, x, y, epsilons=eps)[1], y)


def _alone(model: nn.Module, attack: Callable[[], torch.Tensor], y: torch.Tensor) -> Judgement:
    try:
        right = _right(model, attack(), y)
    except (RuntimeError, ValueError) as error:
        return Judgement(trusted=False, reasons=[f"the attack failed: {type(error).__name__}: {error}"])
    return Judgement(accuracy=Rate.of(int(right.sum()), len(y)))


OUTSIDE: dict[str, Callable[[nn.Module, Dataset], Judgement]] = {
    "autoattack": autoattack,
    "art": art,
    "foolbox": foolbox,
}
"""The outside auditors by name."""
