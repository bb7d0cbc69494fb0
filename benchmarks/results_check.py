"""Do the stored results hold? ``make results-check``: exit code 1 where a number contradicts another, or itself.

First every file says how it was made, every rate is a count of its images and has the interval of that count, and what
is computed from rows is computed again. Then a sample is made anew: networks are trained and attacked as the results
say, and each number must lie in the 95 % interval of the stored one, or near it where torch is another. Minutes on two
cores; ``--quick`` leaves it out. What needs a GPU, hours or the weights of others is in the first part alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import autoattack
import cross_check
import scale
import stored
import torch
from cross_check_cases import CASES

import gambeson as gb
from gambeson import testbed
from gambeson.analysis import jacobian_norms
from gambeson.attacks import StochasticPGD
from gambeson.auditing import AuditResult
from gambeson.base import UserError, read_json, seeded
from gambeson.data import Dataset
from gambeson.evaluation import Rate, accuracy, universal_evasion
from gambeson.studies import Matrix, Study
from gambeson.studies.quickstart import DATA, TRAIN
from gambeson.threat import Ball
from gambeson.training import Recipe

RATE = {"value", "low", "high", "n"}
ANOTHER = 0.02
"""Margin where the network was trained by another version of torch, which makes another network (1.8 points seen)."""
MOST = 16
"""Candidates of a worst at most."""
STUDIES = stored.RESULTS.parent / "studies"


class Number(NamedTuple):
    """A stored number, and what it comes out as now."""

    name: str
    stored: float
    low: float
    high: float
    found: float

    @classmethod
    def of(cls, name: str, rate: dict[str, Any], found: float, margin: float = 0.0) -> Number:
        """Of a stored rate, whose interval is wider by a margin."""
        return cls(name, rate["value"], rate["low"] - margin, rate["high"] + margin, found)


def rates(content: Any, path: str = "") -> Iterator[str]:
    """What is wrong with the rates in a result: no share of whole images, or not the interval of that share."""
    if isinstance(content, dict) and content.keys() >= RATE and content["n"] and content["value"] is not None:
        hits, n = content["value"] * content["n"], content["n"]
        counted = content.get("effective") is None and not path.endswith(("/harm", "/lead"))  # no pixels, no difference
        if counted and content.get("low") is not None:
            if abs(hits - round(hits)) > 1e-6 * n:
                yield f"{path} is {content['value']}, which is no share of {n}"
            else:
                # Rows of studies do not say among how many candidates the worst was, which widens the interval.
                among = [content["candidates"]] if "candidates" in content else range(1, MOST + 1)
                found = [Rate.of(round(hits), n, candidates=k) for k in among]
                if min(max(abs(one.low - content["low"]), abs(one.high - content["high"])) for one in found) > 1e-6:
                    yield f"{path} is {content['value']} of {n} with another interval than Wilson's"
        elif not (content["low"] <= content["value"] <= content["high"]):
            yield f"{path} is {content['value']}, outside of its interval"
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, inner in children:
        yield from rates(inner, f"{path}/{key}")


def contradictions(folder: Path, names: str = "**/*.json") -> Iterator[str]:
    """What is wrong with stored results, taken by themselves.

    Args:
        folder: of the results.
        names: pattern of the files.
    """
    for file in sorted(folder.glob(names)):
        name, content = str(file.relative_to(folder)), read_json(file)
        wrong = list(rates(content))
        try:
            stored.abouts(file, content, folder)
            if file.name == "result.json":
                AuditResult.load(file.parent)
        except UserError as error:
            wrong.append(f": {error}")
        if "study" in content:
            wrong += strangers(content)
        if name.startswith("autoattack"):
            wrong += summaries(content)
        if name.startswith("cross-check"):
            wrong += comparisons(content)
        yield from (f"{name}{one}" for one in wrong)


def summaries(content: dict[str, Any]) -> Iterator[str]:
    """Summaries of a comparison with AutoAttack that are not those of its rows."""
    for peer, found in autoattack.summary(content["rows"]).items():
        if any(abs(content["summary"][peer][key] - value) > 1e-9 * abs(value) for key, value in found.items()):
            yield f": the summary of {peer} is not that of the rows"


def comparisons(content: dict[str, Any]) -> Iterator[str]:
    """Comparisons with other libraries that do not follow from both sides."""
    for key, row in content["rows"].items():
        pairs = {what: row[what] for what in ("accuracy", "within", "length") if what in row}
        for what, pair in pairs.items():
            if abs(pair["ours"] - pair["theirs"] - pair["difference"]) > 1e-6:
                yield f"/{key}: the difference of {what} is not that of both sides"
        if row["weaker"] != any(pairs[what]["difference"] > 0.01 + 1e-9 for what in pairs if what != "length"):
            yield f"/{key}: weaker does not follow from the accuracies"


def strangers(content: dict[str, Any]) -> Iterator[str]:
    """Rows and measurements of a summary that are not in its study file."""
    study = Study.load(STUDIES / f"{content['study']['name']}.yaml")
    known = {
        (row.data, row.model, row.defense, row.variant, row.at, row.seed): cells for row, cells in Matrix(study).table
    }
    for row in content["rows"]:
        key = tuple(row[name] for name in ("data", "model", "defense", "variant", "at", "seed"))
        for metric in row["values"]:
            if metric.partition(".")[0] not in known.get(key, {}):
                yield f": {metric} of {row['defense']}, {row['variant']}, seed {row['seed']} is no cell of the study"


def trained(name: str, count: int | None, recipe: Recipe) -> tuple[Any, Dataset]:
    """A LeNet-5 of seed 0, trained without a defence on the first images."""
    data = gb.data.load(name)
    few = data.train if count is None else data.train.subset(torch.arange(count))
    with seeded(0, "model"):
        model = gb.models.create("lenet5", data)
    small = Dataset(data.name, few, data.validation.subset(torch.arange(500)), data.test, data.classes)
    gb.train(model, small, gb.defenses.Standard(), recipe=recipe, seed=0)
    return model, Dataset(data.name, few, data.validation, data.test, data.classes)


def first(content: dict[str, Any], **where: Any) -> dict[str, Any]:
    """The values of the first row with these entries."""
    return next(row["values"] for row in content["rows"] if where.items() <= row.items())


def sharing(folder: Path) -> Iterator[Number]:
    """A plain network on digits: accuracy, Jacobian norm, UER."""
    known = first(read_json(folder / "sharing.json"), data="mnist5k", defense="standard", seed=0)
    model, data = trained("mnist5k", 3500, Recipe(epochs=8, lr=0.05))
    yield Number.of("clean accuracy", known["clean.accuracy"], accuracy(model, data).value, ANOTHER)
    norm = known["jacobians.jacobian"]["value"]
    found = jacobian_norms(model, data.test.subset(torch.arange(500))).frobenius.mean
    yield Number("mean Jacobian norm", norm, 0.95 * norm, 1.05 * norm, found)
    uap = StochasticPGD(eps=0.2).craft(model, data)
    yield Number.of("UER at 0.2", known["uap-twice.uer"], universal_evasion(model, data, uap).value, ANOTHER)


def defenses(folder: Path) -> Iterator[Number]:
    """Standard training on Fashion-MNIST: accuracy, and the UER of a perturbation crafted at the logits as they are."""
    known = first(read_json(folder / "defenses.json"), defense="standard", seed=0)
    model, data = trained("fashion-mnist", 10_000, Recipe(epochs=4, batch_size=64, lr=0.05))
    yield Number.of("clean accuracy", known["clean.accuracy"], accuracy(model, data).value, ANOTHER)
    uap = StochasticPGD(eps=0.2, steps=400, batch_size=64, restarts=2, temperature=1).craft(model, data)
    yield Number.of("UER at 0.2", known["uap.uer"], universal_evasion(model, data, uap).value, ANOTHER)


def scales(folder: Path) -> Iterator[Number]:
    """A plain network of the testbed at calibrated logits."""
    known = read_json(folder / "scale.json")["rows"]["digits, standard"]
    nets = testbed.networks("digits")
    (found,) = scale.measure(nets.data, nets("standard"), known["eps"], multiples=(1,))
    (at_one,) = (one for one in known["scales"] if one["multiple"] == 1)
    yield Number.of("accuracy under PGD", at_one["pgd accuracy"], found["pgd accuracy"]["value"])
    n = len(nets.data.validation)
    for seed, (before, now) in enumerate(zip(at_one["uer"], found["uer"], strict=True)):
        yield Number.of(f"UER, seed {seed}", Rate.of(round(before * n), n).plain(), now)


def auditors(folder: Path) -> Iterator[Number]:
    """PGD on three obfuscated models of the testbed."""
    known = {one["name"]: one for one in read_json(folder / "testbed-pgd.json")["outcomes"]}
    names = ["four grey levels", "hard label", "reversed gradient"]
    for one in testbed.score("pgd", "digits", names).outcomes:
        assert one.judgement.accuracy is not None
        yield Number.of(one.name, known[one.name]["judgement"]["accuracy"], one.judgement.accuracy.value)


def quickstart(folder: Path) -> Iterator[Number]:
    """The quickstart's undefended network."""
    known = read_json(folder / "quickstart" / "standard" / "result.json")
    model, data = trained(DATA, None, TRAIN)
    yield Number.of("clean accuracy", known["clean"], accuracy(model, data).value)
    (point,) = (one for one in known["universal"] if one["eps"] == 0.25)
    uap = StochasticPGD(eps=0.25, steps=200, batch_size=64, probe_starts=4).craft(model, data)
    yield Number.of("UER at 0.25", point["uer"], universal_evasion(model, data, uap).value)


