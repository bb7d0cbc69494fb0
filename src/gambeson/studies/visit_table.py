"""What a visit found, as a short table."""

from __future__ import annotations

from typing import Any


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print one line for each number that a reader asks for first."""
    for line in lines:
        kind = line["kind"]
        if kind == "peak":
            rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in line["matmul_flops"].items())
            print(f"matrix product, TFLOP/s: {rates}; copy {line['copy_bytes'] / 1e12:.2f} TB/s")
        elif kind == "bench":
            best = " ".join(f"{100 * share:.0f}% of {name}" for name, share in line["share_of_peak"].items())
            print(
                f"{line['bench']:9s} {line['batch_size']:4d} {line['name'][:38]:38s} {1e3 * line['seconds']:8.1f} ms "
                f"{line['images_a_second']:8.0f} images/s  {line['ratio'][0]:.2f}  {best}"
            )
        elif kind == "universal":
            print(f"universal {line['name']}, {line['copy']}: {line['seconds']:.1f} s, {line['peak_gib']} GiB")
        elif kind == "attack":
            print(f"PGD-10, {line['setting']}, {line['copy']}: {line['images_a_second']:.0f} images/s")
        elif kind == "profile":
            print(
                f"{line['name']}: {1e3 * line['seconds']:.0f} ms, of which kernels "
                f"{1e3 * line['kernel_seconds']:.0f} ms in {line['kernels']}; waits {line['waits']}"
            )
        elif kind == "step":
            best = " ".join(f"{100 * share:.0f}% of {name}" for name, share in line["share_of_peak"].items())
            print(
                f"step {line['defense']:24s} {1e3 * line['seconds']:7.1f} ms {line['images_a_second']:8.0f} images/s "
                f"epoch {line['seconds_per_epoch']:.1f} s, {line['peak_gib']} GiB  {best}"
            )
        elif kind == "audited":
            values = "  ".join(f"{name} {100 * value:.1f}" for name, value in line["found"].items())
            print(f"{line['defense']:24s} seed {line['seed']} {line['epochs']:3d} epochs: {values}")
        elif kind in ("error", "skipped"):
            print(f"{kind}: {line['name']} {line.get('error', '')}"[:200])
