"""The pictures of ``docs/checks.md``: for every diagnostic a model that fails it beside one that passes.

``python benchmarks/audit_pictures.py [--only NAME ...] [--draw]``

Models are those of :mod:`gambeson.testbed` (trained when first asked for), of ``benchmarks/adversary.py``, and four
small ones made here. Each diagnostic is run alone on both models, as an audit holds them, and must fail the one and
pass the other; what it compares is measured along, stored in ``results/audit-pictures.json`` and drawn to
``docs/audit/*.png``. ``--draw`` draws what is stored; ``python benchmarks/audit_page.py`` then renews the page.
Everything is seeded. Minutes on one core once the networks are trained. Matplotlib is needed: the extra ``quickstart``
brings it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the models stand with the tests, which are not installed

from adversary import deceivers  # noqa: E402
from audit_measures import MEASURES, Needs  # noqa: E402
from audit_page import file_of  # noqa: E402
from audit_panels import draw  # noqa: E402

from gambeson.attacks import UniversalPerturbation  # noqa: E402
from gambeson.auditing import (  # noqa: E402
    DIAGNOSTICS,
    SUITES,
    AuditContext,
    steadiness,
)
from gambeson.auditing.context import Checkpoints  # noqa: E402
from gambeson.auditing.stages import adaptive, per_image  # noqa: E402
from gambeson.auditing.stages import surrogate as surrogates  # noqa: E402
from gambeson.auditing.stages import universal as universals  # noqa: E402
from gambeson.base import read_json, seeded, write_json  # noqa: E402
from gambeson.testbed import models, networks  # noqa: E402
from gambeson.testbed.entry import Networks, spread  # noqa: E402
from gambeson.victim import Victim  # noqa: E402
from gambeson.victim.temperature import temperature  # noqa: E402
from tests.auditing.evidence import evidence_of  # noqa: E402

STORE, PICTURES, RUNS = ROOT / "results" / "audit-pictures.json", ROOT / "docs" / "audit", ROOT / "runs/audit-pictures"
LIGHT = {"universal_steps": 100, "universal_probe_starts": 2}


class RandomRipple(nn.Module):
    """A ripple of a hundredth of the range and of random frequency on every pixel: its slope is noise of mean zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.net(x + 0.01 * torch.sin(1e3 * torch.randn_like(x) * x))


class Guarded(nn.Module):
    """Images whose first or last column is not dark get the label of the nearest training image, without a slope."""

    images: torch.Tensor
    labels: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        z = self.net(x)
        guarded = x[..., [0, -1]].amax((1, 2, 3)) > 0.2
        nearest = self.labels[torch.cdist(x.detach().flatten(1), self.images).argmin(1)]
        return torch.where(guarded[:, None], 10 * F.one_hot(nearest, z.shape[1]) + 0 * z, z)


class Tired(nn.Module):
    """Class 0 for an image near which it was asked more than fifty times (Chen, Carlini and Wagner 2019)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        z, flat = self.net(x), x.detach().flatten(1)
        self.seen = torch.cat([self.seen.view(-1, flat.shape[1]), flat])[-3000:]
        times = (torch.cdist(flat, self.seen, p=torch.inf) < 0.01).sum(1)
        first = 10 * F.one_hot(torch.zeros_like(times), z.shape[1])
        return torch.where((times > 50)[:, None], first + 0 * z, z)


class Spared(nn.Module):
    """Images near to a few get a bonus for their label."""

    known: torch.Tensor
    labels: torch.Tensor

    def __init__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("known", images.flatten(1))
        self.register_buffer("labels", F.one_hot(labels, 10).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        apart = torch.cdist(x.flatten(1), self.known).square()
        weight = torch.sigmoid((1.7 - apart) / 0.1) * torch.softmax(-apart / 0.1, 1)
        return self.net(x) + 30 * (weight @ self.labels)


def _tired(nets: Networks) -> nn.Module:
    return Tired(nets())


def _random_ripple(nets: Networks) -> nn.Module:
    return RandomRipple(nets())


def _guarded(nets: Networks) -> nn.Module:
    return Guarded(nets(), *spread(nets.data.train, 2000)).eval()


def _spared(nets: Networks) -> nn.Module:
    test = nets.data.test
    hidden = torch.ones(len(test), dtype=torch.bool)
    hidden[test.sample_indices(SUITES["quick"].sample, seed=0)] = False
    return Spared(nets(), *test.take(hidden.nonzero().flatten())).eval()


OWN = {"tired of repetitions": _tired, "random ripple": _random_ripple, "guarded": _guarded, "spared": _spared}

Case = tuple[str, str, dict[str, Any]]
"""Data, name of the model (of the testbed, a network of it, or of :data:`OWN`), settings beside the quick suite's."""


