"""Ensembles: members trained independently by any defence, in a loop, on threads or as one batched computation."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gambeson.base import UserError, average, derive, place, seeded
from gambeson.defenses.ensemble_losses import estimated_diversity_gain
from gambeson.defenses.jacobian import JacobianNorm
from gambeson.defenses.objective import (
    Adversarial,
    Batch,
    Clean,
    Defense,
    Losses,
    Objective,
    Term,
    TrainContext,
    batch_loss,
)
from gambeson.defenses.pgd_adversarial import Standard
from gambeson.defenses.registry import AnyDefense, register
from gambeson.models import Members, PixelModel
from gambeson.models.members import Average
from gambeson.models.memory import check_memory, training_bytes
from gambeson.threat import perturb

Concurrency = Literal["loop", "threads", "stacked"]
"""``loop``: one member after another, with the memory of one. ``threads``: one thread per member, as many as the run
has; the fastest on a CPU, with the memory of as many members. ``stacked``: one batched computation, for accelerators
that one member does not fill; equal to the others up to rounding."""

_COPIES = 0.99

_Step = tuple[Losses, set[nn.Parameter] | None, list[nn.Parameter], list[torch.Tensor | None]]


class PerMember(Objective):
    """The sum of every member's objective on its part of the batch, so that each is trained as it would be alone.

    Gradients of a member are computed together with its objective, and the loop's backward only passes them on, so that
    at most one member's graph (or one per thread) exists at a time.

    Args:
        objectives: one per member, built for its voter.
        voters: the members.
        seeds: of their runs; the step's is ``derive(seed, "step", number)``, as in the loop. None: the batch's seed for
            all.
        threads: members computed at the same time.
        watched: images of a batch for the diversity gain, computed in the last step of an epoch; 0: never.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        voters: Sequence[PixelModel],
        seeds: Sequence[int] | None,
        *,
        threads: int = 1,
        watched: int = 0,
    ) -> None:
        super().__init__({})
        self.each = nn.ModuleList(objectives)
        self._voters = list(voters)  # a plain list: the model is not part of the objective's state
        self._seeds = seeds
        self._threads = threads
        self._watched = watched

    def parts(self, batch: Batch) -> list[Batch]:
        """Return every member's batch: its rows, with the seed of a separate run."""
        members = len(self._voters)
        seeds = [batch.seed] * members
        if self._seeds is not None:
            seeds = [derive(seed, "step", batch.step) for seed in self._seeds]
        indices: Sequence[torch.Tensor | None] = [None] * members
        if batch.indices is not None:
            indices = batch.indices.chunk(members)
        rows = zip(batch.images.chunk(members), batch.labels.chunk(members), seeds, indices, strict=True)
        return [
            dataclasses.replace(batch, images=images, labels=labels, seed=seed, indices=own)
            for images, labels, seed, own in rows
        ]

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate every member's objective: the sum of the losses, the means of the terms."""
        found = [
            objective.losses(voter, part)  # type: ignore[operator]
            for objective, voter, part in zip(self.each, self._voters, self.parts(batch), strict=True)
        ]
        return self._joined(found, torch.stack([losses["loss"] for losses in found]).sum())

    def optimizer_steps(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Losses, set[nn.Parameter] | None]]:
        """Take the phases of all members together."""
        streams: list[Iterator[tuple[Losses, set[nn.Parameter] | None]]] = [
            objective.optimizer_steps(voter, part)  # type: ignore[operator]
            for objective, voter, part in zip(self.each, self._voters, self.parts(batch), strict=True)
        ]
        extra = self._watch(batch)
        while True:
            found = [step for step in self._advance(streams, batch.images.device) if step is not None]
            if not found:
                return
            parameters = [parameter for step in found for parameter in step[2]]
            gradients = [gradient for step in found for gradient in step[3]]
            total = torch.stack([step[0]["loss"] for step in found]).sum()
            handed: torch.Tensor = _Handed.apply(total, gradients, *parameters)
            moving: set[nn.Parameter] = set()
            for _, moves, own, _ in found:
                moving |= set(own) if moves is None else moves
            yield self._joined([step[0] for step in found], handed) | extra, moving
            extra = {}

    def after_step(self, batch: Batch) -> None:
        """Call ``after_step`` of every member's objective."""
        for objective, part in zip(self.each, self.parts(batch), strict=True):
            objective.after_step(part)  # type: ignore[operator]

    def _joined(self, found: Sequence[Losses], total: torch.Tensor) -> Losses:
        names = [name for name in found[0] if name != "loss"]
        return {"loss": total} | {name: torch.stack([losses[name] for losses in found]).mean() for name in names}

    def _advance(self, streams: Sequence[Iterator[Any]], device: torch.device) -> list[_Step | None]:
        jobs = [self._job(voter, stream, device) for voter, stream in zip(self._voters, streams, strict=True)]
        if self._threads == 1:
            return [job() for job in jobs]
        threads = torch.get_num_threads()
        normalize = self._voters[0].normalize
        mode = normalize.training
        try:
            with ThreadPoolExecutor(self._threads, initializer=lambda: torch.set_num_threads(1)) as pool:
                return list(pool.map(lambda job: job(), jobs))
        finally:
            torch.set_num_threads(threads)  # the default of later threads
            normalize.train(mode)  # shared by all voters

    def _job(self, voter: PixelModel, stream: Iterator[Any], device: torch.device) -> Callable[[], _Step | None]:
        kind = device.type
        lower, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def job() -> _Step | None:
            with torch.autocast(kind, dtype=dtype, enabled=lower):  # not inherited by threads
                phase = next(stream, None)
            if phase is None:
                return None
            losses, moving = phase
            own = [parameter for parameter in voter.parameters() if parameter.requires_grad]
            for parameter in own:
                parameter.grad = None
            with torch.autocast(kind, enabled=False):
                losses["loss"].backward()  # not only for the weights: some terms read other gradients
            gradients = [parameter.grad for parameter in own]
            for parameter in own:
                parameter.grad = None
            return {name: value.detach() for name, value in losses.items()}, moving, own, gradients

        return job

    def _watch(self, batch: Batch) -> Losses:
        return watch(self._voters, batch, self._watched)


