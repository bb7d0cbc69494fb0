"""Time and strength of our attacks beside Foolbox, torchattacks and ART: ``python benchmarks/peers.py --out FILE``.

The peers come with the extra ``bench``; the library itself never imports them.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import nn

from gambeson.base import write_json
from gambeson.studies.bench import Attack, BenchSettings, bench_attacks

warnings.filterwarnings("ignore")


def foolbox_pgd(settings: BenchSettings) -> Attack:
    """Foolbox's LinfPGD at the same steps."""
    import foolbox

    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=settings.steps)

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return attack(wrapped, x, y, epsilons=settings.eps)[1]

    return run


def torchattacks_pgd(settings: BenchSettings) -> Attack:
    """Torchattacks' PGD at the same steps."""
    import torchattacks

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torchattacks.PGD(model, eps=settings.eps, alpha=settings.eps / 4, steps=settings.steps)(x, y)

    return run


def art_pgd(settings: BenchSettings) -> Attack:
    """ART's ProjectedGradientDescentPyTorch at the same steps."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def run(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shape = tuple(x.shape[1:])
        wrapped = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), input_shape=shape, nb_classes=10, clip_values=(0, 1), device_type="cpu"
        )
        attack = ProjectedGradientDescentPyTorch(
            wrapped,
            eps=settings.eps,
            eps_step=settings.eps / 4,
            max_iter=settings.steps,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return run


PEERS = {"foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd, "art": art_pgd}


def main() -> None:
    """Run the benchmark with every peer that is installed and store the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench-attacks.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    settings = BenchSettings(rounds=arguments.rounds)
    peers = {}
    for name, build in PEERS.items():
        try:
            peers[name] = build(settings)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    result = bench_attacks(settings, peers)
    for timing in result.timings:
        print(f"{timing.name:14} {timing.seconds:7.3f} s   {timing.ratio:5.2f} of the bare loop")
    write_json(arguments.out, result.plain())


if __name__ == "__main__":
    main()
