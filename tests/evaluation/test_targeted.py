"""Success of targets on label maps: against loops, against chance, and beside its controls."""

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import CONTROLS, StochasticPGD, UniversalPerturbation
from gambeson.evaluation import Rate, TargetMeasure, eps_uni, target_success
from gambeson.evaluation.targeted import SHUFFLED, Goal, TargetControl, TargetSuccess
from tests.attacks.test_targets import IGNORED, dataset, four_classes

FAST = {"eps": 0.3, "steps": 40, "batch_size": 10, "probe_starts": 0}


@pytest.fixture(scope="module")
def scenes():
    model, x, y = four_classes(150, (6, 6))
    y[:, 0, :3] = IGNORED
    y[::10] = IGNORED
    return model, dataset(x, y, tuple("abcd"))


def crafted(scenes, target, **settings):
    return StochasticPGD(target=target, **FAST | settings).craft(*scenes)


@pytest.mark.parametrize("target", ["static:3", "hide:c", "hide:2", 1])
def test_a_perturbation_that_does_nothing_reaches_the_target_as_often_as_chance(scenes, target):
    model, data = scenes
    uap = crafted(scenes, target, steps=1)
    nothing = UniversalPerturbation(torch.zeros_like(uap.delta), uap.about, target_map=uap.target_map)
    found = target_success(model, data, nothing, controls=CONTROLS)
    assert found.success == found.clean
    labels = data.test.labels[data.test.task.labelled(data.test.labels)]
    shares = labels[labels != IGNORED].bincount(minlength=4) / (labels != IGNORED).sum()
    if isinstance(target, int):
        assert found.success.value == pytest.approx(float(shares[1]))
    elif target == "static:3":
        assert found.success.value == pytest.approx(0.25, abs=0.05)
    else:
        assert (found.hidden.value, found.kept.value, found.score) == (0, 1, 0.5)
        assert found.success.value == pytest.approx(1 - float(shares[2]))
    shuffled = [one for one in found.controls if one.name == SHUFFLED]
    if isinstance(target, int):
        assert not shuffled
    else:  # the maps of two images agree as often as draws of their classes
        assert shuffled[0].success.low < 0.3 < shuffled[0].success.high + 0.1
        assert shuffled[0].draws == shuffled[0].success.candidates == 10


def test_rates_are_those_of_a_loop_over_pixels(scenes):
    model, data = scenes
    uap = crafted(scenes, "hide:c", omega=0.6, steps=8, eps=0.2)
    found = target_success(model, data, uap)
    x, y = data.test.take(slice(None))
    before, after = model(x).argmax(1), model((x + uap.delta).clamp(0, 1)).argmax(1)
    targets, hidden = uap.target.model_copy(update={"value": "2"}).reach(before, y != IGNORED)
    reached, total, gone, there, same, others = 0, 0, 0, 0, 0, 0
    for n in range(len(x)):
        for i in range(6):
            for j in range(6):
                if y[n, i, j] == IGNORED:
                    continue
                total += 1
                reached += int(after[n, i, j] == targets[n, i, j])
                there += int(hidden[n, i, j])
                gone += int(hidden[n, i, j] and after[n, i, j] != 2)
                others += int(not hidden[n, i, j])
                same += int(not hidden[n, i, j] and after[n, i, j] == before[n, i, j])
    assert 0 < gone < there
    assert found.success.value == reached / total
    assert found.hidden.value == gone / there
    assert found.kept.value == same / others
    assert found.score == pytest.approx((gone / there + same / others) / 2)
    assert found.success.n == 45  # images with a label
    with gb.victim.Victim(model) as victim:
        hits = TargetMeasure("hide:c")(victim, data.test, uap.delta)
    assert hits.error == pytest.approx(found.score)
    assert hits.images == 45


@pytest.mark.parametrize("target", ["hide:c", 1])
def test_a_measure_that_is_used_on_several_models_holds_each_against_its_own_predictions(scenes, target):
    model, data = scenes
    with torch.no_grad():
        other, _, _ = four_classes()
        other.weight.copy_(other.weight.roll(1, 0))
        other.bias.copy_(other.bias.roll(1))
    measure, delta = TargetMeasure(target), torch.full((1, 3, 1, 1), 0.1).expand(1, 3, 6, 6)
    for one in (model, other, model):
        with gb.victim.Victim(one) as victim:
            for moved in (None, delta):
                assert measure(victim, data.test, moved).error == TargetMeasure(target)(victim, data.test, moved).error


@pytest.mark.parametrize(("target", "settings"), [("static:3", {}), ("hide:c", {"omega": 0.75}), (1, {})])
def test_a_crafted_perturbation_beats_every_control(scenes, target, settings):
    model, data = scenes
    uap = crafted(scenes, target, **settings)
    found = target_success(model, data, uap, controls=CONTROLS)
    names = [one.name for one in found.controls]
    assert names == [*CONTROLS, SHUFFLED][: 3 if isinstance(target, str) else 2]
    assert found.score > max(one.score for one in found.controls) + 0.2
    assert found.success.low > found.clean.high or target == "hide:c"
    if target == "static:3":
        assert found.success.low > max(one.success.high for one in found.controls)
    assert found.score == pytest.approx(max(rate for _, rate in uap.about.restarts), abs=0.1)


