"""Command line of a visit: runs its parts, and prints a table of the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from visit import Notebook, Visit, measure_machine, read_lines, tiny
from visit_bench import run_benchmarks
from visit_segmentation import run_segmentation
from visit_training import run_trainings

from gambeson.base import pick_device


def main(arguments: list[str] | None = None) -> int:
    """Run parts of a visit from the command line."""
    parser = argparse.ArgumentParser(prog="gpu visit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("machine", "bench", "segmentation", "training", "table"))
    parser.add_argument("--out", type=Path, required=True, help="the file of JSON lines")
    parser.add_argument("--seconds", type=float, default=600.0, help="when to be done")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="lines of earlier visits, not done again")
    parser.add_argument("--only", default="", help="training: defences or NAME@SEED, by commas")
    parser.add_argument("--epochs", type=int, help="training: epochs of every run, not chosen by the time left")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in seconds")
    given = parser.parse_args(arguments)
    book = Notebook(given.out, given.seconds)
    if given.part == "table":
        print_table(book.lines())
        return 0
    device = pick_device(given.device)
    visit = tiny(device) if given.tiny else Visit(device=device, data=given.data)
    if given.epochs:
        visit = visit.model_copy(update={"epochs": (given.epochs, given.epochs)})
    if given.part == "machine":
        return int(not book.attempt("machine", lambda: measure_machine(visit, book)))
    if given.part == "bench":
        run_benchmarks(visit, book)
        return 0
    if given.part == "segmentation":
        run_segmentation(visit, book)
        return 0
    done = [line for file in given.done for line in read_lines(file)]
    run_trainings(visit, book, done, [name for name in given.only.split(",") if name])
    return 0


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print one line for each of the main numbers."""
    for line in lines:
        kind = line["kind"]
        if kind == "peak":
            rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in line["matmul_flops"].items())
            print(f"matrix product, TFLOP/s: {rates}; copy {line['copy_bytes'] / 1e12:.2f} TB/s")
        elif kind == "bench":
            print(
                f"{line['bench']:9s} {line['batch_size']:4d} {line['name'][:38]:38s} {1e3 * line['seconds']:8.1f} ms "
                f"{line['images_a_second']:8.0f} images/s  {line['ratio'][0]:.2f}  {_shares(line)}"
            )
        elif kind == "universal":
            print(
                f"universal {line['name']}, {line['copy']}: {line['seconds']:.2f} s for {line['backwards']} gradients, "
                f"{line['peak_gib']} GiB  {_shares(line)}"
            )
        elif kind == "curve":
            print(
                f"universal at {len(line['eps'])} eps, {line['name']}: {line['seconds']:.2f} s for {line['backwards']} "
                f"gradients, {line['peak_gib']} GiB"
            )
        elif kind == "attack":
            print(
                f"PGD-10, {line['batch_size']} images, {line['copy']}: {1e3 * line['seconds']:.1f} ms, first "
                f"{line['first_seconds']:.1f} s, {line['peak_gib']} GiB  {_shares(line)} ({line['notes']})"
            )
        elif kind == "segmentation":
            print(
                f"{line['model']} {line['side']} px, {line['precision']}, {line['name']}: "
                f"{line['images_a_second']:.0f} images/s, {line['peak_gib']} GiB  {_shares(line)} ({line['notes']})"
            )
        elif kind == "profile":
            print(
                f"{line['name']}: {1e3 * line['seconds']:.0f} ms, of which kernels "
                f"{1e3 * line['kernel_seconds']:.0f} ms in {line['kernels']}; waits {line['waits']}"
            )
        elif kind == "step":
            print(
                f"step {line['defense']:24s} {1e3 * line['seconds']:7.1f} ms {line['images_a_second']:8.0f} images/s "
                f"epoch {line['seconds_per_epoch']:.1f} s, {line['peak_gib']} GiB  {_shares(line)}"
            )
        elif kind == "audited":
            values = "  ".join(f"{name} {100 * value:.1f}" for name, value in line["found"].items())
            print(f"{line['defense']:24s} seed {line['seed']} {line['epochs']:3d} epochs: {values}")
        elif kind == "audit":
            print(f"audit {line['suite']} of {line['defense']}: {line['seconds']:.0f} s")
        elif kind in ("error", "skipped"):
            print(f"{kind}: {line['name']} {line.get('error', '')}"[:200])


def _shares(line: dict[str, Any]) -> str:
    return " ".join(f"{100 * share:.0f}% of {name}" for name, share in line["share_of_peak"].items())


if __name__ == "__main__":
    sys.exit(main())
