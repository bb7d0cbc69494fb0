"""Derandomisation of models: every random draw of torch is replaced by the mean of its distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Derandomize(TorchDispatchMode):
    """Inside the block random draws of torch are the means of their distributions; gradients are not affected.

    Dropout keeps all of its input, Gaussian noise is zero, and a random size or position is the middle one. Draws
    without a meaningful mean (permutations, class indices) are the first or the likeliest.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace random operators, and pass on all others."""
        name = func.overloadpacket.__name__
        answer = _ANSWERS.get(name)
        if answer is not None and func.namespace == "aten":
            return answer(func, args, dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _argument(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return an operator's positional or keyword argument, or its default."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            value = args[place] if place < len(args) else kwargs.get(name, argument.default_value)
            return default if value is None else value
    return default


def _filled(mean: Callable[[Callable[..., Any]], Any]) -> Callable[..., Any]:
    """An operator that draws into a tensor (``normal_``) or into one like its first (``randn_like``)."""

    def answer(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        value = mean(lambda name, default=None: _argument(func, args, kwargs, name, default))
        name = func.overloadpacket.__name__
        if name.endswith("_"):
            return args[0].copy_(value) if isinstance(value, torch.Tensor) else args[0].fill_(value)
        if name.endswith("_like"):
            return torch.full_like(args[0], value, **_of_tensors(kwargs))
        if isinstance(value, torch.Tensor):
            return value.clone()
        size = _argument(func, args, kwargs, "size")
        kept = _of_tensors(kwargs)
        if isinstance(value, int) and kept.get("dtype") is None:
            kept["dtype"] = torch.int64
        return torch.full(size, value, **kept)

    return answer


def _of_tensors(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensor settings among an operator's arguments, without the generator."""
    settings = ("dtype", "layout", "device", "pin_memory", "memory_format")
    return {key: kwargs[key] for key in settings if key in kwargs}


def _middle(of: Callable[..., Any]) -> int:
    low, high = of("low", of("from", 0)), of("high", of("to"))
    return int(low) if high is None else (int(low) + int(high) - 1) // 2


def _kept_whole(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)


def _in_order(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    return torch.arange(_argument(func, args, kwargs, "n"), **{"dtype": torch.int64, **_of_tensors(kwargs)})


def _likeliest(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0].topk(int(_argument(func, args, kwargs, "num_samples")), dim=-1).indices


_ZERO = _filled(lambda of: 0.0)
_HALF = _filled(lambda of: 0.5)
_MEAN = _filled(lambda of: of("mean", 0.0))
_CHANCE = _filled(lambda of: of("p", of("self", 0.5)))
_MIDDLE = _filled(_middle)
_ANSWERS: dict[str, Callable[..., Any]] = {
    "randn": _ZERO,
    "randn_like": _ZERO,
    "normal": _MEAN,
    "normal_": _MEAN,
    "normal_functional": _MEAN,
    "rand": _HALF,
    "rand_like": _HALF,
    "uniform_": _filled(lambda of: (of("from", 0.0) + of("to", 1.0)) / 2),
    "bernoulli": _CHANCE,
    "bernoulli_": _CHANCE,
    "randint": _MIDDLE,
    "randint_like": _MIDDLE,
    "random_": _MIDDLE,
    "randperm": _in_order,
    "multinomial": _likeliest,
    "exponential_": _filled(lambda of: 1 / of("lambd", 1.0)),
    "poisson": _filled(lambda of: of("self")),
    "native_dropout": _kept_whole,
}
"""Replacement of each random operator of torch, by name."""
