"""Inspection of models: where the logits are in an output, their shape, and whether they are logits at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gambeson.base import UserError, seeded
from gambeson.models.outputs import KEYS, are_probabilities, are_shares, at_image_size


def require_module(model: object) -> None:
    """Raise a ``UserError`` unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}: expected a torch.nn.Module from pixels to logits")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type that a model computes in: that of most of its floating-point weights, else of its buffers.

    Raises:
        UserError: not a module, or a lazy one whose weights do not exist yet.
    """
    require_module(model)
    for tensors in (model.parameters(), model.buffers()):
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors:
            if is_lazy(tensor):
                raise UserError(
                    "the model has lazy layers whose weights do not exist yet: send it a batch once, model(images)"
                )
            if tensor.is_floating_point():
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        if sizes:
            return max(sizes, key=sizes.__getitem__)
    return torch.float32


class NoGradientError(UserError):
    """The model's logits have no gradient with respect to its images."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits do not depend on its images as far as autograd can see, so an attack would do nothing: "
            "its forward runs under torch.no_grad or torch.inference_mode, or detaches (.detach(), .data, argmax, "
            "numpy); remove that, or choose a query attack such as square"
        )


_MISFIT = re.compile(
    r"to have (\d+) channels, but got (\d+) channels|shapes cannot be multiplied|is invalid for input of size|"
    r"running_mean should contain|must match the size of tensor|Kernel size can't be greater|utput size is too small|"
    r"Guard failed|split_with_sizes expects|must be divisible by"
)
"""What torch says of images of another size or number of channels than a layer takes, or of another batch size."""
_TYPES = re.compile(r"type .* and .* type .* should be the same|have the same dtype|expected scalar type")
"""What torch says of weights and values of different types."""


@contextmanager
def explained(images: torch.Tensor) -> Iterator[None]:
    """Name the likely cause of a model's failure on ``images`` (N, C, H, W) inside the block.

    Raises:
        UserError: the images do not fit the model, or its weights have no graph, by torch's message.
    """
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if "Inference tensors cannot be saved" in str(error):
            raise UserError(
                "the model's weights were made in torch.inference_mode, which keeps no graph: create or load the model "
                "outside of it"
            ) from error
        if _TYPES.search(str(error)):
            raise UserError(
                f"the model mixes types ({' '.join(str(error).split())}): convert it as a whole, as by model.float()"
            ) from error
        found = _MISFIT.search(str(error))
        if found is None and type(error) is not RuntimeError:  # how models complain of images themselves
            found = re.match("()()", "")
        if found is None:
            raise
        if found[2] == str(images.shape[1]):
            raise UserError(
                f"the images have {images.shape[1]} channels, but the model takes {found[1]}: choose data and model "
                "that fit each other"
            ) from error
        raise UserError(
            f"the model failed on {len(images)} images of shape {tuple(images.shape[1:])} "
            f"({' '.join(str(error).split())}): choose data and model that fit each other; wrap a model that takes a "
            "fixed or an even number of images with gb.models.fixed_batch(model, NUMBER)"
        ) from error


def logits_of(output: Any, images: int | None = None) -> torch.Tensor:
    """Return the logits in a model's output.

    These are the output itself, its ``.logits``, the entry ``logits`` or ``out`` of a mapping, or the first element of
    a tuple.

    Args:
        output: of the model.
        images: their number; a model that squeezes its output drops the first dimension where it is 1.

    Raises:
        UserError: no logits are found.
    """
    found = output
    if not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = next((output[key] for key in KEYS if key in output), None)
        elif found is None and isinstance(output, Sequence) and len(output):
            found = output[0]
    if not isinstance(found, torch.Tensor) or found.is_complex():
        keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise UserError(
            f"the model returned {type(output).__name__}{keys}: expected a tensor of real logits, an object with "
            "`.logits`, a mapping with `logits` or `out`, or a tuple that starts with them; wrap the model so that "
            "it returns the logits alone, for example by gb.models.as_logits(model, 'KEY')"
        )
    return found[None] if images == 1 and found.ndim in (1, 3) else found


