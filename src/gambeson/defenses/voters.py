"""Ensembles of members that are trained apart: any defence of a single model, for each of several."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from gambeson.base import UserError, derive, place, seeded
from gambeson.defenses.jacobian_norm import JacobianNorm
from gambeson.defenses.member_steps import AtOnce, EachMember, Parted, Stacked
from gambeson.defenses.objective import Defense, Objective, Scene
from gambeson.defenses.registry import AnyDefense, register
from gambeson.defenses.standard import Standard
from gambeson.defenses.terms import Adversarial, Batch, Clean, Term, batch_loss
from gambeson.models import Members, PixelModel
from gambeson.models.members import Average
from gambeson.models.memory import check_memory, training_bytes
from gambeson.threat import perturb


class Voting(Defense):
    """What every ensemble has."""

    members: Annotated[int, Field(ge=1)] = 5
    """Members M that vote; 1 is a single model. Ours: Co et al. 2022 is not known to say."""
    average: Average = "probabilities"
    """How they vote."""

    @property
    def num_members(self) -> int:
        """Bodies of the model."""
        return self.members

    def prepare(self, model: torch.nn.Module) -> None:
        """Let the model vote as ``average`` says."""
        if isinstance(model, PixelModel) and isinstance(model.body, Members):
            model.body.average = self.average
            model.card = model.card.model_copy(update={"average": self.average})


class Separate(Voting):
    """An ensemble whose members learn apart from one another: seeds, data orders and draws of their own.

    Member m moves exactly as the single run with the seed ``derive(seed, "member", m)`` does, bit for bit where the
    model draws nothing in its forward.
    """

    at_once: AtOnce = "loop"
    """How the members of a step are computed."""
    watched: Annotated[int, Field(ge=0)] = 32
    """Images on which the members' diversity gain is taken and logged, once an epoch; 0: never."""

    def _open(self, scene: Scene, inner: Defense, *, shared_draws: bool = False) -> Objective:
        """Open ``inner`` for every member."""
        model = scene.model
        voters = members_of(model, self.members)
        threads = min(self.members, torch.get_num_threads()) if self.at_once == "threads" else 1
        alive = self.members if self.at_once == "stacked" else threads
        self._check_memory(scene, voters[0], inner, alive)
        if self.at_once == "stacked":
            assert isinstance(model, PixelModel)
            _check_stackable(inner)
            return Stacked(inner.open(scene), Parted(model), voters, watched=self.watched)
        if threads > 1:
            _check_threads(voters[0], scene)
        seeds = [derive(scene.seed, "member", number) for number in range(self.members)]
        opened = [
            inner.open(dataclasses.replace(scene, model=voter, seed=seed))
            for voter, seed in zip(voters, seeds, strict=True)
        ]
        return EachMember(opened, voters, None if shared_draws else seeds, threads=threads, watched=self.watched)

    def _check_memory(self, scene: Scene, voter: PixelModel, inner: Defense, alive: int) -> None:
        device = next(voter.parameters()).device
        images, _ = scene.train.take(torch.arange(min(2, len(scene.train))), device)
        needed = training_bytes(
            voter,
            images,
            batch_size=scene.batch_size,
            members=self.members,
            at_once=alive,
            double_backward=any(isinstance(term, JacobianNorm) for _, term in inner.terms().values()),
        )
        check_memory(needed, device, self.members)


@register("ensemble", cost="M times its `inner`")
class Ensemble(Separate):
    """The plain ensemble, or several members each of which learns by another defence: 5 of Shared Adversarial, say.

    As ``Ensemble(members=5, inner=SharedAdversarial(eps=0.1))``; in YAML
    ``inner: {name: shared-adversarial, eps: 0.1}``.
    """

    inner: AnyDefense = Standard()
    """What each member minimises on its own part of the batch."""
    craft: Literal["member", "vote"] = "member"
    """Whom adversarial examples are crafted against: the member they train (M times the cost of one), or the vote of
    all (M^2 times), which is what an attacker of the ensemble sees. Ours."""

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
        """Those of the inner defence."""
        return self.inner.terms()

    @property
    def eps(self) -> float | None:
        """The inner defence's radius, by which epochs are compared."""
        return getattr(self.inner, "eps", None)

    @property
    def norm(self) -> Any:
        """The inner defence's norm."""
        return getattr(self.inner, "norm", "inf")

    def whole_from(self, epochs: int) -> int:
        """When the inner defence is."""
        return self.inner.whole_from(epochs)

    def supplied(self, load: Callable[[str], torch.nn.Module]) -> Ensemble:
        """Supply the inner defence, once for all members."""
        return self.model_copy(update={"inner": self.inner.supplied(load)})

    def prepare(self, model: torch.nn.Module) -> None:
        """Prepare every member, and the vote."""
        self.inner.prepare(model)
        super().prepare(model)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Those of the inner defence."""
        return self.inner.groups(model)

    def check(self, batch_size: int) -> None:
        """Check the batch of one member."""
        self.inner.check(batch_size)

    def open(self, scene: Scene) -> Objective:
        """The inner objective for every member; for one member the inner objective itself."""
        if self.members == 1:
            return self.inner.open(scene)
        objective = self._open(scene, self.inner)
        if self.craft == "vote":
            openings = objective.each if isinstance(objective, EachMember) else [objective]
            for opened in openings:
                target = opened.objective if isinstance(opened, Stacked) else opened
                assert isinstance(target, Objective)
                for name, (weight, term) in list(target.terms.items()):
                    if isinstance(term, Adversarial):
                        target.terms[name] = weight, against(term, scene.model)
        return objective


def against(term: Adversarial, crafted_on: torch.nn.Module) -> Term:
    """Return the term with its examples crafted on another model than the one that learns from them."""

    def crafted(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        moved = perturb(batch.images, term.craft(crafted_on, batch))
        return batch_loss(model, moved, batch, term.label_smoothing)

    return crafted


def members_of(model: torch.nn.Module, members: int) -> list[PixelModel]:
    """Return the members of a model as models of their own.

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
        if isinstance(term, JacobianNorm):  # others send more, or fewer, rows than the batch has
            return term.estimator in ("projection", "exact") and term.share == 1
        return type(term) in (Clean, Adversarial)

    if not all(fits(term) for weight, term in inner.terms().values() if weight):
        raise UserError(
            f"at_once='stacked' works for clean and adversarial terms and for the Jacobian's norm by projection or "
            f"exactly, on the whole batch; {type(inner).__name__} has others: choose at_once='loop' or 'threads'"
        )


def _check_threads(voter: PixelModel, scene: Scene) -> None:
    if place()[1] > 1:
        raise UserError("at_once='threads' works in one process: choose at_once='loop' for several")
    with seeded(0, "probe"):
        before = torch.get_rng_state()
        with torch.no_grad():
            copy.deepcopy(voter)(scene.train.take(torch.arange(2), next(voter.parameters()).device)[0])
        if not torch.equal(before, torch.get_rng_state()):
            raise UserError(
                "the model draws random numbers in its forward (dropout or noise), whose order threads would leave to "
                "chance: choose at_once='loop'"
            )
