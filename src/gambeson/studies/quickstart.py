"""The main job in three minutes: break a model with one pattern, harden it two ways, measure all three alike."""

from __future__ import annotations

from pathlib import Path

from gambeson import data
from gambeson.defenses import Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.evaluation import Audit, AuditRun, Suite, run_audit
from gambeson.training import Recipe, TrainRun, run_training

DATA, MODEL, EPS = "mnist5k", "lenet", 0.2

DEFENSES: dict[str, Defense] = {
    "standard": Standard(),
    "pgd-adversarial": PGDAdversarial(eps=EPS),
    "shared-adversarial": SharedAdversarial(eps=EPS, sharedness=64, sigma=0.7),
}
RECIPE = Recipe(epochs=20, batch_size=128, lr=0.05, weight_decay=5e-4, warmup=1)
SUITE = Suite(
    eps=(0.1, 0.15, 0.2, 0.25, 0.3),
    universal_steps=100,
    universal_restarts=2,
    pgd_steps=20,
    pgd_restarts=1,
    eps_uni_tolerance=0.05,
)


def quickstart(out: Path, seed: int = 0, device: str = "cpu") -> list[Audit]:
    """Train LeNet on 3,500 digits by three objectives and audit each on 1,000 others.

    Args:
        out: folder; every model gets a run folder and an audit folder in it. What is finished there is not repeated.
        seed: of everything.
        device: where to compute.

    Returns:
        The audits, in the order of :data:`DEFENSES`.
    """
    dataset = data.load(DATA)
    audits = []
    for name, defense in DEFENSES.items():
        run = TrainRun(data=DATA, model=MODEL, defense=defense, recipe=RECIPE, seed=seed, device=device)
        run_training(run, out / name, dataset)
    for name in DEFENSES:
        plan = AuditRun(model=str(out / name), data=DATA, suite=SUITE, seed=seed, device=device)
        audits.append(run_audit(plan, out / f"{name}-audit", dataset))
    return audits