_SAME_VALUES = re.compile(
    "View|Squeeze|Unsqueeze|Clone|Alias|Permute|Transpose|Reshape|ToCopy|Slice|Select|Cat|Stack|Upsample"
)
"""Operations whose results are values of their inputs, or lie between them, as autograd calls them."""


def ends_with_sigmoid(model: nn.Module, images: torch.Tensor) -> bool:
    """Tell whether the last thing a model computes is a sigmoid, by its graph."""
    with torch.enable_grad():
        node = logits_of(model(images.detach().clone().requires_grad_())).grad_fn
    while node is not None and _SAME_VALUES.match(node.name()):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SigmoidBackward")


CALLS = 5
"""Number of calls with the same images that must agree."""
SLIGHT = 0.02
"""Noise, as a share of what tells classes apart, that decides hardly an answer (ours): of the testbed's random models
the least noisy has 0.1, and a network with noise of 0.001 on its weights 0.01."""
_ALIKE = 0.9
"""Least cosine of two gradients that are one (ours)."""
_FEW = 8
_QUANTILES = 2**20
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """Traits of a model, found by :func:`inspect_model`."""

    shape: tuple[int, ...]
    """Of the logits, (N, K) or (N, K, H, W), for the few images that were looked at."""
    grid: tuple[int, ...]
    """Height and width of these images."""
    gap: float
    """Largest difference between the logits of two calls with the same images."""
    size: float = 1.0
    """What differences of logits are measured by, see :func:`size_of`."""
    steady: bool = True
    """Whether two calls have about the same gradient, or none; looked at where their logits differ a little."""
    shared: bool
    """The model is random, but equal images in one batch get equal outputs: copies in one forward are not independent
    samples."""
    writes: bool
    """The model modifies its input."""
    probabilities: bool
    """Every row lies in [0, 1] and sums to 1."""
    sigmoids: bool
    """The outputs are sigmoids, one per class."""
    bare: bool
    """The output is the tensor of logits itself, and not something that holds it, or logits of a coarser grid."""

    @property
    def varies(self) -> bool:
        """Whether two calls differ at all."""
        return self.gap > 0

    @property
    def noise(self) -> float:
        """The difference of two calls as a share of what tells classes apart."""
        return self.gap / max(self.size, _TINY)

    @property
    def stochastic(self) -> bool:
        """Whether the model is random: calls differ by what decides answers, or in the gradient.

        Noise below :data:`SLIGHT` decides hardly an image: were it enough, a millionth of noise would shield a model
        from all that is only asked of models that repeat themselves.
        """
        return self.noise > SLIGHT or not self.steady

    def require_fixed(self, instead: str) -> None:
        """Refuse a random model.

        Raises:
            UserError: the model is random; the message names what to do ``instead``.
        """
        if self.stochastic:
            raise UserError(
                f"the model is random (the logits of two calls with the same images differ by up to {self.gap:.3g}): "
                f"one draw tells an attack little; {instead}, or turn the randomness off"
            )


