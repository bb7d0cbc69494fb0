"""Why some numbers of the peers differ from ours, each in a few lines: ``python benchmarks/peer_faults.py``.

None needs a trained network. ``results/cross-check.json`` shows what they cost on real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from peers import art_attack, foolbox_attack, torchattacks_attack
from stored import RESULTS, made
from torch import nn

from gambeson.attacks import PGD, AutoPGD, CarliniWagner, DeepFool
from gambeson.base import write_json
from gambeson.studies.bench import Attack

EPS = 0.1


class Linear(nn.Module):
    """Three classes on 1 x 8 x 8 images, with weights of which none is zero; ``scale`` makes the model sure."""

    def __init__(self, scale: float = 1.0, lead: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 64, generator=draw), requires_grad=False)
        self.scale = scale
        self.lead = nn.Parameter(torch.tensor([lead, 0.0, 0.0]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return x.flatten(1) @ self.weight.T * self.scale + self.lead


def black_and_white() -> dict[str, float]:
    """Share of pixels that move where every pixel of the images is exactly 0 or 1.

    About half have a gradient that points into the box; a share near zero means that the attack's clip (or its
    inverse of tanh) has taken their gradient. Torch's clamp has no gradient at its ends from 2.15 on. APGD of
    torchattacks returns images that it does not fool as they were.
    """
    model = Linear().eval()
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    y = model(x).argmax(1)
    attacks: dict[str, Attack] = {
        "gambeson PGD": PGD(eps=EPS, steps=5, start="zero", early_stop=False),
        "gambeson AutoPGD": AutoPGD(eps=EPS, steps=5, early_stop=False),
        "gambeson DeepFool": DeepFool(),
        "gambeson CarliniWagner": CarliniWagner(steps=300, lr=0.05, c=10, searches=1),
        "foolbox LinfPGD": foolbox_attack("LinfPGD", eps=EPS, steps=5, random_start=False),
        "foolbox L2DeepFoolAttack": foolbox_attack("L2DeepFoolAttack", eps=None),
        "foolbox L2CarliniWagnerAttack": foolbox_attack(
            "L2CarliniWagnerAttack", eps=None, steps=300, stepsize=0.05, initial_const=10, binary_search_steps=1
        ),
        "torchattacks PGD": torchattacks_attack("PGD", eps=EPS, steps=5, random_start=False),
        "torchattacks APGD": torchattacks_attack("APGD", eps=EPS, steps=5),
        "torchattacks DeepFool": torchattacks_attack("DeepFool"),
        "torchattacks CW": torchattacks_attack("CW", c=10, steps=300, lr=0.05),
        "art ProjectedGradientDescentPyTorch": art_attack(
            "ProjectedGradientDescentPyTorch", eps=EPS, eps_step=EPS / 4, max_iter=5
        ),
        "art DeepFool": art_attack("DeepFool", epsilon=0.02),
        "art CarliniL2Method": art_attack("CarliniL2Method", max_iter=20, initial_const=10, binary_search_steps=1),
    }
    return {name: float(((attack(model, x, y) - x).abs() > 1e-4).float().mean()) for name, attack in attacks.items()}


def sure_model() -> dict[str, dict[str, float]]:
    """How far an image moves, over eps, on a model so sure that its gradient is tiny: alone, and in a batch of 256.

    The two differ where the gradient of a mean over the batch is divided by its norm plus a constant.
    """
    model = Linear(lead=20.0, scale=0.01).eval()
    x = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(256, dtype=torch.long)
    attacks: dict[str, Attack] = {
        "gambeson PGD norm 2": PGD(eps=1, norm="2", steps=10, start="zero", early_stop=False),
        "foolbox L2PGD": foolbox_attack("L2PGD", eps=1.0, steps=10, rel_stepsize=0.4, random_start=False),
        "torchattacks PGDL2": torchattacks_attack("PGDL2", eps=1.0, alpha=0.4, steps=10, random_start=False),
        "art PGD norm 2": art_attack("ProjectedGradientDescentPyTorch", norm=2, eps=1.0, eps_step=0.4, max_iter=10),
    }
    return {
        name: {
            "alone": float((attack(model, x[:1], y[:1]) - x[:1]).norm()),
            "in_batch": float((attack(model, x, y)[:1] - x[:1]).norm()),
        }
        for name, attack in attacks.items()
    }


def main() -> None:
    """Print what was found, and store it."""
    torch.set_num_threads(1)
    content: dict[str, Any] = {"black_and_white": black_and_white(), "sure_model": sure_model()}
    for part in ("black_and_white", "sure_model"):
        print(part, *(f"{name:36} {value}" for name, value in content[part].items()), sep="\n  ")
    about = made("python benchmarks/peer_faults.py", {"eps": EPS})
    write_json(RESULTS / "peer-faults.json", {"about": about, **content})


if __name__ == "__main__":
    main()
