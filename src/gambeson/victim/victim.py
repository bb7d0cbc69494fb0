"""The victim: the frozen, counted view of a model that every attack works on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gambeson.base import Config, UserError, autograd_limits, default_dtype, seeded
from gambeson.models.outputs import at_image_size
from gambeson.victim.bn_folding import FoldedModel, checksum, fold_batchnorms, signature
from gambeson.victim.graphs import Job, has_graphs
from gambeson.victim.inspect import ModelTraits, NoGradientError, dtype_of, explained, inspect_model, logits_of, repeats
from gambeson.victim.loss_scaling import LossScaling
from gambeson.victim.modes import BatchNormMode, Caller, called, frozen

Precision = Literal["float32", "bfloat16", "float16"]
"""Data types of a forward pass."""


class FastPath(Config):
    """Settings of the fast copy of a model; whatever a model does not support is skipped and noted."""

    precision: Precision = "float32"
    """Of convolutions and matrix products (autocast). Lower precision is faster on accelerators, and on CPUs that
    support it; gradients are returned in float32."""
    compile: bool = False
    """Compile the copy, which fuses biases and activations: for jobs long enough to repay ten or twenty seconds of
    compilation, repeated for every batch size. On CPUs the measured gain was below a tenth."""
    graphs: bool = True
    """On a CUDA device, replay the gradient of a batch shape as a CUDA graph from its third call on: the same kernels
    without their launches, which bound small batches. Not for random models."""


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model that keeps a computed tensor, such as the weight of ``weight_norm``."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    with torch.no_grad():  # a program's parameters would be copied as results of an operation
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept if not value.is_leaf})


class Victim:
    """A model under attack. Use it as a context manager; inside, it is frozen (see :func:`frozen`).

    A fast victim computes with a copy whose BatchNorms are folded into its convolutions (:func:`fold_batchnorms`) and
    which, on a CPU and below full precision, is in channels-last layout: on a CPU this takes half the time. Scores
    are never taken on the copy: :meth:`forward_original` is the model as given.

    The precision is that of ``fast``, float32 by default, independent of a surrounding autocast: training in lower
    precision neither crafts nor scores in it. Images are cast to the type of the model's weights, and its logits, for
    attacks, back to that of the images.

    Args:
        model: any module from pixels (N, C, H, W) in [0, 1] to logits.
        fast: use such a copy; the weights must then not change while the victim is in use. True: the defaults of
            :class:`FastPath`.
        batch_norm: mode under attack; modes other than ``eval`` disable the copy.

    Attributes:
        forwards: images sent forward so far.
        backwards: images whose gradient was taken so far.
        notes: what the fast path did, or why it is off.
        traits: what :meth:`inspect` saw; None before.
        votes: how often the model is asked where it is scored; the majority is its answer. None: once, and a random
            model :data:`gambeson.victim.DEFAULT_VOTES` times.
        members: the models of a :class:`gambeson.victim.ModelAverage`; none of a single model.
        allow_no_graph: the gradient of a model without a graph is zero, as audits want it, which report that; otherwise
            it is refused.
        most: images that attacks send through the model at once; None: any number. For a model whose gradient is false
            in larger batches.
        temperature: what the logits that attacks see are divided by; 1 leaves them as they are. It changes no answer.
            None: 1, unless an attack chooses (:data:`gambeson.victim.Temperature`).
        before_call: called before images are sent forward; it may raise, as a limit on time does. None: nothing is.
    """

    members: Sequence[Victim] = ()

    def __init__(self, model: nn.Module, *, fast: bool | FastPath = False, batch_norm: BatchNormMode = "eval") -> None:
        self.model = model
        self.dtype = dtype_of(model)
        self.batch_norm = batch_norm
        self.fast = FastPath() if fast is True else fast or None
        self.forwards = 0
        self.backwards = 0
        self.notes = "the model itself"
        self.traits: ModelTraits | None = None
        self.votes: int | None = None
        self.allow_no_graph = False
        self.most: int | None = None
        self.temperature: float | None = None
        self.before_call: Callable[[], None] | None = None
        self._default = torch.get_default_dtype()
        self._guard = ExitStack()
        self._trained = False
        self._seen_input = False
        self._writes: bool | None = None  # whether the model writes into its input; None before its first call
        self._view: Callable[[torch.Tensor], Any] | None = None
        self._layout = torch.contiguous_format
        self._copy: FoldedModel | None = None  # whose gradients are replayed as CUDA graphs

    def __enter__(self) -> Victim:
        self._default = torch.get_default_dtype()
        if torch.is_inference_mode_enabled():  # else its exit would only put the gradient mode of now back
            self._guard.enter_context(torch.inference_mode(False))
        self._guard.enter_context(default_dtype())
        self._trained = getattr(self.model, "training", False)
        self._guard.enter_context(frozen(self.model, self.batch_norm))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view = self._copy = self.traits = None
        self._seen_input = False
        self._guard.close()

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters; the CPU for a model without any."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def coarse(self) -> bool:
        """Whether logits for attacks are computed below float32, so that the model itself may answer otherwise."""
        return self.dtype.itemsize < 4 or (self.fast is not None and self.fast.precision != "float32")

    def inspect(self, images: torch.Tensor, *, scores: bool = False) -> ModelTraits:
        """Inspect the model before its first use; nothing is counted.

        Args:
            images: (N, C, H, W) in [0, 1], of which a few are sent through the model several times.
            scores: whether probabilities are acceptable.

        Raises:
            UserError: the model returns probabilities, one score for two classes, or no logits.
        """
        if self.traits is None or self.traits.grid != images.shape[2:]:
            self._check_input(images)
            with self._as_called(images):
                self.traits = _traits(self.model, images.to(self.dtype))
            self._writes = bool(self._writes) or self.traits.writes
        if (self.traits.probabilities or self.traits.sigmoids) and not scores:
            what, name = ("and sum to 1", "probabilities") if self.traits.probabilities else ("by a sigmoid", "sigmoid")
            raise UserError(
                f"the model's outputs lie in [0, 1] {what}: expected logits, as probabilities have no gradient "
                f"where the model is confident; wrap it with gb.models.as_logits(model, {name!r})"
            )
        return self.traits

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K) or (N, K, H, W) of pixels (N, C, H, W) in [0, 1], for attacks.

        Computed by the fast copy if there is one, at most :attr:`most` at once, and divided by the temperature.
        """
        if self.most is not None and len(images) > self.most:
            return torch.cat([self(part) for part in images.split(self.most)])
        if self.before_call is not None:
            self.before_call()
        with self._as_called(images):
            self._prepare(images)
            if self._view is None:
                logits = self.forward_original(images)
            else:
                self.forwards += len(images)
                logits = self._logits(self._view, images.contiguous(memory_format=self._layout))
            logits = logits.to(images.dtype)
        return self._scaled(logits)

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.temperature is None or self.temperature == 1 else logits / self.temperature

    def _prepare(self, images: torch.Tensor) -> None:
        """Make the fast copy, once."""
        if not self._seen_input:
            self._check_input(images)
            with seeded(0, "view"):  # must not advance the generators
                self._view = None if self.fast is None else self._make_view(images, self.fast)
            self._seen_input = True

    def forward_original(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of the original model, in float32 or better, on which every score is taken."""
        if self.before_call is not None:
            self.before_call()
        if not self._seen_input:
            self._check_input(images)
        self.forwards += len(images)
        with self._as_called(images):
            logits = self._logits(self.model, images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def forward_apart(self, images: torch.Tensor, caller: Caller = "no_grad") -> torch.Tensor:
        """Return what :meth:`forward_original` does, asked in a thread of its own: on its stack is nobody's code.

        Args:
            images: (N, C, H, W) in [0, 1].
            caller: how that thread calls the model.
        """
        self.forwards += len(images)
        with self._as_called(images), ThreadPoolExecutor(1) as pool:
            ask = called(self.model, caller)(self.model.__call__)  # the mode is the thread's
            logits = self._logits(lambda sent: pool.submit(ask, sent).result(), images).detach()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits(self, model: Callable[[torch.Tensor], Any], images: torch.Tensor) -> torch.Tensor:
        followed = torch.is_grad_enabled() and images.requires_grad
        scaling = LossScaling()
        # A copy for a model that writes into its input: the attack's images shall not change, nor a leaf be written to.
        sent = (scaling.images(images) if followed else images).to(self.dtype, copy=self._writes is not False)
        with explained(images):
            logits = at_image_size(logits_of(model(sent), len(images)), images)
        self._writes = sent._version > 0 if self._writes is None else self._writes
        if followed and not logits.requires_grad and not self.allow_no_graph:
            raise NoGradientError
        return scaling.logits(logits) if followed and (self.coarse or logits.dtype.itemsize < 4) else logits

    @contextmanager
    def _as_called(self, images: torch.Tensor) -> Iterator[None]:
        """What the model computes under: no autocast, and the caller's default type."""
        device = images.device.type
        autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with default_dtype(self._default), autocast:
            yield

    def count_backward(self, images: int) -> None:
        """Count a backward pass of so many images."""
        self.backwards += images

    def gradient(
        self,
        value: torch.Tensor,
        wrt: torch.Tensor,
        images: int,
        cotangent: torch.Tensor | None = None,
        *,
        keep: bool = False,
        batched: bool = False,
    ) -> torch.Tensor:
        """Return the gradient of a scalar with respect to ``wrt``, counted as ``images`` backward passes.

        Args:
            value: a scalar, or a tensor with a cotangent of its shape.
            wrt: a leaf.
            images: their number.
            cotangent: None for a scalar.
            keep: keep the graph for another backward.
            batched: whether there are several cotangents, (R, *value.shape), for all of which one backward is made:
                the result is (R, *wrt.shape).

        Raises:
            NoGradientError: ``value`` does not depend on ``wrt``, which :attr:`allow_no_graph` takes for zero.
        """
        self.count_backward(images)
        gradient = None
        if value.requires_grad:
            with self._as_called(wrt), autograd_limits():  # autocast would also cast the products of the backward pass
                (gradient,) = torch.autograd.grad(
                    value, wrt, cotangent, retain_graph=keep, allow_unused=True, is_grads_batched=batched
                )
        if gradient is None and not self.allow_no_graph:
            raise NoGradientError
        if gradient is not None:
            return gradient
        return torch.zeros_like(wrt if cotangent is None or not batched else wrt.expand(len(cotangent), *wrt.shape))

    def repeated(
        self, what: Hashable, job: Job, images: torch.Tensor, *tensors: torch.Tensor, by_row: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return ``job(images, *tensors)``, from a CUDA graph if the fast path has one (:attr:`FastPath.graphs`).

        Args:
            what: what the job computes with this victim; equal for equal functions.
            job: a function of tensors alone, to tensors, that sends them through this victim.
            images: (N, C, H, W) in [0, 1].
            tensors: its other inputs.
            by_row: whether every input has a row per image, and every row of the outputs depends on that row alone.
                Where images drop out, so that each call has fewer, the last one then fills up to one of a few sizes,
                whose graphs are used again; an output without rows counts it each time.
        """
        if self.before_call is not None:
            self.before_call()
        if self.fast is not None:
            with self._as_called(images):
                self._prepare(images)
        tensors, copy = (images, *tensors), self._copy
        if copy is None:
            return job(*tensors)
        before = self.forwards, self.backwards
        # Not yet known is as False: a graph's inputs are its own, and another victim has tried the same copy.
        state = (self.fast, self._layout, self.temperature, self.most, bool(self._writes))
        count = len(images)
        size = copy.graphs.size_for(count) if by_row else count
        filled = tensors
        if size > count:
            filled = tuple(torch.cat([one, one[-1:].expand(size - count, *one.shape[1:])]) for one in tensors)
        graph = copy.graphs.find(
            (what, state), job, filled, lambda: (self.forwards, self.backwards), lambda: signature(copy.view)
        )
        self.forwards, self.backwards = before
        if graph is None:
            return job(*tensors)
        self.forwards += graph.counts[0] * count // size
        self.backwards += graph.counts[1] * count // size
        return tuple(one[:count] if one.ndim else one for one in graph(filled))

    def _make_view(self, images: torch.Tensor, fast: FastPath) -> Callable[[torch.Tensor], Any] | None:
        view: Callable[[torch.Tensor], Any] = self.model
        self.notes = "the model itself"
        if self.batch_norm == "eval":
            try:
                wanted = torch.channels_last if self._likes_channels_last(images, fast) else torch.contiguous_format
                example = images[:2].detach().to(self.dtype)
                made = fold_batchnorms(self.model, example, wanted, trained=self._trained)
            except Exception as error:  # a model that cannot be copied is used itself
                self.notes = f"the model itself ({type(error).__name__} while copying it: {error})"
                return None
            self.notes = f"a copy with {len(made.pairs)} BatchNorms folded"
            view = made.view
            self._layout = made.layout
            if wanted == torch.channels_last:
                self.notes += ", channels last" if made.layout == wanted else ", which cannot be channels last"
            if fast.graphs and has_graphs(images.device):
                made.keep_graphs()
                self._copy = made
        if fast.precision != "float32":
            view = _in_precision(view, images.device.type, getattr(torch, fast.precision))
            self.notes += f", {fast.precision}"
        if fast.compile:
            view = self._compiled(view, images)
        return view

    def _likes_channels_last(self, images: torch.Tensor, fast: FastPath) -> bool:
        """Whether convolutions are faster in channels-last layout: on CPUs, and on accelerators below full precision.

        TF32 is below it. A model already in that layout keeps it.
        """
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        if images.device.type == "cpu" or fast.precision != "float32" or torch.backends.cudnn.allow_tf32:
            return bool(convolutions)
        return any(
            conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous()
            for conv in convolutions
        )

    def _compiled(self, view: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        compiled: Callable[[torch.Tensor], Any] = torch.compile(
            view, dynamic=False
        )  # kernels of fixed shapes are faster
        try:
            with torch.enable_grad():
                point = images.detach().to(self.dtype).contiguous(memory_format=self._layout).requires_grad_()
                torch.autograd.grad(logits_of(compiled(point)).sum(), point)
        except Exception as error:
            self.notes += f", not compiled ({type(error).__name__})"
            return view
        self.notes += ", compiled"
        return compiled

    def _check_input(self, images: torch.Tensor) -> None:
        if any(True for _ in self.model.parameters()) and self.device != images.device:
            raise UserError(
                f"the model is on {self.device} and the images on {images.device}: move one of them to the other"
            )


_inspected: WeakKeyDictionary[nn.Module, tuple[Hashable, ModelTraits]] = WeakKeyDictionary()


def _traits(model: nn.Module, images: torch.Tensor) -> ModelTraits:
    """Inspect a model, unless it is unchanged since it was last inspected: in settings, modes, weights and images.

    What it does may depend on an object that it holds or on a global, too, so it has to repeat itself still.
    """
    tensors = [*model.parameters(), *model.buffers()]
    unversioned = any(tensor.is_inference() for tensor in tensors)  # these have no version
    if unversioned or _get_current_dispatch_mode() is not None:  # a mode may turn the randomness off
        return inspect_model(model, images)
    versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    modes = tuple(module.training for module in model.modules())
    state = (signature(model), modes, versions, checksum(tensors), images.shape[1:], images.dtype)
    known = _inspected.get(model)
    if known is None or known[0] != state or not (known[1].varies or repeats(model, images)):
        _inspected[model] = known = state, inspect_model(model, images)
    return known[1]


def _in_precision(
    view: Callable[[torch.Tensor], Any], device: str, kind: torch.dtype
) -> Callable[[torch.Tensor], torch.Tensor]:
    def answer(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, kind):
            return logits_of(view(images)).float()

    return answer