def _case(name: str, data: str = "digits", **settings: Any) -> Case:
    return data, name, settings


_STANDARD = _case("standard")
_WIDE: dict[str, Any] = {"eps": (0.1, 0.4, 0.5), "sample": 449}
_STEPS = (_case("single-step training", **_WIDE), _case("pgd-adversarial", **_WIDE))
_RADII = (_case("guarded"), _STANDARD)
CASES: dict[str, tuple[Case, Case]] = {
    "deterministic or majority vote": (_case("dropout left on", votes=1), _STANDARD),
    "no EOT gap": (_case("random ripple"), _case("input noise")),
    "no noise-off gap": (_case("random ripple"), _case("input noise")),
    "independent of the batch": (_case("BatchNorm stuck in training"), _case("batch-norm")),
    "stateless": (_case("tired of repetitions"), _STANDARD),
    "no vanishing gradients": (_case("four grey levels"), _STANDARD),
    "margin loss no stronger": (_case("fixed margin"), _STANDARD),
    "gradient matches finite differences": (_case("reversed gradient"), _STANDARD),
    "multi-step beats single-step": (_case("detector: no gradient"), _STANDARD),
    "random start no stronger": _STEPS,
    "monotone in step size": _STEPS,
    "single step approximates multi-step": _STEPS,
    "unbounded attack succeeds": (_case("hard label"), _STANDARD),
    "monotone in eps": _RADII,
    "attack has converged": (_case("shattered features"), _STANDARD),
    "gradient beats random search": (_case("rippled pixels"), _STANDARD),
    "white box beats transfer": (_case("hard label"), _STANDARD),
    "universal white box beats transfer": (_case("hard label"), _STANDARD),
    "white box beats queries": (_case("fixed margin"), _STANDARD),
    "attack beats noise": (_case("reversed gradient", **_WIDE), _case("standard", **_WIDE)),
    "better than majority class": (_case("constant answer"), _STANDARD),
    "crafted beats controls": (_case("hard label"), _STANDARD),
    "perturbation budget used": (_case("constant answer"), _STANDARD),
    "UER monotone in eps": _RADII,
    "re-scoring reproducible": (_case("random member"), _STANDARD),
    "no test-set leakage": (_case("test images remembered within a radius"), _STANDARD),
    "alike in every batch": (_case("batch's mean logits exchanged"), _STANDARD),
    "no weaker inside the ball": (_case("undefended in a shell inside the ball"), _case("pgd-adversarial")),
    "gradient independent of the batch": (_case("false in large batches"), _STANDARD),
    "attack repeats its outcome": (_case("false in large batches"), _STANDARD),
    "gradient complete": (_case("three quarters stopped"), _STANDARD),
    "no optimisation at test time": (_case("anti-adversary layer"), _STANDARD),
    "margin vanishes where the answer changes": (_case("margins of a sibling"), _STANDARD),
    "attacks find what is there": (_case("four grey levels"), _STANDARD),
    "universal white box beats queries": (_case("detector: equal logits"), _STANDARD),
    "other gradients no stronger": (_case("waves on the gaps, within the ball"), _STANDARD),
    "crafted on train beats crafted on test": (_case("a lure around training images"), _STANDARD),
    "sample like the other images": (_case("spared"), _STANDARD),
    "rotated and blended images stand too": (_case("test images remembered within a radius"), _STANDARD),
}


