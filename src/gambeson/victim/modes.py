"""The modes of a model: frozen while it is attacked, and as a script of its owner's would call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import nn

BatchNormMode = Literal["eval", "batch", "train"]
"""Mode of a model under attack. ``eval``: evaluation mode, BatchNorm with its running statistics. ``batch``: evaluation
mode, but BatchNorms that were in training mode use the statistics of the attacked batch, without updating the running
ones. ``train``: every sub-module keeps its mode, so that dropout is on and running statistics include the attacked
images."""

Caller = Literal["no_grad", "inference", "grad"]
"""How a model is called from outside: without gradients; in torch's inference mode, as models are deployed; or with
gradients on, its parameters trainable, as in a script that turned nothing off."""


@contextmanager
def frozen(model: nn.Module, batch_norm: BatchNormMode = "eval") -> Iterator[None]:
    """Keep ``model`` in evaluation mode without parameter gradients inside the block, and restore every sub-module.

    Modes and flags are read on entry, per sub-module and parameter, and restored after exceptions too: a BatchNorm that
    the user had frozen stays frozen.

    Args:
        model: any module.
        batch_norm: see :data:`BatchNormMode`.
    """
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters() if not parameter.is_inference()]
    norms = [module for module, mode in modes if mode and isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [norm for norm in norms if norm.track_running_stats] if batch_norm == "batch" else []
    recurrent = [(module, module.dropout) for module, _ in modes if isinstance(module, nn.RNNBase)]
    try:
        if batch_norm != "train":
            with suppress(NotImplementedError):  # an exported program has one mode
                model.eval()
            for layer, _ in recurrent:  # cuDNN has their gradient in training mode only, which is dropout alone
                layer.training, layer.dropout = True, 0.0
        for norm in norms if batch_norm == "batch" else []:
            norm.training = True
        for norm in held:
            norm.track_running_stats = False  # in training mode: batch statistics, not stored
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for norm in held:
            norm.track_running_stats = True
        for layer, dropout in recurrent:
            layer.dropout = dropout
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def called(model: nn.Module, caller: Caller) -> Iterator[None]:
    """Call ``model`` as ``caller`` does inside the block, in the thread that enters it.

    Args:
        model: any module.
        caller: see :data:`Caller`.
    """
    if caller != "grad":
        with torch.inference_mode() if caller == "inference" else torch.no_grad():
            yield
        return
    held = [one for one in model.parameters() if one.is_floating_point() and not one.requires_grad]
    held = [one for one in held if not one.is_inference()]
    try:
        for parameter in held:
            parameter.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        for parameter in held:
            parameter.requires_grad_(False)
