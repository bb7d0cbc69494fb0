"""The standard row beside public AutoAttack implementations, on the public adversarially trained LeNet5.

``python benchmarks/autoattack.py --weights mnist_lenet5_advtrained.pt --images 500 [--side torchattacks]``

Both sides take the same images in chunks, alternately, each chunk in a fresh process of one thread. A time is the
processor time of the attack alone, so that it means the same under load; beside it stands that of one forward of the
bare model on the same chunk, taken before the attack, for comparing chunks that were not taken one after the other.
Every finished chunk is stored: a run that is cut goes on where it stopped; ``--again ours`` takes one side anew. The
weights are described in ``public_lenet.py``; pyautoattack and torchattacks come with the extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from public_lenet import lenet5
from stored import RESULTS, Rows
from torch import nn

import gambeson as gb
from gambeson.evaluation import run_suite, standard_suite
from gambeson.victim import Victim

EPS = 0.3


def ours(model: nn.Module, part: gb.data.Split) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the images as the standard row leaves them, and what each of its attacks did."""
    with Victim(model, fast=True) as victim:
        found = run_suite(victim, part, standard_suite(eps=EPS))
    rounds = [{"attack": each.attack, "broken": each.broken, **each.cost.plain()} for each in found.result.rounds]
    return found.images, {"rounds": rounds}


def pyautoattack(model: nn.Module, part: gb.data.Split) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return what pyautoattack's standard version makes of the images."""
    from pyautoattack import AutoAttack

    x, y = part.take(slice(None))
    attack = AutoAttack(model, norm="Linf", eps=EPS, version="standard", device="cpu", seed=0)
    return attack.run_standard_evaluation(x, y, batch_size=250)[0], {}


def torchattacks(model: nn.Module, part: gb.data.Split) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return what the AutoAttack in torchattacks makes of the images."""
    from torchattacks import AutoAttack

    x, y = part.take(slice(None))
    return AutoAttack(model, norm="Linf", eps=EPS, version="standard", n_classes=10, seed=0)(x, y).detach(), {}


SIDES = {"ours": ours, "pyautoattack": pyautoattack, "torchattacks": torchattacks}


def one_chunk(side: str, weights: Path, first: int, last: int) -> dict[str, Any]:
    """Attack the images ``first`` to ``last`` in this process."""
    torch.set_num_threads(1)
    model = lenet5(weights)
    part = gb.data.load("mnist").test.subset(torch.arange(first, last))
    x, y = part.take(slice(None))
    bare = []
    for _ in range(20):
        began = time.process_time()
        with torch.no_grad():
            model(x)
        bare.append(time.process_time() - began)
    began, wall = time.process_time(), time.perf_counter()
    moved, more = SIDES[side](model, part)
    seconds, wall = time.process_time() - began, time.perf_counter() - wall
    with torch.no_grad():
        right = model(moved).argmax(1) == y
    return {
        "seconds": seconds,
        "wall_seconds": wall,
        "bare_forward_seconds": statistics.median(bare),
        "largest": float((moved - x).abs().max()),
        "right": right.int().tolist(),
        **more,
    }


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for each public side, both robust accuracies and times over the chunks that both have finished."""
    found = {}
    for name in SIDES.keys() - {"ours"}:
        chunks = [key.split(", ")[1] for key in rows if key.startswith(f"{name}, ")]
        both = [(rows[f"ours, {chunk}"], rows[f"{name}, {chunk}"]) for chunk in chunks if f"ours, {chunk}" in rows]
        if not both:
            continue
        right = [[value for pair in both for value in pair[side]["right"]] for side in (0, 1)]
        ratios = [mine["seconds"] / peer["seconds"] for mine, peer in both]
        forwards = [[side["seconds"] / side["bare_forward_seconds"] for side in pair] for pair in both]
        found[name] = {
            "images": len(right[0]),
            "robust_ours": statistics.mean(right[0]),
            "robust_peer": statistics.mean(right[1]),
            "only_ours_broke": sum(b > a for a, b in zip(*right, strict=True)),
            "only_peer_broke": sum(a > b for a, b in zip(*right, strict=True)),
            "seconds_ours": sum(mine["seconds"] for mine, _ in both),
            "seconds_peer": sum(peer["seconds"] for _, peer in both),
            "ratio_of_sums": sum(mine["seconds"] for mine, _ in both) / sum(peer["seconds"] for _, peer in both),
            "ratio_median": statistics.median(ratios),
            "ratio_median_in_bare_forwards": statistics.median(mine / peer for mine, peer in forwards),
        }
    return found


def main() -> None:
    """Take the chunks that are missing, store after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--chunk", type=int, default=50)
    parser.add_argument("--side", choices=[name for name in SIDES if name != "ours"], default="pyautoattack")
    parser.add_argument("--again", choices=list(SIDES), help="forget this side's chunks first")
    parser.add_argument("--out", type=Path, default=RESULTS / "autoattack.json")
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "FIRST", "LAST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        side, first, last = arguments.one
        print(json.dumps(one_chunk(side, arguments.weights, int(first), int(last))))
        return
    settings = {"eps": EPS, "chunk": arguments.chunk, "side": arguments.side}
    rows = Rows(arguments.out, "python benchmarks/autoattack.py --weights FILE", settings)
    for key in [key for key in rows.rows if key.startswith(f"{arguments.again}, ")]:
        del rows.rows[key]
    starts = range(0, arguments.images, arguments.chunk)
    spans = [(first, min(first + arguments.chunk, arguments.images)) for first in starts]
    for key in rows.missing(f"{side}, {a}-{b}" for a, b in spans for side in ("ours", arguments.side)):
        side, chunk = key.split(", ")
        command = [sys.executable, __file__, "--weights", arguments.weights, "--one", side, *chunk.split("-")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.add(key, row, summary=summary(rows.rows | {key: row}))
        print(key, {name: row[name] for name in ("seconds", "wall_seconds")}, flush=True)
    print(json.dumps(summary(rows.rows), indent=1))


if __name__ == "__main__":
    main()
