"""The frozen, counted view of a model through which every attack looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from gambeson.base import Config, UserError, seeded
from gambeson.victim.bn_folding import fold_batchnorms
from gambeson.victim.inspect import ModelTraits, inspect_model, logits_of

BatchNormMode = Literal["eval", "batch", "train"]
"""What a model does about its training mode while it is attacked. ``eval``: evaluation mode, BatchNorm with its running
statistics. ``batch``: evaluation mode, but a BatchNorm that was in training takes the statistics of the attacked batch
and leaves its running ones as they are. ``train``: every sub-module in the mode that it has, so that dropout is on and
running statistics take in the attacked images too."""


@contextmanager
def frozen(model: nn.Module, batch_norm: BatchNormMode = "eval") -> Iterator[None]:
    """Hold ``model`` in evaluation mode without parameter gradients; put back every sub-module as it was.

    Modes and flags are read on entry, for each sub-module and parameter alone, and restored after an
    exception too: a BatchNorm that the user had frozen stays frozen.

    Args:
        model: any module.
        batch_norm: see :data:`BatchNormMode`.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = [module for module, mode in modes if mode and isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [norm for norm in norms if norm.track_running_stats] if batch_norm == "batch" else []
    try:
        if batch_norm != "train":
            model.eval()
        for norm in norms if batch_norm == "batch" else []:
            norm.training = True
        for norm in held:
            norm.track_running_stats = False  # in training mode: the batch's statistics, which are not kept
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for norm in held:
            norm.track_running_stats = True
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


Precision = Literal["float32", "bfloat16", "float16"]
"""Types that a model can be run in."""


class FastPath(Config):
    """What the fast copy of a model may do; each part that a model does not allow is left out, and said so."""

    precision: Precision = "float32"
    """Of convolutions and products (autocast). Less than float32 pays on accelerators and on processors that have
    the type; gradients come back in float32."""
    compile: bool = False
    """Compile the copy, with CUDA graphs where it can have them. Off by default: on processors the gain measured was
    under a tenth, for ten seconds and more of compiling, and again for other numbers of images."""


class Victim:
    """A model under attack. Use it as a context manager; inside, it is frozen (see :func:`frozen`).

    A fast victim answers with a copy whose BatchNorms are folded into its convolutions (:func:`fold_batchnorms`) and,
    on a CPU and in the short types, whose images lie channels-last: on a CPU about half the time of the model itself.
    Scores are never taken on the copy: :meth:`forward_original` is the model as it was given.

    Its answers have its own precision, float32 where ``fast`` names no other, whatever autocast it is asked under:
    training in a lower precision neither crafts nor judges in it.

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits.
        fast: answer with such a copy; the weights may then not change while the victim is in use. True takes the
            defaults of :class:`FastPath`.
        batch_norm: what the model does about its training mode; any but ``eval`` leaves the copy out.

    Attributes:
        forwards: images sent forward so far.
        backwards: images whose gradient was taken so far.
        notes: what the fast path did, or why it is off.
        traits: what :meth:`inspect` saw; None before.
        votes: how often the model is asked where it is scored; the majority is its answer. None: once, and a random
            model :data:`gambeson.victim.DEFAULT_VOTES` times.
        temperature: what the logits that attacks climb are divided by; 1 leaves them as they are. It changes no answer.
    """

    def __init__(self, model: nn.Module, *, fast: bool | FastPath = False, batch_norm: BatchNormMode = "eval") -> None:
        self.model = model
        self.batch_norm = batch_norm
        self.fast = FastPath() if fast is True else fast or None
        self.forwards = 0
        self.backwards = 0
        self.notes = "the model itself"
        self.traits: ModelTraits | None = None
        self.votes: int | None = None
        self.temperature = 1.0
        self._guard = frozen(model, batch_norm)
        self._seen_input = False
        self._view: Callable[[torch.Tensor], Any] | None = None
        self._layout = torch.contiguous_format

    def __enter__(self) -> Victim:
        self._guard = frozen(self.model, self.batch_norm)
        self._guard.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view = self.traits = None
        self._seen_input = False
        self._guard.__exit__(kind, error, trace)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU for a model without any."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def inspect(self, images: torch.Tensor, *, scores: bool = False) -> ModelTraits:
        """Look at the model before anything is asked of it; nothing is counted.

        Args:
            images: (N, C, H, W) in [0, 1], of which a few are sent through the model, a few times.
            scores: probabilities will do as well as logits.

        Raises:
            UserError: the model returns probabilities, or nothing that could be logits.
        """
        if self.traits is None:
            self._check_input(images)
            self.traits = inspect_model(self.model, images)
        if self.traits.probabilities and not scores:
            raise UserError(
                "the model's answers lie in [0, 1] and sum to 1: expected logits, for probabilities have no gradient "
                "where the model is sure; wrap it by gb.models.as_logits(model, 'probabilities')"
            )
        return self.traits

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of pixels (N, C, H, W) in [0, 1], for attacks to climb.

        By the fast copy if there is one, and divided by the temperature.
        """
        with _without_autocast(images.device.type):
            if not self._seen_input:
                self._check_input(images)
                with seeded(0, "view"):  # a view that is kept is not drawn again: it must not shift draws
                    self._view = None if self.fast is None else self._make_view(images, self.fast)
                self._seen_input = True
            if self._view is None:
                logits = self.forward_original(images)
            else:
                self.forwards += len(images)
                logits = logits_of(self._view(self._kept(images.contiguous(memory_format=self._layout))))
        return logits if self.temperature == 1 else logits / self.temperature

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the model itself: what every score is taken from."""
        if not self._seen_input:
            self._check_input(images)
        self.forwards += len(images)
        with _without_autocast(images.device.type):
            return logits_of(self.model(self._kept(images)))

    def _kept(self, images: torch.Tensor) -> torch.Tensor:
        # A copy for a model that writes into its input: what the attack keeps must not change.
        return images.clone() if self.traits is not None and self.traits.writes else images

    def gradient(self, value: torch.Tensor, wrt: torch.Tensor, images: int) -> torch.Tensor:
        """Return the gradient of a scalar with respect to ``wrt``, counted as ``images`` backward passes.

        Zero where the value does not depend on ``wrt`` in any way that autograd can see: a model may cut its graph.
        """
        self.backwards += images
        if not value.requires_grad:
            return torch.zeros_like(wrt)
        with _without_autocast(wrt.device.type):  # the products of a backward would be cast too
            (gradient,) = torch.autograd.grad(value, wrt, materialize_grads=True)
        return gradient

    def _make_view(self, images: torch.Tensor, fast: FastPath) -> Callable[[torch.Tensor], Any] | None:
        view: Callable[[torch.Tensor], Any] = self.model
        self.notes = "the model itself"
        if self.batch_norm == "eval":
            try:
                made = fold_batchnorms(self.model, images[:2].detach())
            except Exception as error:  # whatever keeps a model from being copied, the model itself still works
                self.notes = f"the model itself ({type(error).__name__} while copying it: {error})"
                return None
            self.notes = f"a copy with {len(made.pairs)} BatchNorms folded"
            view = made.view
            if self._likes_channels_last(images, fast):
                self._layout = torch.channels_last
                self.notes += ", channels last"
            # The copy is shared with earlier victims of this model, which may have wanted it otherwise.
            made.view.to(memory_format=self._layout)
        if fast.precision != "float32":
            view = _in_precision(view, images.device.type, getattr(torch, fast.precision))
            self.notes += f", {fast.precision}"
        if fast.compile:
            view = self._compiled(view, images)
        return view

    def _likes_channels_last(self, images: torch.Tensor, fast: FastPath) -> bool:
        """Whether convolutions are faster with their channels last: on CPUs, and in the short types of accelerators.

        A model that the user has laid out so stays so.
        """
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        if images.device.type == "cpu" or fast.precision != "float32":
            return bool(convolutions)
        return any(
            conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
            for conv in convolutions
        )

    def _compiled(self, view: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        mode = "default" if images.device.type == "cpu" else "reduce-overhead"
        compiled = torch.compile(view, mode=mode)
        try:
            with torch.enable_grad():
                point = images[:2].detach().requires_grad_()
                torch.autograd.grad(logits_of(compiled(point)).sum(), point)
        except Exception as error:
            self.notes += f", not compiled ({type(error).__name__})"
            return view
        self.notes += ", compiled"
        if mode == "default":
            return compiled
        self.notes += " with CUDA graphs"

        def answer(images: torch.Tensor) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return logits_of(compiled(images)).clone()  # the next replay writes over what this one returned

        return answer

    def _check_input(self, images: torch.Tensor) -> None:
        if any(True for _ in self.model.parameters()) and self.device != images.device:
            raise UserError(
                f"the model is on {self.device} and the images on {images.device}: move one of them to the other"
            )
        first = next((module for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None and first.in_channels != images.shape[1]:
            raise UserError(
                f"the images have {images.shape[1]} channels, but the model takes {first.in_channels}: "
                "choose data and model that fit each other"
            )


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:  # the usual case, which shall cost nothing
        yield


def _in_precision(
    view: Callable[[torch.Tensor], Any], device: str, kind: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    def answer(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, kind):
            return logits_of(view(images)).float()

    return answer
