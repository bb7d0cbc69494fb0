"""The Jacobian stage: norms, sharing metrics, bounds, loss surfaces and adversarial subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from gambeson import analysis
from gambeson.analysis import Spectrum, Spread
from gambeson.analysis.bounds import both_spectra
from gambeson.auditing.jacobian_results import RANGES, Bounds, JacobianResult, LossSurface, PairHistogram, Subspace
from gambeson.auditing.suite import Suite
from gambeson.base import UserError, save_tensors, seeded
from gambeson.data import Split
from gambeson.evaluation import BlackBox
from gambeson.evaluation.rates import Cost
from gambeson.threat import Norm
from gambeson.victim import Victim

FILE = "jacobian.safetensors"
_FEWEST = 16
"""Minimum number of images, or pairs, of a part."""
_FLOATS = 2**27
"""Maximum number of values in memory: 512 MiB."""
_GRID = 17
"""Points per side of the loss surface."""
PartT = TypeVar("PartT")


def left_out(split: Split) -> str:
    """Return why labels of this form have no Jacobian analysis; empty if they have one."""
    if split.task.labels_every_image:
        return ""
    return (
        "No Jacobian analysis was made: it is for one label per image, all of which count; of label maps a Jacobian "
        "has a row for every pixel and class."
    )


def measure(
    victim: Victim,
    split: Split,
    uaps: Mapping[float, torch.Tensor],
    suite: Suite,
    *,
    eps: float,
    seed: int = 0,
    folder: Path | None = None,
) -> JacobianResult | None:
    """Measure the Jacobian of a classifier on a sample of test images.

    Exact parts may take ``suite.jacobian_backwards`` backward passes each; for models with many classes or large images
    they are replaced by estimates, or omitted with a reason. A random model is fixed at one draw.

    Args:
        victim: the model, inspected.
        split: the sample.
        uaps: crafted perturbations by eps, to compare with the bounds.
        suite: the audit's settings.
        eps: extent of the surfaces and length of the subspaces' directions.
        seed: of pairs, projections and directions.
        folder: for :data:`FILE`; None: not written.

    Returns:
        None for black boxes, for models that are not classifiers, and if the suite omits it.
    """
    if suite.jacobian_backwards == 0 or left_out(split):
        return None
    if isinstance(victim.model, BlackBox):
        return None
    before = (victim.forwards, victim.backwards)
    images, _ = split.take(slice(0, _FEWEST), victim.device)
    random = victim.traits is not None and victim.traits.stochastic
    with torch.no_grad(), ExitStack() as stack:
        watched = stack.enter_context(Victim(_OneDraw(victim, seed))) if random else victim
        watched.allow_no_graph = victim.allow_no_graph
        logits = watched.forward_original(images)
        if logits.ndim != 2:
            return None
        if random and not torch.equal(logits, watched.forward_original(images)):
            reason = "the model is random in a way that no seed fixes: Jacobians of other draws do not fit together"
            return JacobianResult(images=len(split), left_out={"jacobian": reason}, cost=Cost())
        parts = _Parts(watched, split, suite, eps, seed, logits.shape[1])
        found = parts.collect(uaps)
        if random:  # its forwards have been counted already
            victim.backwards += watched.backwards
    cost = Cost(forwards=victim.forwards - before[0], backwards=victim.backwards - before[1])
    file = ""
    if folder is not None and parts.tensors:
        file = FILE
        save_tensors(folder / FILE, parts.tensors, {"eps": eps})
    return found.model_copy(update={"fixed_draw": random, "cost": cost, "file": file})


class _OneDraw(nn.Module):
    """A random model with a fixed seed in every forward, so that equal batches have equal draws."""

    def __init__(self, victim: Victim, seed: int) -> None:
        super().__init__()
        self.model = victim.model
        self._victim, self._seed = victim, seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with seeded(self._seed, "jacobian", "draw"):
            return self._victim.forward_original(images)


class _Parts:
    def __init__(self, victim: Victim, split: Split, suite: Suite, eps: float, seed: int, classes: int) -> None:
        self.victim, self.split, self.suite, self.eps, self.seed = victim, split, suite, eps, seed
        self.classes, self.size = classes, torch.Size(split.shape).numel()
        self.left_out: dict[str, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.spectrum: Spectrum | None = None

    def collect(self, uaps: Mapping[float, torch.Tensor]) -> JacobianResult:
        victim, split, budget = self.victim, self.split, self.suite.jacobian_backwards
        count = min(len(split), budget // self.classes, _FLOATS // (self.classes * self.size))
        exact = count >= min(_FEWEST, len(split))
        some = split.sample(max(1, count if exact else budget // 200), seed=self.seed)
        dear = f"{self.classes} classes: one exact Jacobian takes as many backward passes"
        if not exact:
            self.left_out["norms"] = f"{dear}, so the Frobenius norm alone is estimated by projections"
        return JacobianResult(
            images=len(split),
            norms=self._try("norms", lambda: analysis.jacobian_norms(victim, some)) if exact else None,
            frobenius=None if exact else self._try("frobenius", self._estimated),
            gradients=self._try("gradients", lambda: analysis.gradient_statistics(victim, split)),
            gradient_sharing=self._try(
                "gradient sharing", lambda: analysis.gradient_sharing(victim, split, norm=self.suite.norm)
            ),
            bounds=self._try("bounds", lambda: self._bounds(some, uaps)),
            sharing=self._try("sharing", lambda: self._sharing(dear)),
            pairs=self._try("pairs", lambda: self._pairs(dear)) or [],
            surface=self._try("surface", self._surface),
            subspaces=self._try("subspaces", self._subspaces) or [],
            left_out=self.left_out,
            cost=Cost(),
        )

    def _try(self, name: str, work: Callable[[], PartT]) -> PartT | None:
        # A failure of one part (a layer without a second derivative, one logit, NaN) must not stop the others.
        try:
            return work()
        except (UserError, RuntimeError) as error:
            self.left_out[name] = str(error).strip().split("\n")[0] or type(error).__name__
            return None

    def _estimated(self) -> Spread | None:
        images, _ = self._few(self.suite.jacobian_backwards // 8)
        found = [analysis.estimate_frobenius(self.victim, part, seed=self.seed).values for part in images.split(16)]
        return Spread.of(torch.cat(found).sqrt())

    def _bounds(self, split: Split, uaps: Mapping[float, torch.Tensor]) -> Bounds:
        plain, weighted = both_spectra(self.victim, split, self.seed, tolerance=1e-2)
        self.spectrum = plain
        direction = plain.directions[0].cpu()
        self.tensors["direction"] = direction * direction.flatten()[direction.abs().argmax()].sign()
        order = sorted(uaps)
        deltas = [uaps[eps].to(self.victim.device) for eps in order]
        table = analysis.bound_table(self.victim, split, deltas, spectra=(plain, weighted), seed=self.seed)
        return Bounds(eps=order, table=table)

    def _sharing(self, dear: str) -> float | None:
        if self.spectrum is None:
            raise UserError("it needs the stacked spectrum, which the bounds could not have")
        if self.spectrum.shared is None:
            raise UserError(f"{dear}, and it needs the spectral norm of each" if self.spectrum.trace else "no gradient")
        return self.spectrum.shared

    def _pairs(self, dear: str) -> list[PairHistogram]:
        count = min(1000, self.suite.jacobian_backwards // (2 * self.classes))
        if count < _FEWEST or 2 * self.classes * self.size > _FLOATS:
            raise UserError(f"{dear}, and a pair needs two")
        found = analysis.pair_sharing(self.victim, self.split, pairs=count, seed=self.seed)
        self.tensors["pairs"] = found.pairs
        for name, value in found.values.items():
            self.tensors[name] = value.float()
        return [PairHistogram.of(found, metric) for metric in RANGES]

    def _surface(self) -> LossSurface:
        budget = 3 * self.suite.jacobian_backwards // _GRID**2
        images, labels = self._few(min(budget, 2**22 // self.size))
        extent = _length(self.eps, self.suite.norm, "inf", self.size)
        found = analysis.loss_surface(self.victim, images, labels, extent=extent, points=_GRID, seed=self.seed)
        loss = found.loss.double().cpu()
        ridge = Spread.of(found.ridge)
        if ridge is None:
            raise UserError("there are no images")
        self.tensors |= {"surface": loss.float(), "wrong": found.wrong.cpu()}
        return LossSurface(
            images=len(images),
            steps=found.steps.tolist(),
            loss=_short(loss.mean(0)),
            wrong=_short(found.wrong.double().mean(0)),
            singles=[_short(single) for single in loss[:2]],
            ridge=ridge,
        )

    def _subspaces(self) -> list[Subspace]:
        budget = 3 * self.suite.jacobian_backwards // 170
        images, labels = self._few(min(budget, 2**26 // (64 * self.size)))
        norms: tuple[Norm, ...] = ("inf", "2")
        return [self._subspace(images, labels, norm) for norm in norms]

    def _subspace(self, images: torch.Tensor, labels: torch.Tensor, norm: Norm) -> Subspace:
        eps = _length(self.eps, self.suite.norm, norm, self.size)
        found = analysis.adversarial_subspace(
            self.victim, images, labels, eps=eps, norm=norm, permutations=1, seed=self.seed
        )
        known = bool(found.eligible.any())
        return Subspace(
            norm=norm,
            eps=eps,
            orders=list(found.orders),
            shares=[found.share_at_least(k) if known else 0.0 for k in found.orders],
            eligible=int(found.eligible.sum()),
            dead=found.dead,
            dimension=Spread.of(found.dimension[found.eligible]),
            cosine=found.cosine.tolist(),
        )

    def _few(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split.sample(max(1, count), seed=self.seed).take(slice(None), self.victim.device)


def _length(eps: float, norm: Norm, wanted: Norm, size: int) -> float:
    """The eps of another norm at the same position of the default grid."""
    if norm == "1":
        raise UserError("the norm 1 has no usual grid whose lengths could be carried over")
    if norm == wanted:
        return eps
    return eps * size**0.5 / 4 if wanted == "2" else 4 * eps / size**0.5


def _short(grid: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in grid.tolist()]
