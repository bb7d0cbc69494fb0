"""How much of everything an audit asks for: images, gradients per image, and what each of the checks costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gambeson.attacks import PGD, TargetedAutoPGD
from gambeson.auditing.context import MARGIN_STEPS, WIDER
from gambeson.auditing.rescoring import MOST, batch_sizes
from gambeson.auditing.steadiness import DRAWN
from gambeson.auditing.suite import Suite
from gambeson.data import Dataset
from gambeson.evaluation.outcome import at_once
from gambeson.victim import auto_batch_size

Work = dict[str, tuple[int, int]]
"""Images forward and image gradients, by what for: checks share what they look at."""


@dataclass(frozen=True)
class Amounts:
    """Numbers of images and of gradients that the costs of an audit are made of."""

    suite: Suite
    """Its settings, with its grid of eps."""
    data: Dataset
    random: bool = False
    """Whether the model is random, so that all is asked several times."""

    @cached_property
    def test(self) -> int:
        """Test images."""
        return min(len(self.data.test), self.suite.test_images or len(self.data.test))

    @cached_property
    def held(self) -> int:
        """Validation images."""
        return min(len(self.data.validation), self.suite.validation_images or len(self.data.validation))

    @property
    def sample(self) -> int:
        """Images that diagnostics look at."""
        return min(self.suite.sample, self.test)

    @property
    def votes(self) -> int:
        """Forwards of an image that is scored."""
        return self.suite.votes if self.random else 1

    @property
    def draws(self) -> int:
        """Draws of a random model per gradient."""
        return self.suite.eot_samples if self.random else 1

    @property
    def of_maps(self) -> bool:
        """Whether labels are maps."""
        return not self.data.test.task.per_image_label

    @cached_property
    def pgd(self) -> int:
        """Gradients per image of the suite's PGD."""
        return gradients_of(self.suite.pgd(self.suite.eps[0], of_maps=self.of_maps))

    @property
    def cospgd(self) -> int:
        """Those of CosPGD; 0 where there is none."""
        return gradients_of(self.suite.cospgd(self.suite.eps[0])) if self.of_maps and self.suite.norm != "1" else 0

    @property
    def short(self) -> int:
        """Those of the short one that checks compare with."""
        return min(20, self.suite.pgd_steps)

    @cached_property
    def targeted(self) -> int:
        """Those of targeted Auto-PGD behind a short PGD; of a random model with the noise off, and through its draws.

        0 where it is left out.
        """
        if not self.suite.auto_pgd or self.of_maps or self.suite.norm == "1":
            return 0
        if not self.random:
            return sum(map(gradients_of, self.suite.white_box(self.suite.eps[0]).values()))
        off, through = (self.suite.targeted_auto_pgd(self.suite.eps[0], random=random) for random in (False, True))
        return gradients_of(off) + (through.eot_samples or 1) * gradients_of(through)

    @property
    def targeted_forwards(self) -> int:
        """Images forward beside: of a random model votes that choose among what its attacks made, and that score it."""
        return (11 * self.votes if self.random else 3) * self.test * bool(self.targeted)

    @property
    def white(self) -> int:
        """Those of the strongest attack with gradients that checks look at."""
        return self.pgd if self.random else self.targeted or self.pgd

    @property
    def queries(self) -> int:
        """Queries of Square, or of RayS, per image of the sample."""
        return min(300, self.suite.queries)

    @cached_property
    def again(self) -> int:
        """Images forward where perturbed ones are asked for again in every way (:func:`rescoring.ways`)."""
        if self.random:
            return 2 * self.test
        few = min(MOST, self.test)
        return 7 * few + max(few, auto_batch_size(self.data.test.shape, 1024, 2**23))

    @cached_property
    def batches(self) -> int:
        """Images in batches of several sizes together."""
        most = at_once(self.data.test)
        sizes = (7, 32, self.suite.universal_batch, 100, self.sample, most, *[most] * DRAWN)
        return sum(max(_PROBES, min(most, size)) for size in sizes)

    def work(
        self, name: str, forwards: int = 0, gradients: int = 0, beside: int = 0, apart: int = 0, shares: str = ""
    ) -> Work:
        """Cost of a check.

        Args:
            name: of the check.
            forwards: per image of the sample.
            gradients: likewise.
            beside: images forward whatever the sample.
            apart: image gradients whatever the sample.
            shares: the attack on the sample that other checks look at too.
        """
        attacks = {"PGD": self.pgd, "white box": self.white, "short PGD": self.short}
        shared = {shares: (self.sample, self.draws * self.sample * attacks[shares])} if shares else {}
        return shared | {name: (forwards * self.sample + beside, self.draws * (gradients * self.sample + apart))}

    def checks(self, ran: Collection[str] = ()) -> tuple[int, int]:
        """Return the images forward and the image gradients of the suite's checks, beside those that have run."""

        def needed(name: str) -> Work:
            return self.work(name, **(CHECKS[name](self) if name in CHECKS else _UNLISTED))

        left: Work = {}
        for name in tuple(CHECKS) if self.suite.checks == "all" else self.suite.checks:
            left |= needed(name) if name not in ran else {}
        for work in [work for name in ran for work in needed(name)]:
            left.pop(work, None)
        return sum(ahead for ahead, _ in left.values()), sum(back for _, back in left.values())


