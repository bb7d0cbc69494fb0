"""What every room stands on: errors, validated configuration, numbers, seeds and atomic files."""

from gambeson.base.config import Config, Number, config_error
from gambeson.base.errors import OutOfSpace, UserError, unknown_name
from gambeson.base.files import read_json, write_bytes, write_json, write_text, write_yaml
from gambeson.base.seeds import derive, generator, seeded
from gambeson.base.tensors import load_tensors, pixel_bytes, save_tensors

__all__ = [
    "Config",
    "Number",
    "OutOfSpace",
    "UserError",
    "config_error",
    "derive",
    "generator",
    "load_tensors",
    "pixel_bytes",
    "read_json",
    "save_tensors",
    "seeded",
    "unknown_name",
    "write_bytes",
    "write_json",
    "write_text",
    "write_yaml",
]
