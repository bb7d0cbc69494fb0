"""Universal patches: the optimum of linear models, expectation over placements, targets, controls, files, refusals."""

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PATCH_CONTROLS, AdversarialPatch, UniversalPatch, UniversalPerturbation, patch_control
from gambeson.base import generator
from gambeson.data import as_dataset
from gambeson.evaluation import fooling_rate, rates_beside, target_success, under_edits, universal_evasion
from gambeson.victim import Victim, as_victim, predict, score
from tests.conftest import LinearNet

FEW = {"probe_starts": 0, "steps": 30}


@pytest.fixture(scope="module")
def linear():
    """Two classes of images that a linear model tells apart by the sign of its logit."""
    weight = torch.randn(1, 1, 6, 7, generator=generator(87, "weight")) + 0.4 * torch.linspace(-1, 1, 7)
    model = LinearNet(torch.cat([-weight, weight]))
    x = torch.rand(300, 1, 6, 7, generator=generator(0, "x"))
    shift = (x * weight).flatten(1).sum(1, keepdim=True)
    bias = float(shift.median())
    model.bias = torch.nn.Parameter(torch.tensor([bias, -bias]), requires_grad=False)
    return model, weight, as_dataset((x, (shift[:, 0] > bias).long()))


@pytest.fixture(scope="module")
def crafted(trained, digits):
    return UniversalPatch(area=0.2, probe_starts=2, probe_start_steps=30, steps=60).craft(trained, digits, seed=1)


def test_the_patch_of_a_linear_model_is_the_sign_of_its_weights_there(linear):
    model, weight, data = linear
    for target, sign in ((1, 1), (0, -1)):
        attack = UniversalPatch(area=0.2, place=(0.5, 1), target=target, temperature=1, tau=1, **FEW)
        found = attack.craft(model, data)
        # 3 x 3 pixels: rows 2 to 4 of six (the middle of the way, rounded to even), the last three columns.
        best = (sign * weight[:, :, 2:5, 4:7] > 0).float()
        assert torch.equal(found.pattern, best)
        x = data.test.take(slice(None))[0]
        moved = x.clone()
        moved[:, :, 2:5, 4:7] = best
        assert torch.equal(found.apply(x), moved)
        assert found.about.settings["place"] == [0.5, 1.0]


def test_the_patch_at_random_places_is_the_sign_of_the_mean_of_the_weights(linear):
    """Of the expected logit, which is linear in the patch: each of its pixels meets the weights of all legal places."""
    model, weight, data = linear
    mean = torch.stack([weight[0, 0, y : y + 4, x : x + 5].mean() for y in range(3) for x in range(3)])
    mean = mean.view(1, 1, 3, 3)
    assert float(mean.abs().min()) > 0.01
    assert 2 < int((mean > 0).sum()) < 7
    settings = {"area": 0.2, "target": 1, "temperature": 1, "tau": 1, "placements": 4, "loss": "margin"}
    found = UniversalPatch(**settings, steps=60, probe_starts=0, batch_size=150).craft(model, data)
    assert torch.equal(found.pattern, (mean > 0).float())
    assert found.about.backwards == 60 * 4 * 150


def test_a_patch_does_more_harm_than_its_controls_on_new_images_and_places(trained, digits, crafted):
    rate = universal_evasion(trained, digits, crafted, seed=5)
    beside = rates_beside(trained, digits, crafted, seed=5)
    assert [(one.name, one.draws) for one in beside] == list(PATCH_CONTROLS.items())
    assert all(rate.low > one.worst.value for one in beside)
    assert rate != universal_evasion(trained, digits, crafted, seed=6)  # other places
    # One decision: the images as they are given, and by hand.
    images, labels = digits.test.take(slice(None))
    with torch.no_grad():
        wrong = trained(crafted.apply(images, seed=5)).argmax(1) != labels
    assert rate.value == pytest.approx(float(wrong.float().mean()))
    with Victim(trained) as victim:
        validation = digits.validation
        own = score(predict(victim, validation, crafted.shared("cpu"), seed=1), validation)
    assert max(value for _, value in crafted.about.restarts) == pytest.approx(own.error)
    assert fooling_rate(trained, digits, crafted).value > 0.1
    edited = under_edits(trained, digits, crafted, ["jpeg:50"], controls=("random-sign",))
    assert edited.rates[0].uer == universal_evasion(trained, digits, crafted)
    assert edited.rates[0].uer != edited.rates[1].uer