class Stacked(Objective):
    """One objective for all members, computed in one batched forward and backward.

    Args:
        objective: a stateless mean over rows; its draws are those of the joined batch.
        view: all members, see :class:`Parted`.
        voters: the members.
        watched: see :class:`PerMember`.
    """

    def __init__(self, objective: Objective, view: Parted, voters: Sequence[PixelModel], *, watched: int = 0) -> None:
        super().__init__({})
        self.objective = objective
        self._view = (view,)  # in a tuple: the model is not part of the objective's state
        self._voters = list(voters)
        self._watched = watched

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Evaluate the objective, multiplied by the number of members to give their sum."""
        found = self.objective.losses(self._view[0], batch)
        return found | {"loss": found["loss"] * len(self._voters)} | watch(self._voters, batch, self._watched)


class Parted(nn.Module):
    """Pixels (M * N, C, H, W) to logits (M * N, K): member m computes part m of the rows."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.normalize = model.normalize
        self.body = model.body

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        assert isinstance(self.body, Members)
        return self.body.parted(self.normalize(pixels)).flatten(0, 1)


def watch(voters: Sequence[PixelModel], batch: Batch, images: int) -> Losses:
    """Return the diversity gain in the last step of an epoch, with a warning if members are copies; else nothing.

    It is multiplied by the steps of the epoch, so that the logged mean is the value itself.
    """
    if not images or batch.step % batch.steps != batch.steps - 1:
        return {}
    with torch.autocast(batch.images.device.type, enabled=False), seeded(batch.seed, "diversity"):
        valid = batch.task.valid(batch.labels[:images])
        gain = estimated_diversity_gain(voters, batch.images[:images], valid=valid, seed=batch.seed).mean()
    average([gain])
    if float(gain) > _COPIES:
        warnings.warn(
            f"the members' Jacobians agree to {float(gain):.3f} (1 means copies): were they given equal seeds?",
            stacklevel=2,
        )
    return {"diversity_gain": gain * batch.steps}


