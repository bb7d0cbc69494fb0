"""Objectives against hand-computed formulas, and the identities that tie them to one another."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import gambeson as gb
from gambeson import UserError
from gambeson.defenses import Adversarial, Batch, PGDAdversarial, SharedAdversarial, Standard
from gambeson.threat import perturb
from tests.conftest import binary, inner_images


def batch_of(count=12, shape=(1, 4, 4), seed=0):
    return Batch(images=inner_images(count, shape), labels=torch.arange(count) % 2, seed=seed)


def test_sharedness_one_is_per_image_pgd_training_bit_for_bit(digits):
    weights = []
    for defense in (
        PGDAdversarial(eps=0.1),
        SharedAdversarial(eps=0.1, sharedness=1, sigma=1, truncate=None),
    ):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_sigma_zero_is_standard_training_bit_for_bit_and_sigma_matters(digits):
    weights = []
    for defense in (
        Standard(),
        SharedAdversarial(eps=0.1, sharedness=8, sigma=0),
        SharedAdversarial(eps=0.1, sharedness=8, sigma=0.5),
    ):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        gb.train(model, digits, defense, epochs=1, batch_size=64, seed=3)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_objective_is_the_paper_s_formula():
    model, _ = binary((1, 4, 4))
    batch = batch_of(12)
    defense = SharedAdversarial(eps=0.1, sharedness=4, sigma=0.3)
    heaps, _ = defense.terms()["adversarial"][1], None
    delta = heaps.craft(model, batch)
    assert delta.shape == (3, 1, 4, 4)
    moved = perturb(batch.images, delta)
    by_hand = 0.3 * F.cross_entropy(model(moved), batch.labels) + 0.7 * F.cross_entropy(
        model(batch.images), batch.labels
    )
    found = defense.losses(model, batch)
    torch.testing.assert_close(found["loss"], by_hand)
    assert set(found) == {"loss", "adversarial", "clean"}
    found["loss"].backward()
    assert model.weight.grad.abs().sum() > 0


OTHERS = {
    "eps": 0.3,
    "norm": "2",
    "sharedness": 3,
    "steps": 6,
    "rel_step_size": 0.7,
    "truncate": 1.1,
    "attack_bn": "batch",
    "craft_precision": "bfloat16",
    "label_smoothing": 0.2,
    "noise": 0.02,
    "target": "truth",
    "tau": 0.6,
}


@pytest.mark.parametrize("kind", [PGDAdversarial, SharedAdversarial, gb.defenses.Trades, gb.defenses.PNI])
def test_every_setting_of_the_inner_attack_arrives_there(kind):
    """None of these is a default: a setting that is not handed on shows."""
    given = {name: value for name, value in OTHERS.items() if name in kind.model_fields}
    terms = [term for _, term in kind(**given).terms().values()]
    (inner,) = [getattr(term, "attack", term) for term in terms if hasattr(getattr(term, "attack", term), "craft")]
    found = {name: getattr(inner, name.removeprefix("craft_")) for name in given if name != "label_smoothing"}
    assert found == {name: value for name, value in given.items() if name != "label_smoothing"}
    if "label_smoothing" in given:
        assert all(term.label_smoothing == 0.2 for term in terms if hasattr(term, "label_smoothing"))


def test_label_smoothing_is_of_both_outer_losses_and_of_no_inner_one():
    model, _ = binary((1, 4, 4))
    batch = batch_of(12)
    plain, smooth = (SharedAdversarial(eps=0.1, sharedness=4, sigma=0.3, label_smoothing=q) for q in (0.0, 0.2))
    delta = plain.terms()["adversarial"][1].craft(model, batch)
    assert torch.equal(smooth.terms()["adversarial"][1].craft(model, batch), delta)
    expected = {
        "adversarial": F.cross_entropy(model(perturb(batch.images, delta)), batch.labels, label_smoothing=0.2),
        "clean": F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.2),
    }
    found = smooth.losses(model, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())
    assert not torch.isclose(found["loss"], plain.losses(model, batch)["loss"])


def test_a_heap_as_large_as_the_batch_is_one_perturbation_for_all():
    model, _ = binary((1, 4, 4))
    batch = batch_of(12)
    delta = Adversarial(eps=0.1, sharedness=12).craft(model, batch)
    assert delta.shape == (1, 1, 4, 4)
    assert float(delta.abs().max()) == pytest.approx(0.1)
    with pytest.raises(UserError, match="sharedness 5 does not divide the batch size 12"):
        Adversarial(eps=0.1, sharedness=5).craft(model, batch)
    with pytest.raises(UserError, match="sharedness 64 does not divide the batch size 100: choose .* such as 128"):
        SharedAdversarial(eps=0.1).check(100)
    SharedAdversarial(eps=0.1, sigma=0).check(100)


def test_four_steps_of_half_eps_reach_the_vertex_from_any_start():
    model, w = binary((3, 5, 7))
    x = inner_images(6, (3, 5, 7))
    for label in (0, 1):
        y = torch.full((6,), label)
        for sharedness in (1, 3, 6):
            batch = Batch(images=x, labels=y, seed=label)
            delta = Adversarial(eps=0.1, sharedness=sharedness).craft(model, batch)
            vertex = 0.1 * w.sign() * (1 - 2 * label)
            torch.testing.assert_close(delta, vertex.expand_as(delta))


def heap_risk(model, x, y, sharedness, eps, w):
    """Exact: the loss of a heap is convex in w . delta, so one of its two ends is the maximum."""
    ends = []
    for sign in (1, -1):
        loss = F.cross_entropy(model(x + sign * eps * w.sign()), y, reduction="none")
        ends.append(loss.unflatten(0, (-1, sharedness)).mean(1))
    return float(torch.stack(ends).amax(0).mean())


def crafted_risk(model, x, y, sharedness, eps):
    best = None
    for seed in range(6):
        delta = Adversarial(eps=eps, sharedness=sharedness).craft(model, Batch(images=x, labels=y, seed=seed))
        loss = F.cross_entropy(model(x + delta.repeat_interleave(sharedness, 0)), y, reduction="none")
        heap = loss.unflatten(0, (-1, sharedness)).mean(1)
        best = heap if best is None else torch.maximum(best, heap)
    return float(best.mean())


def test_risk_hierarchy_holds_exactly_and_crafting_attains_it():
    model, w = binary((1, 4, 4))
    x, eps = inner_images(16, (1, 4, 4)), 0.05
    y = (torch.rand(16, generator=torch.Generator().manual_seed(1)) < 0.5).long()
    with torch.no_grad():
        clean = float(F.cross_entropy(model(x), y))
        risks = [heap_risk(model, x, y, s, eps, w) for s in (16, 8, 4, 2, 1)]  # universal ... per image
        assert clean <= risks[0]
        assert all(a <= b + 1e-7 for a, b in itertools.pairwise(risks))
        assert risks[0] < risks[-1]
        for s, exact in zip((16, 8, 4, 2, 1), risks, strict=True):
            assert crafted_risk(model, x, y, s, eps) == pytest.approx(exact, rel=1e-5)


def test_truncation_sends_the_budget_to_those_not_yet_fooled():
    model, w = binary((1, 4, 4))
    # Nine images far on the wrong side, one on the right side of the other class: without truncation the nine win.
    x = inner_images(10, (1, 4, 4))
    z = model(x).diff(dim=1).flatten().detach()
    y = torch.ones(10, dtype=torch.long)
    with torch.no_grad():
        model.bias += torch.tensor([3.0 + float(z.max()), 0.0])  # all are taken for class 0, y = 1 is fooled already
    y[0] = 0
    batch = Batch(images=x, labels=y, seed=0)
    toward_one = 0.1 * w.sign()
    full = Adversarial(eps=0.1, sharedness=10, truncate=None, start="zero").craft(model, batch)
    cut = Adversarial(eps=0.1, sharedness=10, truncate=-math.log(0.2), start="zero").craft(model, batch)
    torch.testing.assert_close(full[0], -toward_one)
    torch.testing.assert_close(cut[0], toward_one)


@pytest.mark.parametrize(("probability", "counts"), [(0.8, True), (0.4, True), (0.25, True), (0.15, False)])
def test_an_image_counts_until_its_label_s_probability_is_below_a_fifth(probability, counts):
    """The default of shared training: nine images of class 0 at this probability against one of class 1 at 0.6."""
    model, w = binary((1, 4, 4))
    x = inner_images(1, (1, 4, 4)) + 0 * inner_images(10, (1, 4, 4))
    model.bias.data[:] = -model(x[:1]).detach()[0]  # both classes at 0.5
    shift = torch.full((10,), -math.log(probability / (1 - probability)))
    y = torch.zeros(10, dtype=torch.long)
    y[0], shift[0] = 1, math.log(0.6 / 0.4)
    x = x + (shift / w.square().sum()).view(-1, 1, 1, 1) * w
    torch.testing.assert_close(F.cross_entropy(model(x[1:]), y[1:]), torch.tensor(-math.log(probability)))
    eps = 0.02 / float(w.abs().sum())  # no probability moves far
    term = SharedAdversarial(eps=eps, sharedness=10).terms()["adversarial"][1]
    delta = term.craft(model, Batch(images=x, labels=y, seed=0))
    torch.testing.assert_close(delta[0], (1 if counts else -1) * eps * w.sign())


def test_crafting_leaves_the_model_in_training_with_its_statistics(digits):
    model = gb.models.create("resnet20x0.25", in_channels=1, classes=10, image_size=8)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = digits.train.take(slice(0, 8))
    Adversarial(eps=0.1, sharedness=4).craft(model, Batch(images=x, labels=y, seed=0))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def with_batch_norm(dropout=0.0):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean.fill_(0.2)
    norm.running_var.fill_(3.0)
    conv = torch.nn.Conv2d(1, 1, 3)
    return torch.nn.Sequential(
        conv, norm, torch.nn.Dropout(dropout), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).train()


def hand_crafted(model, batch, steps, eps):
    """Heaps of 4 by plain PyTorch on the model in whatever mode it is."""
    delta = torch.zeros(len(batch.images) // 4, *batch.images.shape[1:])
    for _ in range(steps):
        moved = batch.images + delta.repeat_interleave(4, 0)
        point = moved.clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), batch.labels, reduction="sum"), point)
        inside = (moved >= 0) & (moved <= 1)  # a pixel that the clip holds does not move its image
        heap = (gradient * inside).unflatten(0, (-1, 4)).sum(1)
        delta = (delta + 0.5 * eps * heap.sign()).clamp(-eps, eps)
    return delta


@pytest.mark.parametrize("attack_bn", ["eval", "batch", "train"])
def test_crafting_takes_the_statistics_it_is_told_to(attack_bn):
    model = with_batch_norm()
    x = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    x[:, :, 0], x[:, :, 1] = 0, 1
    batch = Batch(images=x, labels=torch.arange(8) % 3, seed=0)
    twin = copy.deepcopy(model)
    expected = hand_crafted(twin.train(attack_bn != "eval"), batch, 3, 0.2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    term = Adversarial(eps=0.2, sharedness=4, steps=3, start="zero", attack_bn=attack_bn)
    torch.testing.assert_close(term.craft(model, batch), expected)
    others = [Adversarial(**{**term.plain(), "attack_bn": other}) for other in ("eval", "batch") if other != attack_bn]
    assert any(not torch.allclose(other.craft(model, batch), expected) for other in others)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model[1].track_running_stats
    after = twin.state_dict() if attack_bn == "train" else before
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, after[key])


def test_a_batch_norm_that_is_held_stays_held_and_dropout_is_on_in_training_mode_only():
    model = with_batch_norm(0.5)
    batch = batch_of(8, (1, 6, 6))

    def craft(mode):
        torch.manual_seed(len(mode))
        return Adversarial(eps=0.2, sharedness=4, attack_bn=mode, steps=1).craft(model, batch)

    assert torch.equal(craft("batch"), craft("batch"))
    assert not torch.equal(
        craft("train"), Adversarial(eps=0.2, sharedness=4, attack_bn="train", steps=1).craft(model, batch)
    )
    model[1].eval()
    assert torch.allclose(craft("batch"), craft("eval"))
    assert not model[1].training
    for kind in (SharedAdversarial, PGDAdversarial):
        assert kind(eps=0.1, attack_bn="batch").terms()["adversarial"][1].attack_bn == "batch"
        assert kind(eps=0.1).terms()["adversarial"][1].attack_bn == "eval"


CRAFTING = {
    "pgd": PGDAdversarial(eps=0.2),
    "shared": SharedAdversarial(eps=0.2, sharedness=4),
    "shared, batch statistics": SharedAdversarial(eps=0.2, sharedness=4, attack_bn="batch"),
    "trades": gb.defenses.Trades(eps=0.2, steps=2),
    "ensemble-adversarial": gb.defenses.create("ensemble-adversarial", eps=0.2, attack="r-fgsm"),
}


@pytest.mark.parametrize("name", CRAFTING)
def test_a_low_precision_recipe_crafts_in_float32(name, digits):
    torch.manual_seed(0)
    model = gb.models.create("resnet20x0.25", in_channels=1, classes=10, image_size=8).train()
    x, y = digits.train.take(slice(0, 16))
    batch = Batch(images=x, labels=y, seed=0)
    terms = CRAFTING[name].terms()
    (term,) = [term for _, term in terms.values() if hasattr(term, "craft")]
    plain = term.craft(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(model)(x).dtype == torch.bfloat16
        assert torch.equal(term.craft(model, batch), plain)
    if name in ("pgd", "shared"):
        low = CRAFTING[name].model_copy(update={"craft_precision": "bfloat16"}).terms()["adversarial"][1]
        assert low.precision == "bfloat16"
        assert not torch.equal(low.craft(model, batch), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(low.craft(model, batch), low.craft(model, batch))


def test_a_whole_training_in_bfloat16_crafts_what_float32_would(digits, monkeypatch):
    """Through the loop: the perturbations of the first step, on the same weights, are the same bits."""
    seen = {}
    craft = Adversarial.craft

    def watched(self, model, batch):
        delta = craft(self, model, batch)
        seen.setdefault(torch.is_autocast_enabled("cpu"), delta)
        return delta

    monkeypatch.setattr(Adversarial, "craft", watched)
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(3)
        model = gb.models.create("lenet5", digits)
        few = digits.train.subset(torch.arange(128))
        gb.train(
            model, few, SharedAdversarial(eps=0.1, sharedness=8), epochs=1, batch_size=32, seed=3, precision=precision
        )
    assert set(seen) == {False, True}
    assert torch.equal(seen[False], seen[True])


PUBLISHED = {
    "shared-adversarial": {"steps": 4, "rel_step_size": 0.5, "truncate": -math.log(0.2), "label_smoothing": 0.0},
    "trades": {"beta": 6.0, "steps": 10, "rel_step_size": 0.25, "noise": 0.001},
    "ensemble-adversarial": {"attack": "fgsm", "start_size": 0.5, "label": "prediction", "mixing": "both"},
    "universal-adversarial": {"rel_step_size": 1.0, "sigma": 1.0, "classwise": False},
    "jacobian": {"estimator": "projection", "n_proj": 1, "share": 1.0, "every": 1},
    "learn2perturb": {
        "gamma": 1e-4,
        "init": 0.25,
        "floor": 0.01,
        "steps": 7,
        "rel_step_size": 0.01 * 255 / 8,
        "mix": 0.5,
    },
    "pni": {"init": 0.25, "steps": 7, "rel_step_size": 0.01 / 0.031, "mix": 0.5},
    "rse": {"first": 0.2, "rest": 0.1},
    "adp": {"members": 3, "alpha": 2.0, "beta": 0.5},
    "gal": {"members": 3, "strength": 0.5},
    "trs": {"members": 3, "scale": 5.0, "alignment": 2.0, "smoothness": 2.0, "steps": 6},
}
OURS = {
    "universal-adversarial": {"truncate": 9.0, "start": "zero", "update": "alternating"},
    "jacobian": {"strength": 0.01, "space": "pixel"},
    "jacobian-ensemble": {"strength": 0.01, "members": 5, "average": "probabilities"},
    "universal-consistency": {"bank": 8, "beta": 4.0, "warmup": 0.5, "rel_step_size": 0.25},
}


@pytest.mark.parametrize(("name", "values"), [*PUBLISHED.items(), *OURS.items()])
def test_defaults_are_those_of_the_paper_or_its_code_and_ours_do_not_drift(name, values):
    given = {"eps": 0.1} if gb.defenses.entry(name).needs("eps") else {}
    settings = gb.defenses.create(name, **given).plain()
    assert {key: settings[key] for key in values} == pytest.approx(values)


def test_trades_starts_a_thousandth_off_the_image():
    model, _ = binary((1, 20, 20))
    batch = batch_of(12, (1, 20, 20))
    term = gb.defenses.Trades(eps=0.1, steps=1, rel_step_size=1e-9).terms()["divergence"][1]
    assert float(term.craft(model, batch).std()) == pytest.approx(0.001, rel=0.05)


def test_names_settings_and_mistakes():
    assert gb.defenses.create("shared-adversarial", eps="8/255").eps == 8 / 255
    assert set(gb.defenses.names()) >= {"standard", "pgd-adversarial", "shared-adversarial"}
    with pytest.raises(UserError, match="unknown defence 'shared': did you mean shared-adversarial"):
        gb.defenses.create("shared")
    with pytest.raises(TypeError, match="needs eps"):
        gb.defenses.create("pgd-adversarial")
    with pytest.raises(UserError, match="sigma = 1.5"):
        SharedAdversarial(eps=0.1, sigma=1.5)
    with pytest.raises(TypeError, match="no setting 'heap': "):
        SharedAdversarial(eps=0.1, heap=3)


def test_a_user_s_own_defence_is_a_few_lines(digits):
    from gambeson.defenses import Clean, Defense

    class LogitPenalty(Defense):
        def terms(self):
            return {
                "clean": (1.0, Clean()),
                "size": (0.1, lambda model, batch: model(batch.images).square().mean()),
            }

    torch.manual_seed(0)
    model = gb.models.create("lenet5", digits)
    history = gb.train(model, digits, LogitPenalty(), epochs=2, batch_size=64)
    assert history[1]["loss"] == pytest.approx(history[1]["clean"] + 0.1 * history[1]["size"], rel=1e-4)
