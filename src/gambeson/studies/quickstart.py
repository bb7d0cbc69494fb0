"""The quickstart: break a model with one perturbation, harden it in two ways, audit all three."""

from __future__ import annotations

from pathlib import Path

from gambeson import data
from gambeson.auditing import Audit, AuditRun, Suite, run_audit
from gambeson.defenses import Defense, PGDAdversarial, SharedAdversarial, Standard
from gambeson.training import Recipe, TrainRun, run_training

DATA, MODEL, EPS = "mnist5k", "lenet5", 0.2

BASELINE = "standard"
DEFENSES: dict[str, Defense] = {
    BASELINE: Standard(),
    "pgd-adversarial": PGDAdversarial(eps=EPS),
    "shared-adversarial": SharedAdversarial(eps=EPS, sharedness=64, sigma=0.7),
}
TRAIN = Recipe(epochs=12, lr=0.05, warmup=1)
HARDEN = Recipe(epochs=8, lr=0.05, warmup=1)
SUITE = Suite(
    eps=(0.1, 0.2, 0.25, 0.3, 0.4),
    universal_steps=200,
    universal_restarts=1,
    universal_batch=64,
    universal_probe_starts=4,
    pgd_steps=20,
    pgd_restarts=1,
    suite_images=100,
    sample=100,
    queries=200,
    surrogate_epochs=6,
    transfer_images=500,
    noise_sizes=(1.0, 3.0),
    jacobian_backwards=2000,
    eps_uni_tolerance=0.05,
)


def quickstart(out: Path, seed: int = 0, device: str = "cpu") -> list[Audit]:
    """Train LeNet-5 on 3,500 digits, harden the trained net in two ways, and audit all three on 1,000 other digits.

    Hardening starts from the standard network: this small network often fails to learn with perturbations of this size
    from the first step on.

    Args:
        out: folder with a run folder and an audit folder per model; finished ones are not repeated.
        seed: of everything.
        device: of the computations.

    Returns:
        The audits, in the order of :data:`DEFENSES`.
    """
    dataset = data.load(DATA)
    for name, defense in DEFENSES.items():
        fresh = name == BASELINE
        run = TrainRun(
            data=DATA,
            model=MODEL,
            defense=defense,
            recipe=TRAIN if fresh else HARDEN,
            init=None if fresh else str(out / BASELINE),
            seed=seed,
            device=device,
        )
        run_training(run, out / name, dataset)
    plans = [AuditRun(model=str(out / name), data=DATA, suite=SUITE, seed=seed, device=device) for name in DEFENSES]
    return [run_audit(plan, Path(f"{plan.model}-audit"), dataset) for plan in plans]
