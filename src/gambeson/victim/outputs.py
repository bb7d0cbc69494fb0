"""Where the logits are in what a model returns."""

from __future__ import annotations

from typing import Any

import torch

from gambeson.base import UserError


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits in a model's output: the output itself, or its ``.logits``.

    Raises:
        UserError: there are none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"the model returned {type(output).__name__}: expected a tensor of logits or an object with `.logits`; "
            "wrap the model so that it returns the logits alone"
        )
    return logits
