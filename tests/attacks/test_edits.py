"""Crafting through edits: none changes nothing, gradients are those of edited images, and what is crafted lasts."""

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import DFUAP, SGA, DataFree, DeepFoolUAP, PerlinNoise, SingularVector, StochasticPGD
from gambeson.attacks.losses import Loss
from gambeson.attacks.universal.context import CraftingContext
from gambeson.base import generator
from gambeson.data import Split
from gambeson.threat.edits import Edit
from gambeson.victim import EditedVictim, Victim, predict, score
from tests.conftest import LinearNet, inner_images

SMALL = [
    StochasticPGD(eps=0.2, steps=6, probe_starts=2, probe_start_steps=3, restarts=1),
    SGA(eps=0.2, steps=2, batch_size=60),
    DFUAP(eps=0.2, steps=4),
    DFUAP(eps=0.2, steps=3, clip=False),
    DeepFoolUAP(eps=0.2, images=30, passes=1, batch_size=10),
    SingularVector(eps=0.2, restarts=1, iterations=2, layers=("body.conv1",)),
    DataFree(eps=0.2, steps=4, check_every=2),
    PerlinNoise(eps=0.2, patterns=6, images=40, finalists=2),
]


@pytest.mark.parametrize("attack", SMALL, ids=lambda attack: f"{attack.name}-{getattr(attack, 'clip', True)}")
def test_every_attack_goes_through_edits_and_the_identity_changes_nothing(attack, trained, digits):
    plain = attack.craft(trained, digits, seed=2)
    same = attack.model_copy(update={"edits": ("none",)}).craft(trained, digits, seed=2)
    assert torch.equal(same.delta, plain.delta)
    assert same.about.restarts == plain.about.restarts
    assert (same.about.forwards, same.about.backwards) == (plain.about.forwards, plain.about.backwards)
    through = attack.model_copy(update={"edits": ("jpeg:10", "blur:1")})
    moved = through.craft(trained, digits, seed=2)
    assert not torch.equal(moved.delta, plain.delta)
    assert torch.equal(moved.delta, through.craft(trained, digits, seed=2).delta)
    assert float(attack.ball.length(moved.delta)) <= 0.2 * (1 + 1e-6)  # before the edit
    assert moved.about.settings["edits"] == ["jpeg:10", "blur:1"]
    # Validation selects by the mean rate over the edits, as they are.
    with Victim(trained) as victim:
        every = [
            score(predict(victim, digits.validation, moved.delta, seed=2, edit=Edit.parse(edit)), digits.validation)
            for edit in through.edits
        ]
    best = max(rate for _, rate in moved.about.restarts)
    assert best == pytest.approx(sum(one.error for one in every) / 2)


def test_the_gradient_through_a_shift_is_the_shifted_gradient():
    weight = torch.randn(2, 1, 6, 7, generator=generator(0, "weight"))
    model, images = LinearNet(weight), inner_images(5, (1, 6, 7))
    labels, seen = torch.zeros(5, dtype=torch.int64), set()
    loss = Loss(kind="margin")  # whose slope is that of the other logit minus the label's
    with Victim(model) as victim:
        for seed in range(30):
            edited = EditedVictim(victim, [Edit.parse("shift:1")], generator(seed, "edits"))
            point = images.clone().requires_grad_()
            slopes = edited.gradient(loss(edited(point), labels).sum(), point, 5)
            for slope in slopes:
                way = next(way for way in WAYS if torch.allclose(slope, moved_back(weight[1] - weight[0], way)))
                seen.add(way)
    assert seen == set(WAYS)
    assert (victim.forwards, victim.backwards) == (150, 150)


WAYS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def moved_back(slope: torch.Tensor, way: tuple[int, int]) -> torch.Tensor:
    """What each pixel adds to the sum of an image that is moved by ``way``, whose edge is repeated, times ``slope``."""
    found = torch.zeros_like(slope)
    for row in range(slope.shape[1]):
        for column in range(slope.shape[2]):
            source = (min(max(row - way[0], 0), 5), min(max(column - way[1], 0), 6))
            found[0, source[0], source[1]] += slope[0, row, column]
    return found


def test_what_is_crafted_through_jpeg_survives_jpeg_better(trained, digits):
    attack = StochasticPGD(eps=1.2, norm="2", steps=100, probe_starts=8, probe_start_steps=40)
    harm = {}
    for edits in ((), ("jpeg:5",)):
        uap = attack.model_copy(update={"edits": edits}).craft(trained, digits)
        found = gb.evaluation.under_edits(trained, digits, uap, ["jpeg:5"], controls=())
        harm[edits] = {one.edit: one.harm.value for one in found.rates}
    assert harm["jpeg:5",]["jpeg:5"] > harm[()]["jpeg:5"] + 0.03
    assert harm["jpeg:5",]["none"] < harm[()]["none"]