def size_of(logits: torch.Tensor) -> torch.Tensor:
    """Return what differences of logits (N, K) or (N, K, H, W) are measured by, a scalar.

    That is the distance between the 15 % and 85 % quantiles of the best two logits of each answer. Classes that are
    masked by a large negative number do not count, nor does one image of eight whose logits are a million times as
    large: both would make every difference look small.
    """
    two = logits.detach().float().topk(2, dim=1).values.nan_to_num(0, 0, 0).flatten()
    two = two[:: max(1, len(two) // _QUANTILES)]
    low, high = two.quantile(torch.tensor([0.15, 0.85], device=two.device, dtype=two.dtype))
    return high - low


def _steady(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether two calls have about the same gradient of the margin between the best two classes, or none."""
    found = []
    for _ in range(2):
        with torch.enable_grad():
            point = images.clone().requires_grad_()
            best = at_image_size(logits_of(model(point.clone()), len(point)), images).topk(2, dim=1).values
            if not best.requires_grad:
                return True
            (gradient,) = torch.autograd.grad((best[:, 0] - best[:, 1]).sum(), point, allow_unused=True)
        found.append(torch.zeros_like(point) if gradient is None else gradient)
    one, other = (gradient.double().flatten(1).nan_to_num(0, 0, 0) for gradient in found)
    same = torch.cosine_similarity(one, other) > _ALIKE
    return float((same | ((one == 0) & (other == 0)).all(1)).double().mean()) >= 0.5


@torch.no_grad()
def repeats(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether two calls with the same few images give the same logits; torch's global generators are not changed."""
    few = images[:_FEW].detach()
    with seeded(0, "look"), explained(few):
        one, other = (logits_of(model(few.clone()), len(few)) for _ in range(2))
    return torch.equal(one, other)


@torch.no_grad()
def inspect_model(model: nn.Module, images: torch.Tensor) -> ModelTraits:
    """Send a few images through a model several times; torch's global generators are not changed.

    A model is considered deterministic after :data:`CALLS` equal results: one that draws from few sizes or positions
    may well draw the same twice.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W) in [0, 1]; the first few are used.

    Raises:
        UserError: the output does not have one row per image, or one score only.
    """
    few = images[:_FEW].detach()
    with seeded(0, "look"), explained(few):
        given = few.clone()
        answer = model(given)
        raw, rest = logits_of(answer, len(few)), tuple(few.shape[2:])
        first = at_image_size(raw, few)
        if not first.is_floating_point():
            raise UserError(
                f"the model returned {first.dtype} of shape {tuple(first.shape)}: expected logits, which are floats; "
                "let it return the score of every class"
            )
        if tuple(first.shape) in ((len(few),), (len(few), 1), (len(few), *rest), (len(few), 1, *rest)):
            raise UserError(
                f"the model was given {len(few)} images and returned shape {tuple(first.shape)}, one score for two "
                "classes: expected logits (N, K) or (N, K, H, W) with K of at least 2; wrap it with "
                "gb.models.as_logits(model, 'one-logit'), or with 'sigmoid' where the score is a probability"
            )
        if first.ndim not in (2, 4) or len(first) != len(few) or first.shape[1] < 2:
            raise UserError(
                f"the model was given {len(few)} images and returned shape {tuple(first.shape)}: expected logits "
                "(N, K), or (N, K, H, W) for one answer per pixel, with K of at least 2"
            )
        # One wait for all.
        again = [logits_of(model(few.clone()), len(few)) for _ in range(1, CALLS)]
        # Equal infinities differ by NaN; non-finite logits are refused when they are scored.
        gaps = [(raw - other).abs().nan_to_num(0.0, 0.0).max() for other in again]
        certain = (are_shares(first), are_probabilities(first))
        found = torch.stack([*gaps, size_of(first), (given != few).any(), *certain]).tolist()
        gap, size = max(found[: CALLS - 1]), found[CALLS - 1]
        shared = False
        if gap > 0:
            one, other = logits_of(model(few[:1].repeat(2, 1, 1, 1)))[:2]
            shared = torch.equal(one, other)
        steady = not 0 < gap <= SLIGHT * size or _steady(model, few)
        writes, within, probabilities = (value > 0 for value in found[-3:])
        # A black box has no parameters, and no graph to look at.
        trainable = within and not probabilities and any(True for _ in model.parameters())
        sigmoids = trainable and ends_with_sigmoid(model, few)
    return ModelTraits(
        shape=tuple(first.shape),
        grid=rest,
        bare=isinstance(answer, torch.Tensor) and first is raw,
        gap=gap,
        size=size,
        steady=steady,
        shared=shared,
        writes=writes,
        probabilities=probabilities,
        sigmoids=sigmoids,
    )
