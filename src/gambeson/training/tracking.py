"""Where the numbers of a run go beside its own file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gambeson.base import UserError
from gambeson.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def tracking(recipe: Recipe, out: Path | None) -> dict[str, Any]:
    """Return what an ``Accelerator`` has to be told, nothing where no tracker is asked for.

    Raises:
        UserError: there is no run folder, or the tracker is not installed.
    """
    if recipe.track == "none":
        return {}
    if out is None or importlib.util.find_spec(recipe.track) is None:
        raise UserError(
            f"track {recipe.track!r} needs a run folder and the package {recipe.track}: give out, and "
            "pip install gambeson[track]"
        )
    return {"log_with": recipe.track, "project_dir": str(out / "track")}


def finish(accelerator: Accelerator) -> None:
    """Close the trackers, where there are any; the process group stays open for a later run."""
    for tracker in getattr(accelerator, "trackers", []):
        tracker.finish()
