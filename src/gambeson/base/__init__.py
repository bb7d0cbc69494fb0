"""Foundations of every package: errors, validated settings, the registry, seeds, run folders and atomic files."""

from gambeson.base import notebook
from gambeson.base.config import Config, Number
from gambeson.base.distributed import average, place, share_first, total
from gambeson.base.environment import (
    default_dtype,
    environment,
    full_precision,
    pick_device,
    repeatable,
    twice_differentiable,
)
from gambeson.base.errors import (
    OutOfSpace,
    UnknownSetting,
    UserError,
    autograd_limits,
    count,
    one_line,
    unknown_name,
)
from gambeson.base.files import (
    load_tensors,
    pixel_bytes,
    read_json,
    save_tensors,
    writable,
    write_bytes,
    write_json,
    write_text,
    write_yaml,
)
from gambeson.base.progress import show_progress, task
from gambeson.base.registry import Registered, Registry
from gambeson.base.run_folder import check_run, close_run, open_run, read_settings
from gambeson.base.seeds import derive, generator, seeded

__all__ = [
    "Config",
    "Number",
    "OutOfSpace",
    "Registered",
    "Registry",
    "UnknownSetting",
    "UserError",
    "autograd_limits",
    "average",
    "check_run",
    "close_run",
    "count",
    "default_dtype",
    "derive",
    "environment",
    "full_precision",
    "generator",
    "load_tensors",
    "notebook",
    "one_line",
    "open_run",
    "pick_device",
    "pixel_bytes",
    "place",
    "read_json",
    "read_settings",
    "repeatable",
    "save_tensors",
    "seeded",
    "share_first",
    "show_progress",
    "task",
    "total",
    "twice_differentiable",
    "unknown_name",
    "writable",
    "write_bytes",
    "write_json",
    "write_text",
    "write_yaml",
]