def gradients_of(attack: PGD | TargetedAutoPGD) -> int:
    """Gradients per image that is never broken."""
    if not isinstance(attack, TargetedAutoPGD):
        return attack.steps * attack.restarts
    targets, probes = attack.targets or 1, attack.probe_steps or 0
    return targets * probes + (min(attack.targets_kept, targets) if probes else targets) * attack.steps


_LENGTHS, _TIMES = (
    ("steps", "iterations", "queries", "passes", "patterns"),
    ("restarts", "rounds", "searches", "targets"),
)
_PER_STEP = ("batch_size", "images")
"""Settings whose product is the work of an attack: how long it is, how often it runs, and of a universal one, on how
many images."""
_UNKNOWN = 100


def own_work(attack: Any, n: Amounts) -> tuple[int, int]:
    """Return the images forward and the image gradients of an attack of the user's own, as its settings tell.

    The work is the product of those settings of :data:`_LENGTHS`, :data:`_TIMES` and :data:`_PER_STEP` that it has,
    which bounds every attack of this library but those that stop by themselves (DeepFool). An attack that does not say
    how long it is counts as :data:`_UNKNOWN` steps (ours).
    """

    def product(*names: str) -> int:
        return math.prod(value for name in names if isinstance(value := getattr(attack, name, None), int))

    universal = hasattr(attack, "craft")
    work = product(*_LENGTHS, *_TIMES, *(_PER_STEP if universal else ()))
    work *= 1 if any(isinstance(getattr(attack, name, None), int) for name in _LENGTHS) else _UNKNOWN
    forwards = n.votes * (n.test + n.held * product("restarts")) if universal else n.votes * n.test + n.again
    if universal and hasattr(attack, "probe_starts"):
        work += product("probe_starts", "probe_start_steps", "probe_start_batch")
        forwards += n.votes * product("probe_starts") * n.held
    work *= 1 if universal else n.test
    gradients = getattr(attack, "gradients", not hasattr(attack, "queries"))
    return (forwards, n.draws * work) if gradients else (forwards + n.votes * work, 0)


