"""Optional dependencies, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from gambeson.base.errors import UserError, one_line

EXTRAS = {
    "huggingface_hub": "timm",
    "mlxtend": "quickstart",
    "onnx2torch": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "optuna": "search",
    "pyarrow": "parquet",
    "segmentation_models_pytorch": "smp",
    "sklearn": "digits",
}
"""The extra that installs a package, where it has another name."""


def required(module: str, name: str, otherwise: str = "") -> ModuleType:
    """Import an optional dependency.

    Args:
        module: to import, such as ``timm`` or ``sklearn.datasets``.
        name: of what needs it.
        otherwise: what can be done without it, such as ``leave trials out``.

    Raises:
        UserError: it is not installed or does not work; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        reason = "is not installed" if error.name in (module, package) else f"cannot be imported ({one_line(error)})"
        extra = "pandas" if package == "pandas" else f"'gambeson[{EXTRAS.get(package, package)}]'"
        advice = f"pip install {extra}" + (f", or {otherwise}" if otherwise else "")
        raise UserError(f"{name} needs {package}, which {reason}: {advice}") from None