class _Handed(torch.autograd.Function):
    """A number with precomputed gradients."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor | None], *parameters: torch.Tensor
    ) -> torch.Tensor:
        """Return the number."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients."""
        gradients, ctx.gradients = ctx.gradients, []
        return None, None, *[None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients]


class EnsembleDefense(Defense):
    """Base of the ensembles."""

    members: Annotated[int, Field(ge=1)] = 5
    """Number of members M; 1 is a single model (ours: the number in Co et al. 2022 is not known to us)."""
    average: Average = "probabilities"
    """How they vote."""

    @property
    def num_members(self) -> int:
        """Bodies of the model."""
        return self.members

    def configure_model(self, model: torch.nn.Module) -> None:
        """Set the model's average."""
        if isinstance(model, PixelModel) and isinstance(model.body, Members):
            model.body.average = self.average
            model.card = model.card.model_copy(update={"average": self.average})


class IndependentEnsemble(EnsembleDefense):
    """An ensemble with independently trained members: separate seeds, data orders and draws.

    Member m equals the single run with the seed ``derive(seed, "member", m)``, bit for bit if the model's forward is
    deterministic.
    """

    at_once: Concurrency = "loop"
    """How the members of a step are computed: :data:`Concurrency`."""
    watched: Annotated[int, Field(ge=0)] = 32
    """Images for the members' diversity gain, logged once per epoch; 0: never."""

    def _open(self, context: TrainContext, inner: Defense, *, shared_draws: bool = False) -> Objective:
        """Build ``inner`` for every member."""
        model = context.model
        voters = members_of(model, self.members)
        threads = min(self.members, torch.get_num_threads()) if self.at_once == "threads" else 1
        alive = self.members if self.at_once == "stacked" else threads
        self._check_memory(context, voters[0], inner, alive)
        if self.at_once == "stacked":
            assert isinstance(model, PixelModel)
            _check_stackable(inner)
            return Stacked(inner.build_objective(context), Parted(model), voters, watched=self.watched)
        if threads > 1:
            _check_threads(voters[0], context)
        seeds = [derive(context.seed, "member", number) for number in range(self.members)]
        opened = [
            inner.build_objective(dataclasses.replace(context, model=voter, seed=seed))
            for voter, seed in zip(voters, seeds, strict=True)
        ]
        return PerMember(opened, voters, None if shared_draws else seeds, threads=threads, watched=self.watched)

    def _check_memory(self, context: TrainContext, voter: PixelModel, inner: Defense, alive: int) -> None:
        device = next(voter.parameters()).device
        images, _ = context.train.take(torch.arange(min(2, len(context.train))), device)
        needed = training_bytes(
            voter,
            images,
            batch_size=context.batch_size,
            members=self.members,
            at_once=alive,
            double_backward=any(isinstance(term, JacobianNorm) for _, term in inner.terms().values()),
        )
        check_memory(needed, device, self.members)