def peers(folder: Path) -> Iterator[Number]:
    """Our side of two comparisons with other libraries."""
    known = read_json(folder / "cross-check.json")["rows"]
    net = next(net for net in cross_check.NETS if net.name == "fashion lenet5 standard")
    model, data = cross_check.load(net, Path(), None)
    for case in CASES:
        row = known.get(f"{net.name}, {case.name}, torchattacks")
        if case.name in ("fgsm", "pgd-inf") and row:
            x, y = data.test.take(slice(0, row["images"]))
            ball = Ball(eps=row["eps"], norm=row["norm"])
            found = cross_check.side(case.ours(row["eps"]), model, x, y, ball, case.targeted)
            rate = Rate.of(round(row["accuracy"]["ours"] * len(x)), len(x)).plain()
            yield Number.of(f"accuracy under {case.name}", rate, float(found.standing.float().mean()))


SAMPLE: dict[str, Callable[[Path], Iterator[Number]]] = {
    "scale.json": scales,
    "testbed-pgd.json": auditors,
    "sharing.json": sharing,
    "quickstart": quickstart,
    "defenses.json": defenses,
    "cross-check.json": peers,
}


def main(arguments: list[str] | None = None) -> int:
    """Check, say what was found, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=stored.RESULTS)
    parser.add_argument("--quick", action="store_true", help="compute nothing anew")
    parser.add_argument("--only", choices=SAMPLE, nargs="*", default=list(SAMPLE), help="compute only these anew")
    given = parser.parse_args(arguments)
    wrong = list(contradictions(given.results))
    print(f"{len(stored.files(given.results))} results: {len(wrong)} contradictions", *wrong, sep="\n  ", flush=True)
    for name in () if given.quick else given.only:
        began = time.perf_counter()
        for one in SAMPLE[name](given.results):
            holds = one.low <= one.found <= one.high
            told = f"{name}, {one.name}: stored {one.stored:.4f} [{one.low:.4f}, {one.high:.4f}], now {one.found:.4f}"
            print(f"{'ok   ' if holds else 'WRONG'} {told}", flush=True)
            wrong += [] if holds else [told]
        print(f"      {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