_PROBES, _BATCHES = 16, 13
"""Images whose gradients are compared, and how often beside batches of other sizes."""
CHECKS: dict[str, Callable[[Amounts], dict[str, Any]]] = {
    "better than majority class": lambda n: {},
    "perturbation budget used": lambda n: {},
    "sample like the other images": lambda n: {},
    "crafted beats controls": lambda n: {},  # unless a control has won, whose images are then compared
    "deterministic or majority vote": lambda n: {},
    "input unchanged": lambda n: {},
    "UER monotone in eps": lambda n: {},
    "no noise-off gap": lambda n: {"gradients": 20 * n.random, "forwards": 5 * n.random},
    "no EOT gap": lambda n: {"gradients": 32 * n.random},
    "no vanishing gradients": lambda n: {"gradients": 2, "forwards": 5 * n.of_maps},
    "gradient matches finite differences": lambda n: {"forwards": 3, "gradients": 1},
    "margin vanishes where the answer changes": lambda n: {"forwards": 0 if n.of_maps else 24},
    "gradient complete": lambda n: {"forwards": 75, "gradients": 6},
    "no optimisation at test time": lambda n: {},  # after the one before
    "independent of the batch": lambda n: {"beside": 330 + n.suite.rescoring * sum(batch_sizes(n.data.test.shape))},
    "stateless": lambda n: {"beside": 2 * n.sample + 500},
    "re-scoring reproducible": lambda n: {"beside": n.test},
    "monotone in step size": lambda n: {"gradients": 2},
    "gradient independent of the batch": lambda n: {"apart": _BATCHES * _PROBES + n.batches},
    "unbounded attack succeeds": lambda n: {"gradients": 40} | ({"shares": "PGD"} if n.of_maps else {}),
    "other gradients no stronger": lambda n: (
        {} if n.of_maps else {"gradients": 200, "forwards": 200, "shares": "white box"}
    ),
    "white box beats queries": lambda n: {"forwards": 2 * n.queries + 40 if n.queries else 0, "shares": "white box"},
    "white box beats transfer": lambda n: {"forwards": 2, "shares": "white box"},
    "no weaker inside the ball": lambda n: {"gradients": 6 * n.short, "shares": "white box"},
    "alike in every batch": lambda n: {"beside": n.again // 2},
    "gradient beats random search": lambda n: {"forwards": 2 * n.pgd, "shares": "PGD"},
    "multi-step beats single-step": lambda n: {"gradients": 1, "shares": "PGD"},
    "attack beats noise": lambda n: {"forwards": 1, "shares": "PGD"},
    "universal white box beats transfer": lambda n: {"beside": 2 * n.test},
    "crafted on train beats crafted on test": lambda n: {
        "beside": 2 * n.test,
        "apart": n.suite.universal_steps * n.suite.universal_batch,
    },
    "universal white box beats queries": lambda n: {"beside": 2 * n.test * bool(n.suite.universal_queries)},
    "attacks find what is there": lambda n: {"beside": 24 * (300 + 2 * n.queries), "apart": 48 * (n.pgd + n.white)},
    "margin loss no stronger": lambda n: {"gradients": n.short + 3, "shares": "short PGD"},
    "attack has converged": lambda n: {"gradients": n.pgd + 3 * n.white, "shares": "white box"},
    "single step approximates multi-step": lambda n: {"forwards": 4, "gradients": 12},
    "no test-set leakage": lambda n: (
        {"gradients": n.pgd, "beside": n.test + n.held, "shares": "PGD"}
        if n.of_maps
        else {"apart": 2 * WIDER * MARGIN_STEPS * n.sample, "beside": 3 * n.test + 3 * n.held}
    ),
    "rotated and blended images stand too": lambda n: (
        {} if n.of_maps else {"forwards": 8, "gradients": 2 * n.pgd, "shares": "PGD"}
    ),
    "random start no stronger": lambda n: {"gradients": 2},
    "monotone in eps": lambda n: {"gradients": 2 * n.short, "shares": "short PGD"},
    "attack repeats its outcome": lambda n: {"apart": min(64, n.sample) * n.pgd // n.suite.pgd_restarts},
}
"""The built-in checks with their costs, see :meth:`Amounts.work`, in the order in which an audit with a limit on its
time runs them: what costs nothing first, then by what they found on the testbed for their price. One that is not
listed comes last and is taken for two attacks (ours)."""
_UNLISTED = {"forwards": 50, "gradients": 40}
