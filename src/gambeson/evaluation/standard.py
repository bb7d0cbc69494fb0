"""The standard row of attacks on single images: from cheap to strong, each on what still stands."""

from __future__ import annotations

from gambeson.attacks import PGD, AutoPGD, Square, TargetedAutoPGD
from gambeson.evaluation.outcome import ImageAttack
from gambeson.threat import Norm


def standard_attacks(
    *, eps: float | str, norm: Norm = "inf", queries: int = 5000, faithful: bool = False, draws: int | None = None
) -> dict[str, ImageAttack]:
    """Return the attacks of the standard suite, to be run by :func:`gambeson.evaluation.run_cascade`.

    The members of AutoAttack's standard version (Croce and Hein 2020, section 6) without FAB, behind a short PGD that
    takes what is easy: Auto-PGD on cross-entropy, targeted Auto-PGD on the ratio of logits over the nine likeliest
    wrong classes, Square, which has no gradient to be misled by. Three choices are ours, and ``faithful`` undoes the
    latter two. FAB is left out: it aims at the same boundaries as targeted Auto-PGD at several times the cost. The
    nine targets are scouted for 20 steps and the nearest three climbed in full. Square leaves an image alone once its
    margin is too far from a wrong answer for what it still gains (``outlook=3``). On 500 MNIST
    images and the public robust LeNet5 the row broke every image that a public AutoAttack with FAB broke
    (``results/autoattack.json``).

    Args:
        eps: radius in pixel units.
        norm: ``inf`` or ``2``.
        queries: budget of Square, an image.
        faithful: climb towards all nine targets in full, and let Square spend its whole budget on every image.
        draws: of a random model, over which each gradient is averaged.
    """
    ball = {"eps": eps, "norm": norm, "draws": draws}
    return {
        "pgd": PGD(steps=10, **ball),
        "auto-pgd": AutoPGD(steps=100, **ball),
        "auto-pgd-targeted": TargetedAutoPGD(steps=100, scout=None if faithful else 20, **ball),
        "square": Square(eps=eps, norm=norm, queries=queries, outlook=None if faithful else 3),
    }
