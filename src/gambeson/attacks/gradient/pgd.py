"""FGSM, R+FGSM, I-FGSM, the least-likely attacks, PGD, and transfer attacks, as settings of one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from gambeson.attacks.gradient.base import (
    BestSoFar,
    GradientAttack,
    Guide,
    LabelChoice,
)
from gambeson.attacks.gradient.transfer import Diversity, Noise, Scales, Smoothing
from gambeson.attacks.losses import MASKED, warn_of_fallback
from gambeson.attacks.registry import register
from gambeson.attacks.solver import ProjectedGradient, cosine, require_finite
from gambeson.base import Number, generator, unknown_name
from gambeson.tasks import Task

Start = Literal["zero", "uniform", "sign"]


@register("pgd", source="Madry et al. 2018", cost="steps / steps, per restart")
class PGD(GradientAttack):
    """Projected gradient descent (Madry et al. 2018, section 2.1; Kurakin et al. 2017 with ``start="zero"``).

    The paper fixes neither the step size nor the number of restarts; the defaults are ours. Costs per image and
    restart: ``steps`` forwards and backwards, one more forward to compare several restarts or with ``keep="best"``,
    one more per step for early stopping or ``keep="best"`` with ``nesterov``, ``diversity`` or ``noise``, and
    ``scales.copies`` or ``noise.copies`` times as much per step with these.

    The options of transfer attacks are independent of each other and off by default; their customary sets have
    names in :mod:`gambeson.attacks.gradient.pgd`.
    """

    steps: Annotated[int, Field(ge=1)] = 20
    """Gradient steps per restart."""
    rel_step_size: Annotated[Number, Field(gt=0)] | None = None
    """Step size as a share of eps; by default 4 / steps. The customary 2.5 / steps ends one to three per cent short of
    the optimum of a linear model in the Euclidean ball, 4 / steps a tenth of one."""
    final_step: Annotated[Number, Field(gt=0)] | None = None
    """Size of the last step as a share of eps, with a cosine schedule in between. None: a constant step size, except in
    the norm 1, where it decays to a hundredth, because long steps oscillate about the optimum."""
    start: Start = "uniform"
    """Start of a restart; with ``zero`` further restarts are pointless unless steps are random."""
    start_size: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """Radius of the random start as a share of eps."""
    shrink: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Norm inf only: stay inside a box whose half-width is drawn for each value from [1 - shrink, 1] eps, so that no
    step ends at a corner of the ball, where all changes are alike and a model may single them out (ours)."""
    keep: Literal["last", "best"] = "last"
    """Which point of a run is its result: the last, or the one with the most wrong labels. An image with one label that
    is wrong is finished in any case."""
    momentum: Annotated[Number, Field(ge=0)] = 0.0
    """Decay of the velocity (MI, Dong et al. 2018, section 3.1: 1.0). Gradients are normalised to mean absolute value
    1; the paper's 1-norm gives the same steps."""
    nesterov: bool = False
    """Take the gradient one step of velocity ahead (NI, Lin et al. 2020, section 3.2); needs momentum."""
    diversity: Diversity | None = None
    """Random resizing of the model's input (DI). Not for label maps, whose pixels would not move along."""
    smoothing: Smoothing | None = None
    """Smoothing of the gradient (TI), before momentum."""
    scales: Scales | None = None
    """Gradients of scaled copies (SI)."""
    noise: Noise | None = None
    """Gradients averaged over copies with noise (VR)."""

    @model_validator(mode="after")
    def _check_shrink(self) -> PGD:
        if self.shrink and self.norm != "inf":
            raise ValueError(f"shrink is for norm 'inf', and the norm is {self.norm!r}; leave it out")
        return self

    @property
    def lengths(self) -> list[float]:
        """Length of each step in pixel units; the last is reached by a cosine where it differs from the first."""
        first, last = self._first, self._last
        if first == last or self.steps == 1:
            return [first * self.eps] * self.steps
        return [self.eps * share for share in cosine(self.steps, first, last)]

    def _check_task(self, task: Task) -> None:
        if self.diversity is not None:
            task.require_classification(
                "diversity, which moves the pixels of the images and not their labels,", "leave it out"
            )

    @property
    def _follows_sizes(self) -> bool:
        return self.restarts == 1 and not self.early_stop and not self.shrink

    @property
    def _first(self) -> float:
        return 4 / self.steps if self.rel_step_size is None else self.rel_step_size

    @property
    def _last(self) -> float:
        if self.final_step is not None:
            return self.final_step
        return self._first / 100 if self.norm == "1" else self._first

    def _search(
        self, solver: ProjectedGradient, x: torch.Tensor, y: torch.Tensor, seed: int, best: torch.Tensor
    ) -> None:
        guide = Guide(
            solver=solver,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
            diversity=self.diversity,
            smoothing=self.smoothing,
            scales=self.scales,
            noise=self.noise,
        )
        record = BestSoFar.into(best)
        for restart in range(self.restarts):
            everyone = torch.arange(len(x), device=x.device)
            # Success on a few samples of a random model is none.
            active = everyone[~record.is_adversarial] if restart and not self.eot_samples else everyone
            if len(active) == 0:
                break
            draw = generator(seed, "start", restart, device=x.device)
            views = generator(seed, "views", restart, device=x.device)
            if self.shrink:
                box = torch.rand(
                    (1, *x.shape[1:]), generator=generator(seed, "box", restart, device=x.device), device=x.device
                )
                solver = replace(solver, sizes=1 - self.shrink * box)
                guide = replace(guide, solver=solver)
            # Drawn for the whole batch, so that what one image gets does not depend on the others' fate.
            delta = solver.start(x, len(x), self.start, self.start_size, draw)
            rows, images, labels = active, x, y
            if len(active) < len(x):  # otherwise the batch itself, to avoid a copy
                delta, images, labels = delta[active], x[active], y[active]
            velocity = torch.zeros_like(delta[:, :1, :1, :1])
            # Early stopping reads from the device in every step anyway, and must not take NaN for a success.
            sums: list[torch.Tensor] | None = None if self.early_stop else []
            for number, length in enumerate(self.lengths, 1):
                if self.loss == "segpgd":
                    guide = replace(guide, solver=solver.at(number, self.steps))
                drawn = [numbers[rows] for numbers in guide.draw(x, views)]
                direction, velocity, logits = guide.gradient(
                    delta, images, labels, velocity, length, drawn, number, sums
                )
                if restart == 0 and number == 1:
                    warn_of_fallback(solver.loss, logits.shape[1])
                if self.early_stop or self.keep == "best":
                    if not guide.sees_images:
                        _, logits = solver.losses(delta, images, labels)
                    down = solver.fallen(delta, images, logits, labels, targeted=self.reaches)
                    if self.keep == "best":
                        record.note(rows, delta, solver.harm(logits, labels), down)
                    if self.early_stop and bool(down.any()):
                        best[rows[down]], record.is_adversarial[rows[down]] = delta[down], True
                        kept = (rows, images, labels, delta, direction, velocity)
                        rows, images, labels, delta, direction, velocity = (t[~down] for t in kept)
                    if len(rows) == 0:
                        break
                delta = solver.step_along(delta, images, direction, length)
                del direction  # freed before the next forward
            require_finite(sums or [], first=1)
            if self.restarts == 1 and self.keep == "last":
                best[rows] = delta
                break
            if len(rows):
                value, logits = solver.losses(delta, images, labels)
                if self.keep == "best" or self.loss in MASKED:
                    value = solver.harm(logits, labels)
                down = solver.fallen(delta, images, logits, labels, targeted=self.reaches)
                record.note(rows, delta, value, down)