def built(data: str, name: str) -> nn.Module:
    """Build the model of a case."""
    nets, entries = networks(data), {entry.name: entry for entry in models(data)}
    if name in OWN:
        return OWN[name](nets).eval()
    if name in (others := deceivers()):
        return others[name]().model.eval()
    return entries[name].build(nets) if name in entries else nets(name)


_CRAFTED: dict[str, Any] = {}
"""Universal perturbations of a case: several diagnostics look at them."""


@contextmanager
def held(case: Case, needs: Needs) -> Iterator[AuditContext]:
    """Hold a case's model as an audit does when it comes to the diagnostics, after the stages that it needs."""
    data, name, settings = case
    dataset, model = networks(data).data, built(data, name)
    suite = SUITES["quick"].model_copy(update=LIGHT | settings).on(dataset)
    with Victim(model, fast=True) as victim:
        with seeded(0, "picture"):  # a random model's first pass
            evidence = evidence_of(victim, dataset, suite)
            victim.temperature = temperature(victim, dataset.validation, 0)
        if "surrogate" in needs:
            folder = RUNS / f"surrogate-{data}"
            folder.mkdir(parents=True, exist_ok=True)
            evidence.surrogate, _ = surrogates.obtain(suite, dataset, model, folder, Checkpoints(folder), 0)
        if "universal" in needs:
            crafted = _CRAFTED.get(repr(case))
            if crafted is None:
                for eps in suite.eps:
                    with seeded(0, "stage", universals.file_of(eps)):
                        evidence.universal.append(universals.craft_point(evidence, eps, None))
                _CRAFTED[repr(case)] = (evidence.uaps, evidence.universal, evidence.counts)
            else:
                evidence.uaps, evidence.universal, evidence.counts = crafted
        if "re-scoring" in needs:
            evidence.universal = universals.rescore(evidence)
        if "universal-nes" in needs:
            found = universals.craft_by_queries(evidence, RUNS)
            assert found is not None
            evidence.queried = UniversalPerturbation.load(RUNS / found.file)
        if "gradients" in needs:
            evidence.steadiness = steadiness.measure(evidence)
        if "per-image" in needs:
            evidence.per_image = per_image.measure(evidence)
        if "adaptive" in needs:
            adaptive.record(evidence, adaptive.measure(evidence))
        yield evidence


def measured(name: str, case: Case) -> tuple[bool | None, str, dict[str, Any]]:
    """Return the verdict and the words of a diagnostic on a case, and the panel to draw."""
    diagnostic = next(one for one in DIAGNOSTICS if one.name == name)
    needs, measure = MEASURES[name]
    random.seed(0)  # one of the models draws from Python's own generator
    with held(case, needs) as evidence:
        found = diagnostic.function(evidence)
        with seeded(0, "picture", name):
            return found.passed, found.detail, measure(evidence, found)


def main() -> None:
    """Measure and draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of diagnostics, or parts of them")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is stored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = read_json(STORE) if STORE.is_file() else {}
    for name, cases in CASES.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        if not arguments.draw:
            entry: dict[str, Any] = {}
            for word, expected, case in zip(("fails", "passes"), (False, True), cases, strict=True):
                passed, detail, panel = measured(name, case)
                print(f"{name}: {case[1]} on {case[0]}: {passed}; {detail}", flush=True)
                if passed is not expected:
                    raise SystemExit(f"{name}: {case[1]} was to be {expected}, came out {passed}")
                about = {"model": case[1], "data": case[0], "settings": case[2], "passed": passed, "detail": detail}
                entry[word] = about | {"panel": panel}
            store = (read_json(STORE) if STORE.is_file() else {}) | {name: entry}  # others may have added
            write_json(STORE, {one: store[one] for one in CASES if one in store})
        draw({word: store[name][word]["panel"] for word in ("fails", "passes")}, PICTURES / file_of(name))


if __name__ == "__main__":
    main()
