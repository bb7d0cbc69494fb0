"""Gambeson: attack, harden and honestly judge vision models.

Universal adversarial perturbations (one perturbation that fools a model on most inputs) stand at the centre.
Images are float pixels in [0, 1], shape (N, C, H, W); every eps is in these units.

Each package below is imported at its first use (PEP 562), so that ``import gambeson`` alone does not wait for torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gambeson import (
        analysis,
        attacks,
        auditing,
        base,
        data,
        defenses,
        evaluation,
        hardening,
        models,
        report,
        studies,
        tasks,
        testbed,
        threat,
        training,
        victim,
        zoo,
    )
    from gambeson.auditing.audit import audit
    from gambeson.auditing.comparison import compare
    from gambeson.base import UserError
    from gambeson.hardening.job import harden
    from gambeson.training import train

    __version__: str

__all__ = [
    "UserError",
    "analysis",
    "attacks",
    "audit",
    "auditing",
    "base",
    "compare",
    "data",
    "defenses",
    "evaluation",
    "harden",
    "hardening",
    "models",
    "report",
    "studies",
    "tasks",
    "testbed",
    "threat",
    "train",
    "training",
    "victim",
    "zoo",
]

_DEFINED_IN = {
    "UserError": "base",
    "audit": "auditing",
    "compare": "auditing",
    "harden": "hardening",
    "train": "training",
}

if not TYPE_CHECKING:  # a type checker that saw __getattr__ would let every misspelt name pass

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return globals().setdefault(name, _version())
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(f"{__name__}.{_DEFINED_IN.get(name, name)}")
        value = getattr(module, name) if name in _DEFINED_IN else module
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})

    def _version() -> str:
        """Return the version that is installed; ``unknown`` for a source tree that is not."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("gambeson")
        except PackageNotFoundError:
            return "unknown"
