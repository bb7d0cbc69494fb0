"""Transfer attacks by their customary names: each is PGD with some of its independent options.

Common setting of these papers: 10 steps of eps / 10 from the image itself, momentum 1, eps 16/255, no early stopping.
Sizes of resizing and smoothing here suit 32-pixel images; the papers' sizes for 299 pixels are in the fields'
docstrings. Give a list of models to attack an ensemble. Any PGD setting can be added: ``mi_fgsm(eps="8/255",
label="prediction")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gambeson.attacks.gradient.base import Diversity, Scales, Smoothing
from gambeson.attacks.gradient.pgd import IFGSM
from gambeson.attacks.registry import register
from gambeson.base import unknown_name

_MI: dict[str, Any] = {"momentum": 1.0}
_NI: dict[str, Any] = {"momentum": 1.0, "nesterov": True}
_DI: dict[str, Any] = {"diversity": Diversity()}
_TI: dict[str, Any] = {"smoothing": Smoothing()}
_SI: dict[str, Any] = {"scales": Scales()}

TRANSFER: dict[str, dict[str, Any]] = {
    "mi-fgsm": _MI,
    "ni-fgsm": _NI,
    "di-fgsm": _DI,
    "mi-di-fgsm": _MI | _DI,
    "ti-fgsm": _TI,
    "ti-mi-fgsm": _MI | _TI,
    "ti-dim": _MI | _DI | _TI,
    "si-ni-fgsm": _NI | _SI,
    "si-ni-ti-dim": _NI | _DI | _TI | _SI,
}
"""Each name and the settings it stands for: Dong et al. 2018 (MI), Xie et al. 2019 (DI, and with MI: M-DI2), Dong et
al. 2019 (TI, TI-DIM), Lin et al. 2020 (NI, SI). The original DI-FGSM takes int(min(eps + 4, 1.25 eps)) steps of
1/255 with eps in 255ths; here it has the common setting."""

_SOURCES = {"mi": "Dong et al. 2018", "di": "Xie et al. 2019", "ti": "Dong et al. 2019", "ni": "Lin et al. 2020"}
_WORDS = {
    "momentum": "momentum 1 (MI)",
    "nesterov": "a Nesterov look-ahead (NI)",
    "diversity": "random resizing with probability 0.5 (DI)",
    "smoothing": "a 5 x 5 Gaussian over the gradient (TI)",
    "scales": "the mean gradient of 5 scaled copies (SI)",
}
for _name, _preset in TRANSFER.items():
    register(
        _name,
        preset=_preset,
        source=_SOURCES.get("ni" if _name.startswith("si-") else _name.removeprefix("mi-")[:2], _SOURCES["mi"]),
        cost="steps x copies / steps x copies" if "scales" in _preset else "steps / steps",
        summary=f"I-FGSM with {', '.join(_WORDS[option] for option in _preset)}.",
    )(IFGSM)


def transfer_attack(name: str, **settings: Any) -> IFGSM:
    """Return the transfer attack of this name.

    Args:
        name: one of :data:`TRANSFER`.
        **settings: ``eps``, and any other setting of :class:`gambeson.attacks.PGD`; they override those of the name.

    Raises:
        UserError: no such name, or a setting that is out of range.
    """
    if name not in TRANSFER:
        raise unknown_name("transfer attack", name, TRANSFER)
    return IFGSM(**(TRANSFER[name] | settings))


def _named(name: str) -> Callable[..., IFGSM]:
    def build(**settings: Any) -> IFGSM:
        return transfer_attack(name, **settings)

    build.__name__ = build.__qualname__ = name.replace("-", "_")
    build.__doc__ = f"Return {name.upper()}; see :func:`transfer_attack`."
    return build


mi_fgsm = _named("mi-fgsm")
ni_fgsm = _named("ni-fgsm")
ti_dim = _named("ti-dim")
si_ni_fgsm = _named("si-ni-fgsm")
