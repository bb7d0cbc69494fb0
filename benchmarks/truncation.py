"""What it brings that fallen images keep a say until they have clearly fallen: ``python benchmarks/truncation.py``.

The universal attack of ``quick`` on networks of the testbed, those that are seldom sure among them, with
``truncate_margin`` at 0 and at the audits' 0.4: crafted on train at one eps with three seeds, and reported on test.
"""

from __future__ import annotations

import torch
from stored import RESULTS, Rows

import gambeson as gb
from gambeson.auditing import SUITES
from gambeson.evaluation import accuracy, universal_evasion
from gambeson.testbed import networks

EPS = {"digits": 0.15, "mnist5k": 0.15, "fashion-mnist": 0.15, "cifar10": 12 / 255}
NETS = {
    "digits": ("standard", "pgd-adversarial", "trades", "Lipschitz"),
    "mnist5k": ("standard", "linear", "Lipschitz"),
    "fashion-mnist": ("standard", "shared-adversarial", "jacobian"),
    "cifar10": ("standard", "pgd-adversarial", "trades", "shared-adversarial"),
}
MARGINS, SEEDS, IMAGES = (0.0, 0.4), (0, 1, 2), 1000


def main() -> None:
    """Craft, print, store."""
    torch.set_num_threads(1)
    cases = {f"{data}, {net}": (data, net) for data, nets in NETS.items() for net in nets}
    settings = {"eps": EPS, "margins": MARGINS, "seeds": SEEDS, "images": IMAGES, "suite": "quick"}
    rows = Rows(RESULTS / "truncation.json", "python benchmarks/truncation.py", settings)
    for key in rows.missing(cases):
        name, net = cases[key]
        nets = networks(name)
        model, whole = nets(net).eval(), nets.data
        held, test = (split.sample(min(IMAGES, len(split))) for split in (whole.validation, whole.test))
        data = gb.data.Dataset(whole.name, whole.train, held, test, whole.classes)
        attack, uer = SUITES["quick"].on(data).universal(EPS[name]), {}
        for margin in MARGINS:
            one = attack.model_copy(update={"truncate_margin": margin})
            uer[f"{margin:g}"] = [universal_evasion(model, data, one.craft(model, data, seed=k)).plain() for k in SEEDS]
        rows.add(key, {"clean": accuracy(model, data).plain(), "uer": uer})
        print(key, {margin: [round(one["value"], 3) for one in rates] for margin, rates in uer.items()}, flush=True)


if __name__ == "__main__":
    main()