def test_the_best_of_all_black_and_white_patches_is_found(trained, digits):
    """2 x 2 pixels have 16 of them, of which two are better than all their neighbours."""
    attack = UniversalPatch(area=0.06, probe_starts=0, restarts=4, steps=60, batch_size=64)
    found = attack.craft(trained, digits, seed=1)
    every = torch.tensor([[(k >> bit) & 1 for bit in range(4)] for k in range(16)]).float().view(16, 1, 2, 2)
    few, rates = digits.validation, []
    with Victim(trained) as victim:
        for pattern in every:
            rates.append(score(predict(victim, few, found.placed(pattern[None]), seed=1), few).error)
    ranked, own = sorted(rates), max(rate for _, rate in found.about.restarts)
    assert own == pytest.approx(ranked[-1])
    assert own > ranked[-2] > ranked[0] + 0.05


def test_places_and_starts_follow_the_seed_and_no_restart_depends_on_others(trained, digits):
    attack = UniversalPatch(area=0.1, probe_starts=0, steps=4, scale=(0.8, 1.2), rotation=20)
    one, same, other = (attack.craft(trained, digits, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.pattern, same.pattern)
    assert not torch.equal(one.pattern, other.pattern)
    more = attack.model_copy(update={"restarts": 3}).craft(trained, digits, seed=1)
    assert more.about.restarts[0] == one.about.restarts[0]
    assert len({rate for _, rate in more.about.restarts}) > 1
    assert one.about.backwards == 4 * 32
    through = attack.model_copy(update={"edits": ("jpeg:10",)}).craft(trained, digits, seed=1)
    assert not torch.equal(through.pattern, one.pattern)
    narrow = UniversalPatch(eps=0.3, area=0.1, **FEW).craft(trained, digits)
    assert 0.2 - 1e-6 <= float(narrow.pattern.min()) < 0.3
    assert 0.7 < float(narrow.pattern.max()) <= 0.8 + 1e-6


def test_every_other_random_start_is_a_piece_of_a_training_image_of_the_target_s_class(trained, digits):
    for target in ("class:3", None):
        attack = UniversalPatch(area=0.1, target=target, restarts=5, **FEW | {"steps": 1})
        with as_victim(trained) as victim:
            starts = list(attack._prepare([victim], digits, 0).starts(5, None))
        assert [kind for kind, _ in starts] == ["zero", "sign", "image-piece", "sign", "image-piece"]
        images, labels = digits.train.take(slice(None))
        windows = images.unfold(2, 3, 1).unfold(3, 3, 1)[:, 0]  # (N, 6, 6, 3, 3)
        found = []
        for _, start in starts[2::2]:
            equal = (windows - 0.5 - start[0, 0]).abs().amax((-2, -1)).flatten(1).amin(1) < 1e-6
            found.append(labels[equal])
            assert bool((found[-1] == 3).any()) if target else len(found[-1])
        told = [kind for kind, _ in attack.craft(trained, digits).about.restarts]
        assert told == [kind for kind, _ in starts]
    assert not torch.equal(starts[2][1], starts[4][1])


def test_a_target_counts_images_of_other_classes_alone(trained, digits):
    attack = UniversalPatch(area=0.15, place="corner", target="class:3", **FEW)
    found = attack.craft(trained, digits)
    reached = target_success(trained, digits, found, controls=PATCH_CONTROLS)
    others = int((digits.test.labels != 3).sum())
    assert reached.success.n == others < len(digits.test)
    assert reached.success.low > reached.clean.high
    assert [one.name for one in reached.controls] == list(PATCH_CONTROLS)
    assert reached.success.value > reached.controls[0].success.value
    images, labels = digits.test.take(digits.test.labels != 3)
    with torch.no_grad():
        said = trained(found.apply(images)).argmax(1)
    assert reached.success.value == pytest.approx(float((said == 3).float().mean()))
    # Validation chose by the same rule.
    images, labels = digits.validation.take(slice(None))
    with torch.no_grad():
        said = trained(found.apply(images)).argmax(1)[labels != 3]
    assert max(rate for _, rate in found.about.restarts) == pytest.approx(float((said == 3).float().mean()))
    only = digits.test.subset(digits.test.labels == 3)
    with pytest.raises(UserError, match="every image of .* is of the class '3'"):
        target_success(trained, only, found)


def test_controls_know_nothing_of_the_model_and_have_its_size(digits, crafted):
    x, labels = digits.test.take(slice(None))
    for name, draws in PATCH_CONTROLS.items():
        some = patch_control(name, crafted, digits.test, seed=2)
        assert some.shape == (draws, 1, *crafted.mask.shape[2:])
        assert torch.equal(some, patch_control(name, crafted, digits.test, seed=2))
    assert set(patch_control("random-sign", crafted, digits.test).unique().tolist()) == {0.0, 1.0}
    assert set(patch_control("grey", crafted, digits.test).unique().tolist()) == {0.5}
    height, width = crafted.mask.shape[2:]
    windows = x.unfold(2, height, 1).unfold(3, width, 1).flatten(1, 3)  # (N, places, h, w)

    def classes(pieces):
        return [set(labels[(windows == piece).all(3).all(2).any(1)].tolist()) for piece in pieces[:, 0]]

    for k, found in enumerate(classes(patch_control("image-piece", crafted, digits.test))):
        assert k in found  # one class after another
    about = crafted.about.model_copy(update={"settings": crafted.about.settings | {"target": 7}})
    aimed = AdversarialPatch(crafted.pattern, crafted.mask, crafted.shape, about)
    assert all(7 in found for found in classes(patch_control("image-piece", aimed, digits.test)))
    with pytest.raises(UserError, match="unknown control 'gray': did you mean grey"):
        patch_control("gray", crafted, digits.test)


def test_a_file_holds_all_of_it_and_each_kind_is_refused_as_the_other(crafted, tmp_path):
    crafted.save(tmp_path / "patch.safetensors")
    found = gb.attacks.load(tmp_path / "patch.safetensors")
    assert isinstance(found, AdversarialPatch)
    for name in ("pattern", "mask", "image_hashes"):
        assert torch.equal(getattr(found, name), getattr(crafted, name))
    assert (found.about, found.shape, found.placement) == (crafted.about, crafted.shape, crafted.placement)
    assert repr(found) == repr(crafted)
    assert "square of 4x4 pixels, 25 % of 1x8x8, place random" in repr(found)
    with pytest.raises(UserError, match="holds a patch, and this needs a perturbation in a norm ball"):
        UniversalPerturbation.load(tmp_path / "patch.safetensors")
    ball = UniversalPerturbation(torch.zeros(1, 1, 8, 8), crafted.about)
    ball.save(tmp_path / "ball.safetensors")
    assert type(gb.attacks.load(tmp_path / "ball.safetensors")) is UniversalPerturbation
    with pytest.raises(UserError, match="perturbation of whole images: expected a patch"):
        AdversarialPatch.load(tmp_path / "ball.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"area": 1.5}, "area = 1.5: expected less than or equal to 1"),
        ({"area": 0}, "area = 0: expected greater than 0"),
        ({"area": 0.01}, "area of 0.01 is 0.64 pixels of images of 8x8"),
        ({"area": 0.9, "rotation": 45}, "8x8 pixels, scaled and turned as it may be, takes up to 12x12"),
        ({"area": 0.5, "scale": 2}, "takes up to 12x12, and the images have 8x8"),
        ({"eps": 0.6}, "eps = 0.6: expected less than or equal to 0.5"),
        ({"norm": "2"}, "free under its mask: leave norm out"),
        ({"tile": (2, 2)}, "leave tile out"),
        ({"place": (0, 2)}, r"expected random, corner, or \(y, x\)"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message, trained, digits):
    with pytest.raises(UserError, match=message):
        UniversalPatch(**settings).craft(trained, digits)


def test_what_is_about_norm_balls_refuses_a_patch(trained, digits, crafted):
    for call in (
        lambda: gb.evaluation.eps_uni(trained, digits, UniversalPatch(**FEW, area=0.1), controls=()),
        lambda: gb.evaluation.by_class(trained, digits, crafted),
        lambda: gb.evaluation.strongest(trained, digits.validation, crafted),
        lambda: gb.audit(trained, digits, attacks=[UniversalPatch()]),
        lambda: UniversalPatch().craft_curve(trained, digits, [0.1]),
        lambda: crafted.delta,
    ):
        with pytest.raises(UserError, match="a patch"):
            call()
    with pytest.raises(UserError, match=r"is for images of \(1, 8, 8\)"):
        universal_evasion(trained, (torch.rand(4, 1, 9, 9), torch.zeros(4).long()), crafted)
    start = torch.rand(1, 1, 3, 3, generator=generator(0, "start"))
    kept = UniversalPatch(area=0.1, probe_starts=0, steps=1, rel_step_size=1e-6).craft(trained, digits, start=start)
    assert {kind for kind, _ in kept.about.restarts} == {"zero", "warm"}
    with pytest.raises(UserError, match=r"start has shape \(1, 1, 8, 8\): expected \(1, 1, 3, 3\)"):
        UniversalPatch(area=0.1, **FEW).craft(trained, digits, start=torch.zeros(1, 1, 8, 8))
