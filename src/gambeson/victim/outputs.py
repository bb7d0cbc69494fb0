"""Where the logits are in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gambeson.base import UserError

KEYS = ("logits", "out")
"""Where the logits are looked for in a mapping: the customs of transformers and of torchvision's segmentation."""


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits in a model's output.

    That is the output itself; its ``.logits``; the entry ``logits`` or ``out`` of a mapping; or the first of several.

    Raises:
        UserError: there are none.
    """
    found = output
    if not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = next((output[key] for key in KEYS if key in output), None)
        elif found is None and isinstance(output, Sequence) and len(output):
            found = output[0]
    if not isinstance(found, torch.Tensor):
        keys = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise UserError(
            f"the model returned {type(output).__name__}{keys}: expected a tensor of logits, an object with `.logits`, "
            "a mapping with `logits` or `out`, or a tuple that starts with them; wrap the model so that it returns "
            "the logits alone, for example by gb.models.as_logits(model, 'KEY')"
        )
    return found
