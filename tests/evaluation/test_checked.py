"""What an attack returns is looked at once, for every rate: its shape, type, range and ball."""

import numpy as np
import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PGD
from gambeson.data import Split
from gambeson.evaluation import accuracy_under, eps_adv
from gambeson.evaluation.attack_suite import run_suite
from gambeson.evaluation.outcome import checked
from gambeson.evaluation.transfer import perturbed
from gambeson.threat import perturb
from gambeson.victim import Victim
from tests.conftest import LinearNet

CLASSES = ("a", "b")


def split(count=30, shape=(1, 4, 4)):
    draw = torch.Generator().manual_seed(4)
    images = torch.rand(count, *shape, generator=draw)
    return Split("r", images, (images.flatten(1).mean(1) > 0.5).long(), CLASSES)


def net():
    weight = torch.stack([-torch.ones(16), torch.ones(16)])
    return LinearNet(weight.view(2, 1, 4, 4), torch.tensor([8.0, -8.0]))


class Returns(PGD):
    """PGD whose result is bent."""

    kind: str = "nothing"

    def __call__(self, model, x, y, *, seed=0, task=None):
        moved = super().__call__(model, x, y, seed=seed, task=task)
        bent = {
            "nothing": moved,
            "box": moved * 5 - 2,
            "ball": 1 - x,
            "shape": moved[:, :, :2],
            "count": moved[:1],
            "type": moved.double(),
            "nan": torch.full_like(moved, torch.nan),
            "none": None,
        }
        return bent[self.kind]


PATHS = {
    "suite": lambda attack: run_suite_of(attack),
    "accuracy": lambda attack: accuracy_of(attack),
    "eps_adv": lambda attack: eps_adv(net(), split(), attack),
    "transfer": lambda attack: perturbed(net(), split(), attack, 0),
}


def run_suite_of(attack):
    with Victim(net()) as victim:
        return run_suite(victim, split(), {"bent": attack})


def accuracy_of(attack):
    with Victim(net()) as victim:
        return accuracy_under(victim, split(), attack, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("box", "returned pixels from"),
        ("ball", "moved an image by"),
        ("shape", "expected those of its images"),
        ("count", "expected those of its images"),
        ("type", "torch.float64"),
        ("nan", "returned pixels from nan"),
        ("none", "returned a NoneType"),
    ],
)
def test_what_no_attack_may_return_is_refused_by_every_path(path, kind, message):
    PATHS[path](Returns(eps=0.02, steps=2))
    with pytest.raises(UserError, match=message):
        PATHS[path](Returns(eps=0.02, steps=2, kind=kind))


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_the_surface_of_the_ball_is_inside_it(norm):
    attack = PGD(eps=0.3, norm=norm, steps=1)
    x = torch.full((5, 3, 32, 32), 0.5)
    delta = attack.ball.signs(x.shape, torch.Generator().manual_seed(0))
    assert checked(perturb(x, delta), x, attack) is not None
    with pytest.raises(UserError, match="moved an image by"):
        checked(perturb(x, 1.01 * delta), x, attack)


class Own:
    """A user's attack, in whatever types its settings are."""

    def __init__(self, eps, norm):
        self.eps, self.norm = eps, norm

    def __call__(self, model, x, y, *, seed=0, task=None):
        return 1 - x


@pytest.mark.parametrize("eps", [0, np.float32(0.05), np.float64(0.05), "8/255", torch.tensor(0.05)])
@pytest.mark.parametrize("norm", ["inf", "Linf", 2, 1])
def test_a_users_attack_is_held_to_its_ball_whatever_type_its_eps_has(eps, norm):
    with pytest.raises(UserError, match="'Own' of eps = .* moved an image by"):
        accuracy_of(Own(eps, norm))
    accuracy_of(Own(None, norm))
    accuracy_of(Own((0.1, 0.2), norm))


@pytest.mark.parametrize("part", [slice(None), slice(0, 8)])
def test_stored_images_are_looked_at_as_those_of_an_attack(part):
    def suite(images):
        with Victim(net()) as victim:
            return run_suite(victim, split(), {"kept": images})

    clean = split().images
    assert suite(clean).result.robust == suite(PGD(eps=0.0)(net(), clean, split().labels)).result.robust
    far = clean.clone()
    far[part] = far[part] * 3 - 1
    for wrong, said in (
        (far, "'kept' returned pixels from"),
        ((clean * 255).to(torch.uint8), "'kept' returned torch.uint8"),
        (clean.double(), "'kept' returned torch.float64"),
        (clean[:, :, 1:], "expected those of its images"),
        (clean[:-1], "29 images of attack 'kept' came for the 30 of r"),
        (torch.cat([clean, clean]), "60 images of attack 'kept'"),
    ):
        with pytest.raises(UserError, match=said):
            suite(wrong)


def test_a_perturbation_of_another_size_is_not_broadcast():
    images, delta = torch.rand(4, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match="channels, height and width must agree"):
        perturb(images, delta)
    with pytest.raises(UserError, match="channels, height and width must agree"):
        perturb(images, torch.zeros(1, 3, 5, 5))


def test_eps_adv_counts_labels_that_count_and_takes_gradient_attacks():
    part = split()
    ignored = Split("i", part.images, torch.full_like(part.labels, 255), CLASSES, ignore_index=255)
    with pytest.raises(UserError, match="no label that counts"):
        eps_adv(net(), ignored, PGD(eps=0.1))
    with pytest.raises(UserError, match="eps_adv takes a gradient attack such as"):
        eps_adv(net(), part, gb.attacks.Square(eps=0.1))


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_a_universal_perturbation_lies_in_its_ball(norm):
    uap = gb.attacks.StochasticPGD(eps=0.1, norm=norm, steps=2, probe_starts=0).craft(net(), split(60))
    surface = uap.delta * (0.1 / float(uap.delta.norm(p=float(norm))))
    gb.attacks.UniversalPerturbation(surface, uap.about)
    for bad in (1.01 * surface, torch.full_like(surface, torch.nan)):
        with pytest.raises(UserError, match="expected a finite one inside the ball"):
            gb.attacks.UniversalPerturbation(bad, uap.about)


def unaware(model, x, y):
    return x


class Overwriting(PGD):
    def __call__(self, model, x, y, *, seed=0, task=None):
        return x.copy_(super().__call__(model, x, y, seed=seed, task=task))


@pytest.mark.parametrize("path", [path for path in PATHS if path != "eps_adv"])
@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (unaware, "seed"),
        (3, "no attack"),
        (PGD, "is a class"),
        (gb.attacks.StochasticPGD(eps=0.1), "for all images"),
    ],
)
def test_what_cannot_be_called_as_an_attack_is_refused(path, attack, said):
    with pytest.raises(UserError, match=said):
        PATHS[path](attack)


@pytest.mark.parametrize("path", PATHS)
def test_an_attack_may_not_change_the_images_it_is_given(path):
    with pytest.raises(UserError, match=r"x\.clone\(\)"):
        PATHS[path](Overwriting(eps=0.1))


def test_universal_attacks_that_yield_something_else_are_refused():
    def found(*made):
        class Odd(gb.attacks.StochasticPGD):
            def _search(self, context, start):
                yield from made

        return Odd(eps=0.1)

    candidate = gb.attacks.universal.base.Candidate
    flat = candidate(start="zero", delta=torch.zeros(1, 4, 4))
    cases = {(): "yielded nothing", (torch.zeros(1, 1, 4, 4),): "a Tensor", (flat,): r"\(1, 4, 4\)"}
    for made, said in cases.items():
        with pytest.raises(UserError, match=said):
            found(*made).craft(net(), split())