@register("ensemble", cost="M times its `inner`")
class Ensemble(IndependentEnsemble):
    """A plain ensemble, or one whose members are trained with another defence, such as Shared Adversarial Training.

    As ``Ensemble(members=5, inner=SharedAdversarial(eps=0.1))``; in YAML
    ``inner: {name: shared-adversarial, eps: 0.1}``.
    """

    inner: AnyDefense = Standard()
    """The defence of each member on its part of the batch."""
    craft: Literal["member", "vote"] = "member"
    """Model that adversarial examples are crafted on: the member they train (M times the cost of one), or the ensemble
    (M^2 times), which is what an attacker sees (ours)."""

    @model_validator(mode="after")
    def _check_inner(self) -> Ensemble:
        if self.inner.num_members != 1:
            raise ValueError(f"inner is an ensemble of {self.inner.num_members} itself: give a defence of one model")
        if self.craft == "vote":
            if self.at_once == "threads":
                raise ValueError("craft='vote' freezes every member while one learns: choose at_once='loop'")
            if not any(isinstance(term, Adversarial) for _, term in self.inner.terms().values()):
                raise ValueError("craft='vote' needs an inner defence that crafts, such as shared-adversarial")
        return self

    def terms(self) -> Any:
        """The inner defence's."""
        return self.inner.terms()

    @property
    def eps(self) -> float | None:
        """The inner defence's radius, used to compare epochs."""
        return getattr(self.inner, "eps", None)

    @property
    def norm(self) -> Any:
        """The inner defence's norm."""
        return getattr(self.inner, "norm", "inf")

    def fully_active_epoch(self, epochs: int) -> int:
        """The inner defence's."""
        return self.inner.fully_active_epoch(epochs)

    def with_source_models(self, load: Callable[[str], torch.nn.Module]) -> Ensemble:
        """Load the source models of the inner defence, once for all members."""
        return self.model_copy(update={"inner": self.inner.with_source_models(load)})

    def configure_model(self, model: torch.nn.Module) -> None:
        """Configure every member, and the average."""
        self.inner.configure_model(model)
        super().configure_model(model)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The inner defence's."""
        return self.inner.groups(model)

    def check(self, batch_size: int) -> None:
        """Check the batch of one member."""
        self.inner.check(batch_size)

    def build_objective(self, context: TrainContext) -> Objective:
        """The inner objective for every member; for a single member the inner objective itself."""
        if self.members == 1:
            return self.inner.build_objective(context)
        objective = self._open(context, self.inner)
        if self.craft == "vote":
            openings = objective.each if isinstance(objective, PerMember) else [objective]
            for opened in openings:
                target = opened.objective if isinstance(opened, Stacked) else opened
                assert isinstance(target, Objective)
                for name, (weight, term) in list(target.terms.items()):
                    if isinstance(term, Adversarial):
                        target.terms[name] = weight, against(term, context.model)
        return objective


def against(term: Adversarial, crafted_on: torch.nn.Module) -> Term:
    """Return the term with its examples crafted on another model than the trained one."""

    def crafted(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        moved = perturb(batch.images, term.craft(crafted_on, batch))
        return batch_loss(model, moved, batch, term.label_smoothing)

    return crafted


def members_of(model: torch.nn.Module, members: int) -> list[PixelModel]:
    """Return the members of a model as separate models.

    Raises:
        UserError: it has another number of them.
    """
    if not isinstance(model, PixelModel) or model.card.members != members:
        found = model.card.members if isinstance(model, PixelModel) else 1
        raise UserError(
            f"the defence asks for {members} members and the model has {found}: "
            f"make it by models.create(..., members={members}) or join models by models.ensemble"
        )
    return model.voters


def _check_stackable(inner: Defense) -> None:
    def fits(term: Callable[..., Any]) -> bool:
        if isinstance(term, JacobianNorm):  # others use another number of rows than the batch
            return term.estimator in ("projection", "exact") and term.share == 1
        return type(term) in (Clean, Adversarial)

    if not all(fits(term) for weight, term in inner.terms().values() if weight):
        raise UserError(
            f"at_once='stacked' works for clean and adversarial terms and for the Jacobian's norm by projection or "
            f"exactly, on the whole batch; {type(inner).__name__} has others: choose at_once='loop' or 'threads'"
        )


def _check_threads(voter: PixelModel, context: TrainContext) -> None:
    if place()[1] > 1:
        raise UserError("at_once='threads' works in one process: choose at_once='loop' for several")
    with seeded(0, "probe"):
        before = torch.get_rng_state()
        with torch.no_grad():
            copy.deepcopy(voter)(context.train.take(torch.arange(2), next(voter.parameters()).device)[0])
        if not torch.equal(before, torch.get_rng_state()):
            raise UserError(
                "the model draws random numbers in its forward (dropout or noise), whose order threads would leave to "
                "chance: choose at_once='loop'"
            )
