"""Auto-PGD against formulas, and against PGD at the same cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gambeson as gb
from gambeson import UserError
from gambeson.attacks.gradient.auto_pgd import AutoPGD, TargetedAutoPGD
from gambeson.attacks.gradient.pgd import PGD
from gambeson.tasks import Segmentation
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.attacks.optima import best_gain
from tests.conftest import LinearNet, binary, inner_images


def left(model, attack, x, y, seed=0):
    """How many images are still right."""
    with torch.no_grad():
        return int((model(attack(model, x, y, seed=seed)).argmax(1) == y).sum())


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 7)])
@pytest.mark.parametrize(("norm", "eps"), [("inf", 0.3), ("2", 0.5), ("2", 2.0), ("1", 0.3), ("1", 1.5)])
@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_reaches_the_optimum_of_a_linear_model_where_the_box_binds(shape, norm, eps, loss):
    model, w = binary(shape)
    x, y = torch.rand(7, *shape, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 2
    x[x < 0.3], x[x > 0.7] = 0, 1
    with torch.no_grad():
        model.weight *= 10 / w.abs().sum()  # cross-entropy has no gradient left at margins above 17
        x_adv = AutoPGD(eps=eps, norm=norm, loss=loss, early_stop=False)(model, x, y)
        grown = ((model(x_adv) - model(x)).diff(dim=1).flatten() * (1 - 2 * y)).double()
    best = best_gain(w * 10 / w.abs().sum(), x, y, eps, norm)
    assert (grown >= 0.99 * best).all()
    assert (grown <= best * (1 + 1e-4)).all()


def test_checkpoints_are_the_paper_s():
    assert AutoPGD(eps=0.1).checkpoints == [22, 41, 57, 70, 80, 87, 93, 99]
    assert AutoPGD(eps=0.1, steps=1).checkpoints == [1]


@pytest.mark.parametrize(("norm", "eps"), [("inf", 0.1), ("2", 0.6), ("1", 1.0)])
@pytest.mark.parametrize("loss", ["cross-entropy", "dlr"])
def test_at_least_as_strong_as_pgd_with_as_many_steps_on_a_trained_net(norm, eps, loss, trained, digits):
    x, y = digits.test.take(slice(0, 150))

    def total(attack):
        return sum(left(trained, attack, x, y, seed) for seed in range(2))

    pgd = total(PGD(eps=eps, norm=norm, steps=25, loss=loss))
    assert 40 < pgd < 260  # neither too easy nor too hard to tell attacks apart
    assert total(AutoPGD(eps=eps, norm=norm, steps=25, loss=loss)) <= pgd + 3  # one per cent of the images


def test_targets_find_what_no_single_climb_does(trained, digits):
    x, y = digits.test.take(slice(0, 100))
    many = left(trained, TargetedAutoPGD(eps=0.1, steps=10), x, y)
    assert many <= left(trained, AutoPGD(eps=0.1, steps=10, loss="dlr"), x, y)
    assert many <= left(trained, TargetedAutoPGD(eps=0.1, steps=10, targets=1), x, y)


class Decoy(torch.nn.Module):
    """Two pixels. Class 1 looks likeliest after class 0 and gains nothing; of classes 2 to 4 only 4 can be reached."""

    def forward(self, x):
        a, b = x.flatten(1).T
        base = torch.zeros_like(a)
        return torch.stack([base, base - 0.1 + 0.01 * a, -0.2 + 0.2 * a, -0.4 + 0.2 * b, -0.58 + 1.5 * b], 1)


def test_probes_find_the_target_that_counts_at_the_documented_cost():
    x, y = torch.full((3, 1, 1, 2), 0.2), torch.zeros(3, dtype=torch.long)
    settings = {"eps": 0.2, "steps": 12, "loss": "margin"}
    assert left(Decoy(), TargetedAutoPGD(**settings, targets=2), x, y) == 3
    assert left(Decoy(), TargetedAutoPGD(**settings, targets=1, probe_steps=4), x, y) == 3
    assert left(Decoy(), TargetedAutoPGD(**settings, probe_steps=4, targets_kept=1), x, y) == 0
    with Victim(Decoy()) as victim:  # nothing falls: 4 probes of 3 steps and 2 climbs of 12
        TargetedAutoPGD(**settings | {"eps": 0.01}, probe_steps=3, targets_kept=2)(victim, x, y)
        assert (victim.forwards, victim.backwards) == (3 * (1 + 4 * 4 + 2 * 13), 3 * (4 * 3 + 2 * 12))


def test_probes_lose_nothing_on_a_trained_net(trained, digits):
    x, y = digits.test.take(slice(0, 80))
    whole = left(trained, TargetedAutoPGD(eps=0.1, steps=15), x, y)
    assert 3 < whole < 77
    assert left(trained, TargetedAutoPGD(eps=0.1, steps=15, probe_steps=5), x, y) <= whole + 1


def test_the_full_climb_goes_to_the_targets_that_the_probes_brought_nearest():
    class Watch(TargetedAutoPGD):
        def _run(self, solver, x, labels, truth, name, seed, record):
            names.append((name, labels.tolist()))
            return super()._run(solver, x, labels, truth, name, seed, record)

    names = []
    x, y = torch.full((2, 1, 1, 2), 0.2), torch.zeros(2, dtype=torch.long)
    Watch(eps=0.15, steps=5, loss="margin", probe_steps=3, targets_kept=2)(Decoy(), x, y)
    assert [name for name, _ in names] == ["0/scout/0", "0/scout/1", "0/scout/2", "0/scout/3", "0/0", "0/1"]
    # Margins that can be reached: -0.097 for class 1, -0.13 for 2, -0.33 for 3 and -0.06 for 4.
    assert [labels for _, labels in names[4:]] == [[4, 4], [1, 1]]


def test_a_model_that_blows_up_its_logits_stops_cross_entropy_and_not_the_ratio(trained, digits):
    class Loud(torch.nn.Module):
        def forward(self, x):
            return trained(x) * 1e4

    x, y = digits.test.take(slice(0, 60))
    assert left(Loud(), AutoPGD(eps=0.1, steps=10, loss="dlr"), x, y) <= left(Loud(), AutoPGD(eps=0.1, steps=10), x, y)
    assert left(Loud(), AutoPGD(eps=0.1, steps=10, loss="dlr"), x, y) == left(
        trained, AutoPGD(eps=0.1, steps=10, loss="dlr"), x, y
    )


def test_costs_are_what_the_text_says_and_adversarial_images_cost_nothing():
    model, _ = binary((1, 3, 3))
    x = inner_images(8, (1, 3, 3))
    with torch.no_grad():
        y = model(x).argmax(1)
    with Victim(model) as victim:
        AutoPGD(eps=1e-4, steps=7, restarts=2)(victim, x, y)
        assert (victim.forwards, victim.backwards) == (8 * 2 * 8, 8 * 2 * 7)
    with Victim(model) as victim:  # two classes have one wrong class to aim at
        TargetedAutoPGD(eps=1e-4, steps=7, loss="margin")(victim, x, y)
        assert (victim.forwards, victim.backwards) == (8 * 9, 8 * 7)
    with Victim(model) as victim:
        x_adv = TargetedAutoPGD(eps=0.3, steps=7, loss="margin")(victim, x, 1 - y)
        assert torch.equal(x_adv, x)  # wrong as they are
        assert (victim.forwards, victim.backwards) == (8, 0)


@given(
    st.integers(0, 7),
    st.sampled_from(["inf", "2", "1"]),
    st.floats(0, 1),
    st.sampled_from([AutoPGD, TargetedAutoPGD]),
    st.integers(0, 9),
)
def test_results_stay_in_the_ball_and_in_the_box_and_repeat(count, norm, eps, kind, seed):
    model = LinearNet(torch.randn(5, 1, 3, 4, generator=torch.Generator().manual_seed(seed)))
    x = torch.rand(count, 1, 3, 4, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    y = torch.arange(count) % 5
    attack = kind(eps=eps, norm=norm, steps=6, restarts=2)
    x_adv = attack(model, x, y, seed=seed)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert (Ball(eps=eps, norm=norm).length(x_adv - x) <= eps + 1e-5).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert torch.equal(attack(model, x, y, seed=seed), x_adv)
    assert torch.equal(kind(eps=0, norm=norm, steps=3)(model, x, y), x)


def test_an_image_s_result_does_not_depend_on_its_neighbours(trained, digits):
    x, y = digits.test.take(slice(0, 12))
    attack = AutoPGD(eps=0.08, steps=12)
    whole = attack(trained, x, y)
    changed = y.clone()
    changed[6:] = (y[6:] + 1) % 10  # these fall at once
    torch.testing.assert_close(attack(trained, x, changed)[:6], whole[:6], rtol=0, atol=1e-5)


def test_label_maps_fall_pixel_by_pixel():
    class PixelNet(torch.nn.Module):
        def forward(self, x):
            return torch.cat([1 - 2 * x, 2 * x - 1, -1 - x, -2 - x], 1)

    x = torch.tensor([[[[0.55, 0.52]]], [[[0.55, 0.6]]]])
    y = torch.tensor([[[1, 1]], [[1, 255]]])
    for attack in (AutoPGD(eps=0.1, steps=9), TargetedAutoPGD(eps=0.1, steps=9, targets=1)):
        prediction = PixelNet()(attack(PixelNet(), x, y, task=Segmentation(ignore_index=255))).argmax(1)
        assert prediction[0].tolist() == [[0, 0]]
        assert prediction[1, 0, 0] == 0


def test_too_few_classes_for_the_ratio_fall_back_to_the_margin_and_say_so():
    model, _ = binary((1, 3, 3))
    x, y = inner_images(4, (1, 3, 3)), torch.tensor([0, 1, 0, 1])
    with pytest.warns(UserWarning, match="loss 'dlr' needs more classes than the 2 of this model: the margin"):
        found = AutoPGD(eps=0.1, steps=5, loss="dlr")(model, x, y)
    assert torch.equal(found, AutoPGD(eps=0.1, steps=5, loss="margin")(model, x, y))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="with targets the attack chooses what to reach"):
        AutoPGD(eps=0.1, targets=3, targeted=True)
    with pytest.raises(UserError, match="probe_steps is for an attack on several targets"):
        AutoPGD(eps=0.1, probe_steps=5)
    with pytest.raises(UserError, match="inertia = 0"):
        AutoPGD(eps=0.1, inertia=0)


def test_a_user_can_ask_for_a_target(trained, digits):
    x, y = digits.test.take(slice(0, 40))
    goal = (y + 1) % 10
    with torch.no_grad():
        hit = trained(AutoPGD(eps=0.4, steps=20, targeted=True)(trained, x, goal)).argmax(1) == goal
    assert hit.float().mean() > 0.8
    assert gb.evaluation.accuracy(trained, digits).value > 0.9
