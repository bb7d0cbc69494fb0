"""Per-image attacks against formulas. The last test shows that attacks which do nothing would fail these."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM, PGD, RFGSM
from gambeson.attacks.gradient.pgd import IFGSM
from gambeson.attacks.losses import Loss
from gambeson.attacks.solver import NonFiniteGradientError, ProjectedGradient
from gambeson.base import generator
from gambeson.data import Split
from gambeson.evaluation import Rate, accuracy_under
from gambeson.tasks import Segmentation
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.attacks.optima import best_gain
from tests.conftest import LinearNet, binary, inner_images, shaded_images

SHAPES = [(1, 2, 3), (3, 5, 7), (1, 1, 11)]


def gain(model, x, x_adv, y):
    """How much the margin of the wrong class has grown."""
    sign = 1 - 2 * y.float()
    before, after = model(x).diff(dim=1).flatten(), model(x_adv).diff(dim=1).flatten()
    return (after - before) * sign


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["inf", "2"])
def test_pgd_and_fgsm_reach_the_optimum_of_a_linear_model(shape, norm):
    model, w = binary(shape)
    x, y = inner_images(7, shape), torch.arange(7) % 2
    eps = 0.05
    best = eps * (w.abs().sum() if norm == "inf" else w.norm())
    for attack in (FGSM(eps=eps, norm=norm), PGD(eps=eps, norm=norm, steps=20, early_stop=False)):
        x_adv = attack(model, x, y)
        torch.testing.assert_close(gain(model, x, x_adv, y), best.expand(7), rtol=0.01, atol=0)
        assert (Ball(eps=eps, norm=norm).length(x_adv - x) <= eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 7)])
@pytest.mark.parametrize(("norm", "eps"), [("inf", 0.05), ("inf", 0.5), ("2", 0.5), ("2", 2.0), ("1", 0.3), ("1", 1.5)])
def test_pgd_reaches_the_optimum_where_images_are_black_and_white(shape, norm, eps):
    model, w = binary(shape)
    x, y = torch.rand(9, *shape, generator=torch.Generator().manual_seed(3)), torch.arange(9) % 2
    x[x < 0.3], x[x > 0.7] = 0, 1
    best = best_gain(w, x, y, eps, norm).float()
    for attack in (PGD(eps=eps, norm=norm, loss="margin", early_stop=False), IFGSM(eps=eps, norm=norm, loss="margin")):
        grown = gain(model, x, attack(model, x, y), y).detach()
        assert (grown <= best * (1 + 1e-4)).all()
        if norm != "2" or attack.start == "uniform":  # with steps of eps / steps the norm 2 has no time to turn
            assert (grown >= 0.99 * best).all()


def test_the_norm_2_of_the_paper_wastes_radius_on_black_and_white_pixels():
    model, w = binary((1, 1, 11))
    x, y = torch.rand(9, 1, 1, 11, generator=torch.Generator().manual_seed(3)).round(), torch.arange(9) % 2
    best = best_gain(w, x, y, 1.0, "2").float()
    exact, paper = (
        gain(model, x, PGD(eps=1.0, norm="2", loss="margin", exact_box=box, early_stop=False)(model, x, y), y).detach()
        for box in (True, False)
    )
    assert (exact >= 0.99 * best).all()
    assert (paper < 0.99 * best).any()


def test_slide_spreads_its_steps_over_a_share_of_the_values():
    model, w = binary((1, 10, 10))
    x, y = inner_images(3, (1, 10, 10)), torch.tensor([0, 1, 0])
    moved = FGSM(eps=1.0, norm="1", sparsity=0.2)(model, x, y) - x
    assert ((moved.abs() > 1e-6).flatten(1).sum(1) == 20).all()
    largest = w.flatten().abs().topk(20).indices
    torch.testing.assert_close(moved.flatten(1)[:, largest].abs(), torch.full((3, 20), 0.05))


def test_black_pixels_have_a_gradient():
    model, w = binary((1, 3, 4))
    y = torch.zeros(1, dtype=torch.long)
    for shade in (0.0, 1.0):
        x = torch.full((1, 1, 3, 4), shade)
        inward = (w > 0) if shade == 0 else (w < 0)
        moved = FGSM(eps=0.1)(model, x, y) - x
        torch.testing.assert_close(moved[0], torch.where(inward, 0.1 * w.sign(), torch.zeros_like(w)))


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_equals_the_shortest_plain_loop(norm, trained, digits):
    x, y = digits.test.take(slice(0, 16))
    x = x * 0.4 + 0.3  # the box does not bind
    attack = PGD(eps=0.1, norm=norm, steps=7, start="zero", early_stop=False)
    trained.eval()
    delta = torch.zeros_like(x)
    for _ in range(7):
        point = (x + delta).requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(trained(point), y, reduction="sum"), point)
        if norm == "inf":
            delta = (delta + 0.1 * 4 / 7 * gradient.sign()).clamp(-0.1, 0.1)
        else:
            delta = delta + 0.1 * 4 / 7 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta * (0.1 / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(attack(trained, x, y), x + delta, rtol=0, atol=1e-4)


def test_costs_are_what_the_text_says(trained, digits):
    x, y = digits.test.take(slice(0, 10))
    for attack, forwards, backwards in (
        (FGSM(eps=0.1), 1, 1),
        (FGSM(eps=0.1, label="prediction"), 2, 1),
        (PGD(eps=0.1, steps=6, early_stop=False), 6, 6),
        (PGD(eps=0.1, steps=6, restarts=3, early_stop=False), 21, 18),
    ):
        with Victim(trained) as victim:
            attack(victim, x, y)
            if attack.restarts == 1:  # later restarts leave out what has fallen
                assert (victim.forwards, victim.backwards) == (10 * forwards, 10 * backwards)
            assert victim.forwards <= 10 * forwards


def test_a_gradient_that_is_not_finite_stops_with_its_step_and_what_was_found():
    class Brittle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += int(x.requires_grad)
            value = x.flatten(1).sum(1)
            return torch.stack([value, -value], 1) * (float("nan") if self.calls == 3 else 1.0)

    x, y = inner_images(4, (1, 2, 2)), torch.tensor([0, 0, 1, 1])  # the last two are wrong as they are
    with (
        Victim(Brittle()) as victim,
        pytest.raises(
            NonFiniteGradientError, match="gradient is NaN or infinite at step 3: no attack can follow it"
        ) as caught,
    ):
        PGD(eps=0.1, steps=5)(victim, x, y)
    assert caught.value.found.shape == x.shape
    assert isinstance(caught.value, UserError)


def test_no_images_are_no_problem():
    model, _ = binary((1, 2, 2))
    assert PGD(eps=0.1)(model, torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.long)).shape == (0, 1, 2, 2)


def test_early_stop_finds_exactly_the_images_that_can_be_broken():
    model, w = binary((3, 4, 5))
    x = inner_images(64, (3, 4, 5))
    y = model(x).argmax(1)
    margin = model(x).diff(dim=1).flatten().abs()
    for norm, dual in (("inf", w.abs().sum()), ("2", w.norm())):
        reach = margin / dual
        eps = float(reach.detach().median()) * 1.001
        x_adv = PGD(eps=eps, norm=norm, steps=50, rel_step_size=0.2)(model, x, y)
        broken = model(x_adv).argmax(1) != y
        clear = (reach / eps - 1).abs() > 0.01  # the optimum is reached to one per cent
        assert torch.equal(broken[clear], (reach < eps)[clear])


def test_random_start_of_rfgsm_costs_what_the_paper_s_formula_says():
    model, w = binary((3, 6, 6))
    x, y = inner_images(2000, (3, 6, 6)), torch.zeros(2000, dtype=torch.long)
    for share in (0.0, 0.5, 1.0):
        x_adv = RFGSM(eps=0.1, start_size=share)(model, x, y, seed=3)
        mean = float((gain(model, x, x_adv, y).mean() / (0.1 * w.abs().sum())).detach())
        assert abs(mean - (1 - share)) < 0.02  # ensemble-adversarial-training oracle: (1 - alpha / eps) of FGSM's


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_rfgsm_has_what_the_start_leaves_also_where_images_are_black_and_white(share):
    """Tramèr et al. 2018, section 3.4: x' = clip(x + a s), then (eps - a) up the gradient at x'."""
    model, w = binary((1, 3, 4))
    x, y = shaded_images(40, (1, 3, 4)), torch.arange(40) % 2
    starts = Ball(eps=0.3).signs(x.shape, generator(5, "start", 0))
    first = (x + share * starts).clamp(0, 1)
    up = w.sign() * (1 - 2 * y).view(-1, 1, 1, 1)
    expected = (first + (1 - share) * 0.3 * up).clamp(0, 1)
    torch.testing.assert_close(RFGSM(eps=0.3, start_size=share)(model, x, y, seed=5), expected)


@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_each_image_may_have_a_radius_of_its_own(norm):
    model, _ = binary((1, 3, 4))
    x, y = shaded_images(5, (1, 3, 4)), torch.arange(5) % 2
    sizes = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]).view(-1, 1, 1, 1)
    settings = {"norm": norm, "early_stop": False, "momentum": 0.5, "nesterov": True}
    for kind in (FGSM, RFGSM, PGD):
        attack = kind(eps=0.3, **settings)
        with Victim(model) as victim:
            together = attack.perturb_batch(victim, x, y, seed=1, sizes=sizes)
        for k in range(5):
            alone = kind(eps=0.3 * float(sizes[k]), **settings)
            with Victim(model) as victim:
                same = alone.perturb_batch(victim, x, y, seed=1)[k]
            torch.testing.assert_close(together[k], same)
    for attack in (PGD(eps=0.3), PGD(eps=0.3, restarts=2, early_stop=False), gb.attacks.AutoPGD(eps=0.3)):
        with (
            Victim(model) as victim,
            pytest.raises(UserError, match=r"PGD was given a radius for each image: expected"),
        ):
            attack.perturb_batch(victim, x, y, sizes=sizes)


@pytest.mark.parametrize("box_gradient", ["exact", "straight-through"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_shared_gradient_is_the_sum_over_images_of_which_a_clip_takes_its_part_or_not(box_gradient, rows):
    model = LinearNet(torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(0)))
    x, y = shaded_images(8, (1, 2, 3)), torch.arange(8) % 3
    delta = 0.2 * torch.randn(rows, 1, 2, 3, generator=torch.Generator().manual_seed(1)).sign()
    moved = x + delta.repeat_interleave(8 // rows, 0)
    point = moved.clamp(0, 1).requires_grad_()
    (each,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(point), y, reduction="sum"), point)
    held = (moved < 0) | (moved > 1)
    assert 0.1 < held.float().mean() < 0.5
    each = each if box_gradient == "straight-through" else each.masked_fill(held, 0)
    with Victim(model) as victim:
        solver = ProjectedGradient(victim=victim, ball=Ball(eps=0.2), loss=Loss(), box_gradient=box_gradient)
        gradient, logits = solver.gradient(delta, x, y)
    torch.testing.assert_close(gradient, each.unflatten(0, (rows, -1)).sum(1))
    torch.testing.assert_close(logits, model(moved.clamp(0, 1)).detach())


def test_targeted_moves_to_the_target_and_untargeted_away():
    draw = torch.Generator().manual_seed(1)
    model = LinearNet(torch.randn(4, 1, 3, 3, generator=draw))
    x = inner_images(20, (1, 3, 3))
    y, target = model(x).topk(2).indices.T
    reached = model(PGD(eps=0.4, targeted=True, steps=40)(model, x, target)).argmax(1) == target
    assert reached.float().mean() > 0.9
    assert (model(PGD(eps=0.4, loss="margin")(model, x, y)).argmax(1) != y).float().mean() > 0.9


@pytest.mark.parametrize("attack", [FGSM, PGD, RFGSM])
def test_eps_zero_returns_the_images_bit_for_bit(attack, trained, digits):
    x, y = digits.test.take(slice(0, 20))
    assert torch.equal(attack(eps=0)(trained, x, y), x)
    with Victim(trained) as victim:
        under = accuracy_under(victim, digits.test, attack(eps=0), seed=0)
    assert under == gb.evaluation.accuracy(trained, digits)


@given(
    st.integers(1, 7),
    st.sampled_from(["inf", "2", "1"]),
    st.floats(0, 1),
    st.sampled_from([FGSM, PGD, RFGSM, IFGSM]),
    st.integers(0, 9),
)
def test_results_stay_in_the_ball_and_in_the_box_and_repeat(count, norm, eps, kind, seed):
    model, _ = binary((1, 3, 4), seed)
    x = torch.rand(count, 1, 3, 4, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    y = torch.arange(count) % 2
    attack = kind(eps=eps, norm=norm)
    x_adv = attack(model, x, y, seed=seed)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert (Ball(eps=eps, norm=norm).length(x_adv - x) <= eps + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert torch.equal(attack(model, x, y, seed=seed), x_adv)


def test_more_steps_and_restarts_are_never_weaker_on_a_trained_net(trained, digits):
    x, y = digits.test.take(slice(0, 150))

    def left(attack):
        with torch.no_grad():
            return int((trained(attack(trained, x, y)).argmax(1) == y).sum())

    one, many = left(PGD(eps=0.1, steps=10)), left(PGD(eps=0.1, steps=10, restarts=4))
    assert many <= one
    assert left(PGD(eps=0.1, steps=20)) <= left(FGSM(eps=0.1)) < 140


def test_works_under_no_grad_and_leaves_the_model_alone(trained, digits):
    x, y = digits.test.take(slice(0, 10))
    before = gb.models.fingerprint(trained)
    with torch.no_grad():
        moved = PGD(eps=0.1)(trained, x, y)
    assert torch.equal(moved, PGD(eps=0.1)(trained, x, y))
    assert gb.models.fingerprint(trained) == before


def test_label_maps_need_every_labelled_pixel_to_fall():
    class PixelNet(torch.nn.Module):
        def forward(self, x):
            return torch.cat([1 - 2 * x, 2 * x - 1], 1)  # a pixel above 0.5 is class 1

    x = torch.tensor([[[[0.55, 0.9]]], [[[0.55, 0.6]]]])
    y = torch.tensor([[[1, 1]], [[1, 255]]])
    x_adv = PGD(eps=0.1, steps=5, rel_step_size=1.0)(PixelNet(), x, y, task=Segmentation(ignore_index=255))
    prediction = PixelNet()(x_adv).argmax(1)
    assert prediction[1, 0, 0] == 0
    assert float(x_adv[1, 0, 0, 1]) == pytest.approx(0.6, abs=0.11)
    assert prediction[0].tolist() == [[0, 1]]  # 0.9 cannot fall below 0.5 within 0.1
    split = Split("maps", x, y, ("a", "b"), ignore_index=255)
    with Victim(PixelNet()) as victim:
        under = accuracy_under(victim, split, PGD(eps=0.1, steps=5, rel_step_size=1.0), seed=0)
    assert under == Rate.bootstrap(torch.tensor([1, 0]), torch.tensor([2, 1]))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.full((2, 1, 2, 2), -1.5), "reach from -1.5 to -1.5; they look normalised"),
        (torch.full((2, 1, 2, 2), 200.0), "they look like 0..255: divide by 255"),
        (torch.full((2, 1, 2, 2), 200, dtype=torch.uint8), r"torch.uint8: expected floats in \[0, 1\]"),
        (
            torch.full((2, 1, 2, 2), float("nan")),
            "2 images hold NaN or infinite pixels, the first at index 0",
        ),
        (torch.zeros(2, 2, 2), r"expected a batch \(N, C, H, W\)"),
        (torch.zeros(3, 1, 2, 2), "3 images came with 2 labels"),
    ],
)
def test_bad_images_are_refused(x, words):
    model, _ = binary((1, 2, 2))
    with pytest.raises(UserError, match=words):
        PGD(eps=0.1)(model, x, torch.tensor([0, 1]))


def test_rounding_outside_the_box_is_clipped():
    model, _ = binary((1, 2, 2))
    x = torch.full((1, 1, 2, 2), 1 + 5e-7)
    assert float(PGD(eps=0)(model, x, torch.tensor([0])).max()) == 1.0


def test_settings_are_checked():
    with pytest.raises(UserError, match="steps = 0"):
        PGD(eps=0.1, steps=0)
    with pytest.raises(TypeError, match="no setting 'step_size': did you mean"):
        PGD(eps=0.1, step_size=0.01)
    with pytest.raises(UserError, match="steps = 2"):
        FGSM(eps=0.1, steps=2)


def test_attacks_that_do_nothing_or_go_down_would_fail(trained, digits):
    model, _ = binary((1, 4, 4))
    x, y = inner_images(5, (1, 4, 4)), torch.zeros(5, dtype=torch.long)
    up = gain(model, x, FGSM(eps=0.1)(model, x, y), y)
    down = gain(model, x, FGSM(eps=0.1)(model, x, 1 - y), y)
    assert (up > 0).all()
    assert (down < 0).all()
    assert not gain(model, x, x, y).any()
