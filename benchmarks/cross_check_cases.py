"""What ``cross_check.py`` compares: each of our attacks at equal settings with those of the peers that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gambeson.attacks import FGSM, IFGSM, PGD, AutoPGD, CarliniWagner, DeepFool, Square, TargetedAutoPGD
from gambeson.attacks.gradient.transfer import Diversity, Scales, Smoothing
from gambeson.threat import Norm


class Peer(NamedTuple):
    """One peer's attack."""

    library: str
    kind: str
    """The attack's name there."""
    settings: dict[str, Any]
    note: str = ""
    """In what it is another attack than ours; empty where the settings are equal."""


class Case(NamedTuple):
    """One attack of ours, as a function of eps, and the same attack of each peer."""

    name: str
    ours: Callable[[float], Any]
    peers: dict[str, Callable[[float], Peer]]
    images: int = 500
    norm: Norm = "inf"
    targeted: bool = False
    minimal: bool = False
    """A minimal-norm attack without a bound: lengths are compared too."""
    stretch: float = 1.0
    """Radius over that of the network."""


def torch_(kind: str, **settings: Any) -> Callable[[float], Peer]:
    """Torchattacks, with eps, and alpha as a share of it where given."""
    return lambda eps: Peer("torchattacks", kind, {"eps": eps, **_scaled(settings, eps)})


def foolbox_(kind: str, note: str = "", **settings: Any) -> Callable[[float], Peer]:
    """Foolbox, with eps."""
    return lambda eps: Peer("foolbox", kind, {"eps": eps, **settings}, note)


def art_(kind: str, note: str = "", **settings: Any) -> Callable[[float], Peer]:
    """ART, with eps, and eps_step as a share of it where given."""
    return lambda eps: Peer("art", kind, {"eps": eps, **_scaled(settings, eps)}, note)


def fixed(library: str, kind: str, note: str = "", **settings: Any) -> Callable[[float], Peer]:
    """An attack that takes no eps."""
    return lambda _: Peer(library, kind, settings, note)


def _scaled(settings: dict[str, Any], eps: float) -> dict[str, Any]:
    return {key: value * eps if key in ("alpha", "eps_step") else value for key, value in settings.items()}


def pgd(**settings: Any) -> Callable[[float], PGD]:
    """PGD as the peers write it: every step taken, the last point returned, ball and box one after the other."""
    return lambda eps: PGD(**({"eps": eps, "early_stop": False, "exact_box": False} | settings))


def bim(**settings: Any) -> Callable[[float], IFGSM]:
    """Ten steps from the image itself, each a tenth of eps."""
    return lambda eps: IFGSM(eps=eps, steps=10, rel_step_size=0.1, **settings)


def apgd(**settings: Any) -> Callable[[float], AutoPGD]:
    """Auto-PGD of 40 steps."""
    return lambda eps: AutoPGD(**({"eps": eps, "steps": 40} | settings))


def cw(**settings: Any) -> Callable[[float], CarliniWagner]:
    """Carlini and Wagner's attack: six values of c, 300 long steps each, which move black and white pixels too."""
    return lambda _: CarliniWagner(**({"searches": 6, "steps": 300, "lr": 0.05, "c": 1.0} | settings))


def foolbox_cw(**settings: Any) -> Callable[[float], Peer]:
    """Foolbox's at the settings of :func:`cw`."""
    same: dict[str, Any] = {"binary_search_steps": 6, "steps": 300, "stepsize": 0.05, "initial_const": 1.0, "eps": None}
    return fixed("foolbox", "L2CarliniWagnerAttack", **same, **settings)


ART_PGD = "ProjectedGradientDescentPyTorch"
ART_DLR: dict[str, Any] = {"loss_type": "difference_logits_ratio"}
ART_CE: dict[str, Any] = {"loss_type": "cross_entropy"}
ART_APGD: dict[str, Any] = {"eps_step": 2.0, "max_iter": 40, "nb_random_init": 1}
L2_PGD: dict[str, Callable[[float], Peer]] = {
    "foolbox": foolbox_("L2PGD", rel_stepsize=0.2, steps=20),
    "torchattacks": torch_("PGDL2", alpha=0.2, steps=20),
    "art": art_(ART_PGD, norm=2, eps_step=0.2, max_iter=20, num_random_init=1),
}

