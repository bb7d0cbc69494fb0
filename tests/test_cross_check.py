"""Our attacks are as strong as the peers' at equal settings; skipped where the extra ``bench`` is not installed.

``benchmarks/cross_check.py`` does the same at length, with ART and on networks that were trained against attacks.
"""

import pytest
import torch

from gambeson.attacks import FGSM, PGD, AutoPGD, CarliniWagner, CosPGD, DeepFool, SegPGD
from gambeson.threat import Ball
from tests.attacks.test_segmentation_attacks import Patchwise

EPS, STEPS = 0.08, 10


@pytest.fixture(scope="module")
def batch(digits):
    return digits.test.take(slice(0, 200))


def left(model, x, moved, y, norm="inf", eps=EPS):
    """Accuracy under attack; images outside ball or box count as right, whoever returned them."""
    inside = Ball(eps=eps, norm=norm).length(moved.double() - x.double()) <= eps + 1e-6
    inside &= ((moved >= 0) & (moved <= 1)).flatten(1).all(1)
    with torch.no_grad():
        fooled = model(moved).argmax(1) != y
    return 1 - float((fooled & inside).float().mean())


def agree(model, x, y, ours, theirs, norm="inf", eps=EPS):
    """Ours is within a point of theirs or lower, over three seeds, and the radius is one at which it can show."""
    found = {"ours": 0.0, "theirs": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        if hasattr(theirs, "seed"):
            theirs.seed = seed  # APGD of torchattacks goes by this one
        found["theirs"] += left(model, x, theirs(x, y), y, norm, eps) / 3
        found["ours"] += left(model, x, ours(model, x, y, seed=seed), y, norm, eps) / 3
    assert 0.05 < found["theirs"] < left(model, x, x, y) - 0.1  # so the null attack would not pass
    assert found["ours"] <= found["theirs"] + 0.01


OURS = {
    "fgsm": FGSM(eps=EPS),
    "pgd": PGD(eps=EPS, steps=STEPS, rel_step_size=0.2, start="zero", early_stop=False),
    "apgd-ce": AutoPGD(eps=EPS, steps=STEPS),
    "apgd-dlr": AutoPGD(eps=EPS, steps=STEPS, loss="dlr"),
}


@pytest.mark.parametrize("name", OURS)
def test_as_strong_as_torchattacks(trained, batch, name):
    torchattacks = pytest.importorskip("torchattacks")
    theirs = {
        "fgsm": lambda: torchattacks.FGSM(trained, eps=EPS),
        "pgd": lambda: torchattacks.PGD(trained, eps=EPS, alpha=EPS / 5, steps=STEPS, random_start=False),
        "apgd-ce": lambda: torchattacks.APGD(trained, eps=EPS, steps=STEPS),
        "apgd-dlr": lambda: torchattacks.APGD(trained, eps=EPS, steps=STEPS, loss="dlr"),
    }
    agree(trained, *batch, OURS[name], theirs[name]())


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_as_strong_as_foolbox(trained, batch, name):
    foolbox = pytest.importorskip("foolbox")
    attack = {
        "fgsm": foolbox.attacks.LinfFastGradientAttack,
        "pgd": lambda: foolbox.attacks.LinfPGD(rel_stepsize=0.2, steps=STEPS, random_start=False),
    }[name]()
    trained.eval()
    wrapped = foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu")
    agree(trained, *batch, OURS[name], lambda x, y: attack(wrapped, x, y, epsilons=EPS)[1])


@pytest.mark.parametrize("name", ["pgd-2", "deepfool", "carlini-wagner", "carlini-wagner early abort"])
def test_as_strong_as_foolbox_in_the_euclidean_norm(trained, batch, name):
    foolbox = pytest.importorskip("foolbox")
    x, y = (part[:40] for part in batch)
    wrapped = foolbox.PyTorchModel(trained.eval(), bounds=(0, 1), device="cpu")
    if name == "pgd-2":
        attack = foolbox.attacks.L2PGD(rel_stepsize=0.2, steps=STEPS, random_start=False)
        ours = PGD(eps=0.4, norm="2", steps=STEPS, rel_step_size=0.2, start="zero", early_stop=False, exact_box=False)
        agree(trained, x, y, ours, lambda x, y: attack(wrapped, x, y, epsilons=0.4)[1], "2", 0.4)
        return
    if name == "deepfool":
        attack, ours = foolbox.attacks.L2DeepFoolAttack(), DeepFool()
    else:
        early = name.endswith("early abort")
        settings = {"steps": 60, "initial_const": 0.1, "stepsize": 0.05, "binary_search_steps": 3}
        attack = foolbox.attacks.L2CarliniWagnerAttack(**settings, abort_early=early)
        ours = CarliniWagner(steps=60, c=0.1, lr=0.05, searches=3, early_abort=early)
    found = [ours(trained, x, y), attack(wrapped, x, y, epsilons=None)[0]]
    with torch.no_grad():
        # Where it finds nothing, Foolbox's Carlini-Wagner returns a black image.
        is_adversarial = [(trained(moved).argmax(1) != y) & (moved != 0).flatten(1).any(1) for moved in found]
        right = trained(x).argmax(1) == y
    assert is_adversarial[0].float().mean() >= is_adversarial[1].float().mean()
    both = is_adversarial[0] & is_adversarial[1] & right
    assert int(both.sum()) > 20
    lengths = [float((moved - x)[both].flatten(1).norm(dim=1).mean()) for moved in found]
    assert 0 < lengths[0] <= 1.01 * lengths[1]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["segpgd", "cospgd"])
def test_steps_on_label_maps_are_those_of_the_authors_of_cospgd(name, targeted):
    theirs, steps, eps = pytest.importorskip("cospgd").functions, 6, 8 / 255
    model, classes = Patchwise(), 4
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1).roll(1, 0 if targeted else 2)
    moved = x
    for step in range(steps):
        point = moved.clone().requires_grad_()
        logits = model(point)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        if name == "segpgd":
            loss = theirs.segpgd_scale(logits, y, loss, step, steps, targeted)
        else:
            loss = theirs.cospgd_scale(logits, y, loss, classes, targeted).mean()
        (gradient,) = torch.autograd.grad(loss, point)
        moved = theirs.step_inf(moved, eps, gradient, x, 0.01, targeted)
    attack = (SegPGD if name == "segpgd" else CosPGD)(
        eps=eps, steps=steps, start="zero", keep="last", early_stop=False, targeted=targeted
    )
    torch.testing.assert_close(attack(model, x, y), moved, atol=1e-6, rtol=0)
    assert float((moved - x).abs().mean()) > eps / 2