def test_the_best_perturbation_through_jpeg_of_a_linear_model():
    """Most of the weight is of the highest frequency, of which JPEG leaves nothing: plain crafting follows it."""
    steps = torch.arange(8.0)
    fine = 0.2 * (-1) ** (steps[:, None] + steps[None])
    coarse = torch.where(steps < 4, 0.05, -0.05).expand(8, 8)
    model = LinearNet(torch.stack([torch.zeros(8, 8), fine + coarse])[:, None])
    images = inner_images(90, (1, 8, 8))
    labels = torch.zeros(90, dtype=torch.int64)
    labels[::2] = 1
    data = (images, labels)
    attack = StochasticPGD(eps=0.1, steps=20, probe_starts=0, target=1, tau=1.0, temperature=1)
    plain = attack.craft(model, data).delta[0, 0]
    torch.testing.assert_close(plain, 0.1 * fine.sign())
    through = attack.model_copy(update={"edits": ("jpeg:10",), "steps": 40}).craft(model, data).delta[0, 0]
    agreement = (through.sign() == coarse.sign()).float().mean()
    assert agreement > 0.9


def test_edits_of_several_models_and_of_several_draws(trained, digits):
    attack = StochasticPGD(eps=0.2, steps=5, probe_starts=0, edits=("shift:1", "none"))
    once = attack.craft(trained, digits)
    several = attack.model_copy(update={"eot_samples": 3}).craft(trained, digits)
    assert several.about.backwards == 3 * once.about.backwards == 3 * 5 * 32
    pair = attack.craft([trained, trained], digits)
    assert pair.about.backwards == 2 * once.about.backwards


def test_labels_that_are_predictions_are_those_of_images_without_edits(trained, digits):
    with Victim(trained) as victim:
        context = CraftingContext(
            victims=[victim], train=digits.train, validation=digits.validation, ball=SMALL[0].ball, seed=0,
            predicted_labels=True, edits=(Edit.parse("blur:4"),),
        )  # fmt: skip
        images, labels, _ = next(context.batches(64, 0))
        seen = context.targets(images, labels)
        assert torch.equal(seen, victim(images).argmax(1))
        assert not torch.equal(seen, context.averaged(images).argmax(1))


def test_patterns_are_searched_by_their_mean_rate_over_the_edits(trained, digits):
    attack = PerlinNoise(eps=0.2, patterns=6, images=40, finalists=2, edits=("jpeg:10", "blur:1"))
    plain = attack.model_copy(update={"edits": ()})
    forwards = {one: one.craft(trained, digits).about.forwards for one in (attack, plain)}
    assert forwards[attack] == 2 * forwards[plain] == attack.asked(digits) == 2 * plain.asked(digits)


def test_what_cannot_go_through_edits_is_refused(trained, digits):
    with pytest.raises(UserError, match=r"unknown edit 'jpg'"):
        StochasticPGD(eps=0.1, edits=("jpg:50",))
    with pytest.raises(UserError, match=r"edit colour:0.1 does not fit digits/train: images of one channel"):
        StochasticPGD(eps=0.1, edits=("colour:0.1",)).craft(trained, digits)
    pixels = torch.rand(20, 3, 8, 8, generator=generator(0, "pixels"))
    maps = Split("maps", pixels, pixels[:, 0].round().long(), ("a", "b"))
    net = torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(UserError, match="edit shift:1 does not fit .* it moves what is in an image"):
        StochasticPGD(eps=0.1, edits=("shift:1",)).craft(net, maps)
    assert StochasticPGD(eps=0.1, steps=2, probe_starts=0, edits=("blur:1",)).craft(net, maps).delta.any()
    box = gb.evaluation.FunctionModel(trained)
    with pytest.raises(UserError, match="StochasticPGD needs"):
        StochasticPGD(eps=0.1, edits=("jpeg:50",)).craft(box, digits)


def test_every_edit_is_drawn_equally_often(trained, digits):
    images = digits.train.take(slice(0, 1))[0]
    with Victim(trained) as victim, torch.no_grad():
        edits = [Edit.parse(text) for text in ("none", "blur:4", "gamma:0.5")]
        known = [victim(edit(images, edit.draw(1, 1, generator(0, "edit")))) for edit in edits]
        assert not torch.allclose(known[0], known[2])
        edited, counts = EditedVictim(victim, edits, generator(0, "edits")), [0, 0, 0]
        for _ in range(300):
            logits = edited(images)
            counts[next(k for k, one in enumerate(known) if torch.allclose(one, logits, atol=1e-4))] += 1
    assert min(counts) > 75