@register("fgsm", source="Goodfellow et al. 2015", cost="1 / 1")
class FGSM(PGD):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length eps from the image itself."""

    steps: Literal[1] = 1
    rel_step_size: Annotated[Number, Field(gt=0)] | None = 1.0
    start: Start = "zero"
    early_stop: bool = False


@register("r-fgsm", source="Tramèr et al. 2018, section 3.4", cost="1 / 1")
class RFGSM(PGD):
    """R+FGSM (Tramèr et al. 2018, section 3.4): a random-sign step of alpha, then a gradient step of eps - alpha.

    ``start_size`` is alpha / eps: 0.5 in the paper's ImageNet experiments; its MNIST code uses 0.05 at eps 0.3.
    """

    steps: Literal[1] = 1
    start: Start = "sign"
    start_size: Annotated[Number, Field(ge=0, le=1)] = 0.5
    early_stop: bool = False

    @property
    def _first(self) -> float:
        # The part of eps that the random start leaves.
        return 1 - self.start_size if self.rel_step_size is None else self.rel_step_size


@register("i-fgsm", source="Kurakin et al. 2017", cost="steps / steps")
class IFGSM(PGD):
    """Iterative FGSM, also called BIM (Kurakin et al. 2017): steps of eps / steps from the image itself."""

    steps: Annotated[int, Field(ge=1)] = 10
    """10 is the value of transfer papers; Tramèr et al. 2018 allow any step size of eps / steps or more."""
    start: Start = "zero"
    early_stop: bool = False

    @property
    def _first(self) -> float:
        return 1 / self.steps if self.rel_step_size is None else self.rel_step_size

    @property
    def _last(self) -> float:
        return self._first if self.final_step is None else self.final_step


@register("step-ll", source="Kurakin et al. 2017", cost="2 / 1")
class StepLL(FGSM):
    """Step-LL: one step of length eps down the cross-entropy of the least likely class."""

    label: LabelChoice = "least-likely"


@register("r-step-ll", source="Tramèr et al. 2018, section 3.4", cost="2 / 1")
class RStepLL(RFGSM):
    """R+Step-LL (Tramèr et al. 2018, section 3.4): a random-sign step of alpha, then Step-LL with eps - alpha.

    The class is that of the clean image, not of the random start, as in the paper's ImageNet code; the label
    smoothing and auxiliary head of that code are left out.
    """

    label: LabelChoice = "least-likely"


@register("iter-ll", source="Kurakin et al. 2017", cost="steps + 1 / steps")
class IterLL(IFGSM):
    """Iter-LL: steps of eps / steps down the cross-entropy of the least likely class."""

    label: LabelChoice = "least-likely"


_MI: dict[str, Any] = {"momentum": 1.0}
_NI: dict[str, Any] = {"momentum": 1.0, "nesterov": True}
_DI: dict[str, Any] = {"diversity": Diversity()}
_TI: dict[str, Any] = {"smoothing": Smoothing()}
_SI: dict[str, Any] = {"scales": Scales()}

TRANSFER: dict[str, dict[str, Any]] = {
    "mi-fgsm": _MI,
    "ni-fgsm": _NI,
    "di-fgsm": _DI,
    "mi-di-fgsm": _MI | _DI,
    "ti-fgsm": _TI,
    "ti-mi-fgsm": _MI | _TI,
    "ti-dim": _MI | _DI | _TI,
    "si-ni-fgsm": _NI | _SI,
    "si-ni-ti-dim": _NI | _DI | _TI | _SI,
}
"""Each name and the settings it stands for: Dong et al. 2018 (MI), Xie et al. 2019 (DI, and with MI: M-DI2), Dong et
al. 2019 (TI, TI-DIM), Lin et al. 2020 (NI, SI). The original DI-FGSM takes int(min(eps + 4, 1.25 eps)) steps of
1/255 with eps in 255ths; here it has the common setting."""

_SOURCES = {"mi": "Dong et al. 2018", "di": "Xie et al. 2019", "ti": "Dong et al. 2019", "ni": "Lin et al. 2020"}
_WORDS = {
    "momentum": "momentum 1 (MI)",
    "nesterov": "a Nesterov look-ahead (NI)",
    "diversity": "random resizing with probability 0.5 (DI)",
    "smoothing": "a 5 x 5 Gaussian over the gradient (TI)",
    "scales": "the mean gradient of 5 scaled copies (SI)",
}
for _name, _preset in TRANSFER.items():
    register(
        _name,
        preset=_preset,
        source=_SOURCES.get("ni" if _name.startswith("si-") else _name.removeprefix("mi-")[:2], _SOURCES["mi"]),
        cost="steps x copies / steps x copies" if "scales" in _preset else "steps / steps",
        summary=f"I-FGSM with {', '.join(_WORDS[option] for option in _preset)}.",
    )(IFGSM)


def transfer_attack(name: str, **settings: Any) -> IFGSM:
    """Return the transfer attack of this name.

    Args:
        name: one of :data:`TRANSFER`.
        **settings: ``eps``, and any other setting of :class:`gambeson.attacks.PGD`; they override those of the name.

    Raises:
        UserError: no such name, or a setting that is out of range.
    """
    if name not in TRANSFER:
        raise unknown_name("transfer attack", name, TRANSFER)
    return IFGSM(**(TRANSFER[name] | settings))


def _named(name: str) -> Callable[..., IFGSM]:
    def build(**settings: Any) -> IFGSM:
        return transfer_attack(name, **settings)

    build.__name__ = build.__qualname__ = name.replace("-", "_")
    build.__doc__ = f"Return {name.upper()}; see :func:`transfer_attack`."
    return build


mi_fgsm = _named("mi-fgsm")
ni_fgsm = _named("ni-fgsm")
ti_dim = _named("ti-dim")
si_ni_fgsm = _named("si-ni-fgsm")