def test_validation_selects_by_what_is_reported(scenes):
    model, data = scenes
    uap = crafted(scenes, "hide:c", omega=0.75, restarts=3, steps=5)
    again = target_success(model, data.validation, uap)
    assert again.score == pytest.approx(max(rate for _, rate in uap.about.restarts))
    static = crafted(scenes, "static:3", restarts=3, steps=5)
    assert target_success(model, data.validation, static).success.value == pytest.approx(
        max(rate for _, rate in static.about.restarts)
    )


def test_the_share_of_the_truth_is_hidden_where_the_truth_was_asked_for(scenes):
    model, data = scenes
    wrong = torch.nn.Sequential(model, torch.nn.Identity())
    uap = crafted((wrong, data), "hide:c", labels="truth", steps=3)
    other = dataset(data.test.images.repeat(3, 1, 1, 1), data.test.labels.roll(1, 1).repeat(3, 1, 1), tuple("abcd"))
    found = target_success(wrong, other.test, uap)
    x, y = other.test.take(slice(None))
    after = model((x + uap.delta).clamp(0, 1)).argmax(1)
    assert found.hidden.value == pytest.approx(float((after[y == 2] != 2).float().mean()))


def test_targets_of_classification_count_images(trained, digits):
    uap = StochasticPGD(eps=0.3, steps=20, probe_starts=0, target=3).craft(trained, digits)
    found = target_success(trained, digits, uap, controls=CONTROLS)
    x, _ = digits.test.take(slice(None))
    hits = trained((x + uap.delta).clamp(0, 1)).argmax(1) == 3
    assert found.success == gb.evaluation.Rate.of(int(hits.sum()), len(x))
    assert found.clean.value == pytest.approx(float((trained(x).argmax(1) == 3).float().mean()))
    assert found.hidden is found.kept is None
    assert found.success.low > max(one.success.high for one in found.controls)


@pytest.mark.parametrize("target", ["static:3", "hide:c"])
def test_shuffled_maps_are_those_of_other_images_and_leave_ignored_pixels_out(scenes, target):
    model, data = scenes
    uap, ignored = crafted(scenes, target, steps=1), data.test.labels == IGNORED
    with gb.victim.Victim(model) as victim:
        goal = Goal.of(victim, data.test, uap.target)
        others = goal.shuffled(10, 0)
    assert len(others) == 10
    for other in others:
        assert bool((other.targets[ignored] == -1).all())
        assert not torch.equal(other.targets, goal.targets)
        if target == "hide:c":
            rows = [k for k in range(50) if not bool(ignored[k].all())]
            assert not any(torch.equal(other.targets[k], goal.targets[k]) for k in rows)
            both = ~ignored[0] & (other.targets[0] >= 0)
            assert any(torch.equal(other.targets[0][both], goal.targets[k][both]) for k in range(1, 50))


def test_what_cannot_be_scored_is_refused(scenes):
    model, data = scenes
    with pytest.raises(UserError, match="has no target: score it by universal_evasion"):
        target_success(model, data, crafted(scenes, None, steps=1))
    hide = crafted(scenes, "hide:c", steps=1)
    other = dataset(data.test.images.repeat(3, 1, 1, 1), data.test.labels.repeat(3, 1, 1), tuple("abef"))
    with pytest.raises(UserError, match="unknown class 'c'"):
        target_success(model, other, hide)
    with gb.victim.Victim(model) as victim, pytest.raises(UserError, match="target static:3 is an image of validation"):
        TargetMeasure("static:3")(victim, data.test, None)


@pytest.mark.filterwarnings("ignore:.* have no label that counts")
def test_a_class_to_hide_that_is_nowhere_is_refused(scenes):
    model, data = scenes
    shown = model(data.test.take(slice(None))[0]).argmax(1) == 2
    labels = data.test.labels.where(~shown, IGNORED)
    test = gb.data.Split("maps/test", data.test.images, labels, data.classes, ignore_index=IGNORED)
    with pytest.raises(UserError, match="is predicted 'c': nothing can be hidden"):
        target_success(model, test, crafted(scenes, "hide:c", steps=1))
    without = gb.data.Dataset("s", data.train, data.validation, test, data.classes)
    with pytest.raises(UserError, match="is predicted 'c': nothing can be hidden"):
        eps_uni(model, without, StochasticPGD(target="hide:c", **FAST), delta=0.9)


@pytest.mark.parametrize(("target", "delta"), [("hide:c", 0.5), ("static:3", 0.1)])
def test_eps_uni_is_not_zero_because_clean_images_reach_the_target_as_far(scenes, target, delta):
    model, data = scenes
    with pytest.raises(UserError, match=f"delta = {delta}, but clean images reach target {target} by 0."):
        eps_uni(model, data, StochasticPGD(target=target, **FAST), delta=delta)


def test_a_rival_reaches_as_much_of_the_same_thing():
    def rate(hits):
        return Rate.of(hits, 100)

    def found(success, hidden, kept, control):
        return TargetSuccess(
            success=rate(success), hidden=rate(hidden), kept=rate(kept), clean=rate(90), controls=(control,)
        )

    chance = TargetControl(name=SHUFFLED, draws=10, success=rate(70))
    noise = TargetControl(name="chessboard", draws=1, success=rate(80), hidden=rate(80), kept=rate(40))
    assert found(95, 30, 98, chance).rival is None  # a score of 0.64, but a success of 0.95 against 0.7
    assert found(69, 90, 90, chance).rival is chance
    assert found(95, 30, 98, noise).rival is None
    assert found(95, 30, 88, noise).rival is noise