CASES = (
    Case(
        "fgsm",
        lambda eps: FGSM(eps=eps),
        {
            "foolbox": foolbox_("LinfFastGradientAttack"),
            "torchattacks": torch_("FGSM"),
            "art": art_("FastGradientMethod", num_random_init=0),
        },
    ),
    Case(
        "i-fgsm",
        bim(),
        {
            "foolbox": foolbox_("LinfBasicIterativeAttack", rel_stepsize=0.1, steps=10),
            "torchattacks": torch_("BIM", alpha=0.1, steps=10),
            "art": art_("BasicIterativeMethod", eps_step=0.1, max_iter=10),
        },
    ),
    Case(
        "pgd-inf",
        pgd(steps=20, rel_step_size=0.1),
        {
            "foolbox": foolbox_("LinfPGD", rel_stepsize=0.1, steps=20),
            "torchattacks": torch_("PGD", alpha=0.1, steps=20),
            "art": art_(ART_PGD, eps_step=0.1, max_iter=20, num_random_init=1),
        },
    ),
    Case("pgd-2", pgd(steps=20, rel_step_size=0.2, norm="2"), L2_PGD, norm="2"),
    Case("pgd-2 exact box", pgd(steps=20, rel_step_size=0.2, norm="2", exact_box=True), L2_PGD, norm="2"),
    Case(
        "pgd-inf targeted",
        pgd(steps=20, rel_step_size=0.1, targeted=True),
        {
            "foolbox": foolbox_("LinfPGD", rel_stepsize=0.1, steps=20, targeted=True),
            "torchattacks": torch_("PGD", alpha=0.1, steps=20, targeted=True),
            "art": art_(ART_PGD, eps_step=0.1, max_iter=20, num_random_init=1, targeted=True),
        },
        targeted=True,
        stretch=1.3,
    ),
    Case(
        "i-fgsm targeted",
        bim(targeted=True),
        {
            "foolbox": foolbox_("LinfBasicIterativeAttack", rel_stepsize=0.1, steps=10, targeted=True),
            "torchattacks": torch_("BIM", alpha=0.1, steps=10, targeted=True),
            "art": art_("BasicIterativeMethod", eps_step=0.1, max_iter=10, targeted=True),
        },
        targeted=True,
        stretch=1.3,
    ),
    Case(
        "mi-fgsm",
        bim(momentum=1.0),
        {
            "foolbox": foolbox_(
                "LinfMomentumIterativeFastGradientMethod",
                "adds up signs of gradients, not gradients",
                momentum=1.0,
                rel_stepsize=0.1,
                steps=10,
            ),
            "torchattacks": torch_("MIFGSM", alpha=0.1, steps=10, decay=1.0),
            "art": art_("MomentumIterativeMethod", eps_step=0.1, max_iter=10, decay=1.0),
        },
    ),
    Case(
        "ni-fgsm",
        bim(momentum=1.0, nesterov=True),
        {"torchattacks": torch_("NIFGSM", alpha=0.1, steps=10, decay=1.0)},
    ),
    Case(
        "si-ni-fgsm",
        bim(momentum=1.0, nesterov=True, scales=Scales(copies=3)),
        {"torchattacks": torch_("SINIFGSM", alpha=0.1, steps=10, decay=1.0, m=3)},
    ),
    Case(
        "ti-fgsm",
        bim(smoothing=Smoothing(size=5, sigma=1.0)),
        {"torchattacks": torch_("TIFGSM", alpha=0.1, steps=10, len_kernel=5, nsig=2, diversity_prob=0.0, colour=True)},
    ),
    Case(
        "di-fgsm",
        bim(diversity=Diversity(canvas=1.11, fill=0.0)),
        {
            "torchattacks": lambda eps: Peer(
                "torchattacks",
                "DIFGSM",
                {"eps": eps, "alpha": 0.1 * eps, "steps": 10, "diversity_prob": 0.5},
                "one draw a batch, and images shrunk inside their own size",
            )
        },
    ),
    Case(
        "apgd-ce",
        apgd(),
        {
            "torchattacks": torch_("APGD", steps=40, loss="ce"),
            "art": art_("AutoProjectedGradientDescent", **ART_APGD, **ART_CE),
        },
        images=300,
    ),
    Case(
        "apgd-dlr",
        apgd(loss="dlr"),
        {
            "torchattacks": torch_("APGD", steps=40, loss="dlr"),
            "art": art_("AutoProjectedGradientDescent", **ART_APGD, **ART_DLR),
        },
        images=300,
    ),
    Case(
        "apgd-ce-2",
        apgd(norm="2", exact_box=False),
        {"torchattacks": torch_("APGD", steps=40, loss="ce", norm="L2")},
        images=300,
        norm="2",
    ),
    Case(  # ART clips before it projects: like our default, it wastes none of the radius on values that are at the box
        "apgd-ce-2 in the box",
        apgd(norm="2"),
        {"art": art_("AutoProjectedGradientDescent", norm=2, **ART_APGD, **ART_CE)},
        images=300,
        norm="2",
    ),
    Case(
        "apgd-ce targeted",
        apgd(targeted=True),
        {"art": art_("AutoProjectedGradientDescent", targeted=True, **ART_APGD, **ART_CE)},
        images=300,
        targeted=True,
        stretch=1.3,
    ),
    Case(
        "apgd-t",
        lambda eps: TargetedAutoPGD(eps=eps, steps=20),
        {"torchattacks": torch_("APGDT", steps=20)},
        images=100,
    ),
    Case(
        "square",
        lambda eps: Square(eps=eps, queries=300),
        {"torchattacks": torch_("Square", n_queries=300), "art": art_("SquareAttack", max_iter=300)},
        images=200,
        stretch=1.5,
    ),
    Case(
        "square-2",
        lambda eps: Square(eps=eps, norm="2", queries=300),
        {"torchattacks": torch_("Square", norm="L2", n_queries=300), "art": art_("SquareAttack", norm=2, max_iter=300)},
        images=200,
        norm="2",
        stretch=1.5,
    ),
    Case(
        "deepfool-2",
        lambda _: DeepFool(),
        {
            "foolbox": fixed("foolbox", "L2DeepFoolAttack", steps=50, candidates=10, overshoot=0.02, eps=None),
            "torchattacks": fixed("torchattacks", "DeepFool", steps=50, overshoot=0.02),
            "art": fixed(
                "art", "DeepFool", "one overshoot after the last step", max_iter=50, epsilon=0.02, nb_grads=10
            ),
        },
        images=200,
        norm="2",
        minimal=True,
    ),
    Case(
        "deepfool-inf",
        lambda _: DeepFool(norm="inf"),
        {"foolbox": fixed("foolbox", "LinfDeepFoolAttack", steps=50, candidates=10, overshoot=0.02, eps=None)},
        images=200,
        minimal=True,
    ),
    Case(
        "carlini-wagner",
        cw(early_abort=False),
        {"foolbox": foolbox_cw(abort_early=False)},
        images=60,
        norm="2",
        minimal=True,
    ),
    Case(
        "carlini-wagner early abort",
        cw(),
        {"foolbox": foolbox_cw(abort_early=True)},
        images=30,
        norm="2",
        minimal=True,
    ),
    Case(
        "carlini-wagner c=100",
        cw(searches=1, c=100.0),
        {"torchattacks": fixed("torchattacks", "CW", c=100, steps=300, lr=0.05)},
        images=60,
        norm="2",
        minimal=True,
    ),
    Case(
        "carlini-wagner targeted",
        cw(early_abort=False, targeted=True),
        {"foolbox": foolbox_cw(abort_early=False, targeted=True)},
        images=20,
        norm="2",
        targeted=True,
        minimal=True,
    ),
    Case(
        "carlini-wagner art",
        cw(early_abort=False),
        {
            "art": fixed(
                "art",
                "CarliniL2Method",
                "gradient descent with a line search, about eight evaluations a step",
                binary_search_steps=6,
                max_iter=40,
                learning_rate=0.05,
                initial_const=1.0,
            )
        },
        images=20,
        norm="2",
        minimal=True,
    ),
    Case(
        "carlini-wagner default",
        lambda _: CarliniWagner(),
        {
            "foolbox": fixed(
                "foolbox",
                "L2CarliniWagnerAttack",
                binary_search_steps=9,
                steps=1000,
                stepsize=0.01,
                initial_const=1e-3,
                abort_early=True,
                eps=None,
            )
        },
        images=10,
        norm="2",
        minimal=True,
    ),
)
