"""DeepFool and Carlini-Wagner against the exact distances of linear models, inside the box and at its edge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gambeson as gb
from gambeson import UserError
from gambeson.attacks.minimal_norm.carlini_wagner import CarliniWagner
from gambeson.attacks.minimal_norm.deepfool import DeepFool
from gambeson.tasks import Classification
from gambeson.threat import Ball
from gambeson.victim import Victim
from tests.conftest import LinearNet, binary, full, inner_images


def linear(classes, shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    model = LinearNet(torch.randn(classes, *shape, generator=draw))
    x = inner_images(9, shape, seed)
    with torch.no_grad():
        model.bias -= model(x).mean(0)  # otherwise one class has them all
        return model, x, model(x).argmax(1)


def distances(model, x, y, norm):
    """min_k |f_k| / ||w_k||, in the dual norm."""
    scores, weight = model(x).detach(), model.weight.detach().flatten(1)
    gaps = (scores.gather(1, y[:, None]) - scores).abs()
    slopes = (weight[None] - weight[y][:, None]).norm(p=1 if norm == "inf" else 2, dim=2)
    return torch.where(slopes > 0, gaps / slopes, torch.inf).amin(1)


def length(x_adv, x, norm="2"):
    return Ball(eps=1, norm=norm).length(x_adv - x)


def in_the_box(x, weight, gap):
    """The shortest d with weight.d = gap and x + d in [0, 1]: clip(t weight), t found by bisection."""
    low, high = torch.zeros(()), torch.tensor(1e4)
    for _ in range(80):
        t = (low + high) / 2
        d = torch.minimum(torch.maximum(t * weight, -x), 1 - x)
        low, high = (low, t) if (d * weight).sum() >= gap else (t, high)
    return d.norm()


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 5, 7), (1, 1, 31)])
def test_deepfool_takes_one_exact_step_on_a_linear_model(classes, norm, shape):
    model, x, y = linear(classes, shape)
    with Victim(model) as victim:
        x_adv = DeepFool(norm=norm, classes=12)(victim, x, y)
    torch.testing.assert_close(length(x_adv, x, norm), 1.02 * distances(model, x, y, norm), rtol=1e-3, atol=1e-6)
    assert (model(x_adv).argmax(1) != y).all()
    assert (victim.forwards, victim.backwards) == (2 * len(x), (classes - 1) * len(x))


def test_few_images_take_one_backward_through_copies_and_find_the_same(trained, digits):
    x, y = digits.test.take(slice(0, 8))
    for norm in ("2", "inf"):
        with Victim(trained) as victim:
            whole = DeepFool(norm=norm, steps=1)(victim, x, y)
        with Victim(trained) as few:
            parts = [DeepFool(norm=norm, steps=1)(few, x[k : k + 4], y[k : k + 4]) for k in (0, 4)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
        assert (victim.forwards, victim.backwards) == (8, 9 * 8)
        assert (few.forwards, few.backwards) == (10 * 8, 9 * 8)


def test_deepfool_at_the_edge_of_the_box_still_flips_and_the_paper_s_way_need_not():
    model, w = binary((1, 8, 8))
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    y = model(x).argmax(1)
    x_adv = DeepFool()(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    best = torch.stack(
        [
            in_the_box(image, w * (1 - 2 * int(label)), gap.abs())
            for image, label, gap in zip(x, y, model(x).diff(dim=1).detach(), strict=True)
        ]
    )
    assert (length(x_adv, x) <= 1.05 * best).all()
    assert (length(x_adv, x) >= best * (1 - 1e-5)).all()
    as_published = DeepFool(clip="end")(model, x, y)
    assert ((as_published >= 0) & (as_published <= 1)).all()
    assert (model(as_published).argmax(1) == y).any()


def test_deepfool_breaks_a_trained_net_where_noise_of_the_same_length_does_not(trained, digits):
    x, y = digits.test.take(slice(0, 60))
    right = trained(x).argmax(1) == y
    for norm in ("2", "inf"):
        with Victim(trained) as victim:
            x_adv = DeepFool(norm=norm)(victim, x, y)
        scores = trained(x_adv)
        own = scores.gather(1, y[:, None])
        lead = (own - scores.scatter(1, y[:, None], -torch.inf)).amin(1)  # of the label
        assert (lead < 1e-5).all()  # an image on the boundary itself falls either way, by its batch
        assert (lead < 0).float().mean() > 0.9
        assert torch.equal(x_adv[~right], x[~right])
        found = length(x_adv, x, norm)[right]
        assert victim.backwards < 9 * 15 * len(x)  # images that have fallen are left alone
        noise = Ball(eps=1, norm=norm).signs(x.shape, torch.Generator().manual_seed(0))[right]
        noisy = (x[right] + noise * found.view(-1, 1, 1, 1)).clamp(0, 1)
        assert (trained(noisy).argmax(1) != y[right]).float().mean() < 0.2


@pytest.mark.parametrize("attack", [DeepFool, CarliniWagner])
def test_bounded_by_eps_the_smallest_is_kept_and_the_rest_is_projected(attack):
    model, x, y = linear(3, (3, 5, 7))
    best = distances(model, x, y, "2")
    eps = float(best.median()) * 1.05
    settings = {"steps": 200} if attack is CarliniWagner else {}
    x_adv = attack(eps=eps, **settings)(model, x, y)
    assert (length(x_adv, x) <= eps + 1e-6).all()
    clear = (best / eps - 1).abs() > 0.04
    assert torch.equal((model(x_adv).argmax(1) != y)[clear], (best < eps)[clear])
    assert 0 < int((best < eps)[clear].sum()) < int(clear.sum())
    assert torch.equal(attack(eps=0)(model, x, y), x)


@pytest.mark.parametrize(("classes", "shape"), [full(2, (1, 3, 5)), (3, (3, 5, 7)), full(2, (1, 1, 31))])
def test_carlini_wagner_is_within_five_per_cent_of_the_optimum(classes, shape):
    model, x, y = linear(classes, shape)
    with Victim(model) as victim:
        x_adv = CarliniWagner(steps=200)(victim, x, y)
    best = distances(model, x, y, "2")
    assert (length(x_adv, x) <= 1.05 * best + 2e-4).all()  # some boundaries are nearer than a step of Adam
    assert (length(x_adv, x) >= best * (1 - 1e-4) - 1e-7).all()
    assert (model(x_adv).argmax(1) != y).all()
    assert victim.backwards <= 9 * 200 * len(x)
    assert victim.forwards == victim.backwards + len(x)


@pytest.mark.full
def test_carlini_wagner_is_within_five_per_cent_at_the_edge_of_the_box():
    model, w = binary((1, 6, 6))
    x = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(1)).round()
    x[:3] = x[:3] * 0.96 + 0.02
    y = model(x).argmax(1)
    x_adv = CarliniWagner(steps=700, searches=6, c=0.01)(model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    gaps = model(x).diff(dim=1).detach().abs()
    best = torch.stack([in_the_box(a, w * (1 - 2 * int(b)), gap) for a, b, gap in zip(x, y, gaps, strict=True)])
    assert (length(x_adv, x) <= 1.05 * best).all()
    assert (length(x_adv, x) >= best * (1 - 1e-4)).all()
    free = distances(model, x, y, "2")
    assert (best > 1.05 * free).any()  # the box does bind


def test_a_close_boundary_misleads_the_authors_search_and_not_ours():
    model, w = binary((3, 5, 7))
    x = inner_images(1, (3, 5, 7))
    y = model(x).argmax(1)
    best = float(model(x).detach().diff(dim=1).abs() / w.norm())
    ours, theirs = (
        float(length(CarliniWagner(judge=judge, steps=300)(model, x, y), x)) / best for judge in ("last", "any")
    )
    assert ours < 1.05
    assert theirs > 1.2


def test_carlini_wagner_reaches_targets_and_keeps_kappa_to_spare():
    model, x, y = linear(4, (1, 4, 6))
    target = (y + 1) % 4
    attack = CarliniWagner(steps=150, targeted=True, kappa=2.0)
    scores = model(attack(model, x, target))
    assert (scores.argmax(1) == target).all()
    others = scores.scatter(1, target[:, None], -torch.inf).amax(1)
    assert (scores.gather(1, target[:, None])[:, 0] - others >= 2.0 - 1e-4).all()
    away = model(CarliniWagner(steps=150, kappa=2.0)(model, x, y))
    assert ((away.scatter(1, y[:, None], -torch.inf).amax(1) - away.gather(1, y[:, None])[:, 0]) >= 2.0 - 1e-4).all()


def test_what_is_wrong_already_or_ignored_comes_back_bit_for_bit():
    model, x, y = linear(3, (1, 4, 6))
    wrong = (y + 1) % 3
    for attack in (DeepFool(), CarliniWagner(steps=5)):
        assert torch.equal(attack(model, x, wrong), x)
        y_some = y.clone()
        y_some[:4] = 255
        moved = attack(model, x, y_some, task=Classification(ignore_index=255))
        assert torch.equal(moved[:4], x[:4])
    reached = CarliniWagner(steps=5, targeted=True)(model, x, y)
    assert torch.equal(reached, x)


@given(st.integers(1, 7), st.sampled_from([2, 3]), st.integers(0, 20), st.sampled_from(["2", "inf"]))
def test_images_stay_in_the_box_repeat_and_do_not_depend_on_their_batch(count, classes, seed, norm):
    model, x, y = linear(classes, (1, 3, 4), seed)
    x, y = x[:count].clone(), y[:count]
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    y = model(x).argmax(1)
    for attack in (DeepFool(norm=norm), CarliniWagner(steps=10, searches=3, c=0.1)):
        x_adv = attack(model, x, y)
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert not x_adv.requires_grad
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert torch.equal(attack(model, x, y), x_adv)
        torch.testing.assert_close(attack(model, x.flip(0), y.flip(0)).flip(0), x_adv, rtol=1e-4, atol=1e-5)


def test_a_model_without_gradient_is_left_alone_and_a_broken_one_refused():
    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * 0 + torch.tensor([2.0, 0.0, 0.0])

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * 1e38 * 1e38

    x, y = inner_images(3, (1, 2, 3)), torch.zeros(3, dtype=torch.long)
    for attack in (DeepFool(steps=3), CarliniWagner(steps=3, searches=2)):
        assert torch.equal(attack(Flat(), x, y), x)
    for attack in (DeepFool(steps=3), CarliniWagner(steps=3, searches=2)):
        with pytest.raises(UserError, match="NaN or infinite"):
            attack(Broken(), x, y)
        with pytest.raises(UserError, match="labels reach from 0 to 7, but there are 3 classes"):
            attack(Flat(), x, torch.tensor([0, 7, 1]))
        with pytest.raises(UserError, match="label maps .*: this attack expects one label per image"):
            attack(Flat(), x, torch.zeros(3, 2, 3, dtype=torch.long))


def test_works_under_no_grad_in_double_and_leaves_the_model_alone(trained, digits):
    x, y = digits.test.take(slice(0, 8))
    before = gb.models.fingerprint(trained)
    for attack in (DeepFool(), CarliniWagner(steps=10, searches=3)):
        with torch.no_grad():
            moved = attack(trained, x, y)
        assert torch.equal(moved, attack(trained, x, y))
    assert gb.models.fingerprint(trained) == before
    model, x, y = linear(3, (1, 4, 6))
    x_adv = DeepFool()(model.double(), x.double(), y)
    assert x_adv.dtype == torch.float64
    assert (model(x_adv).argmax(1) != y).all()


def test_settings_are_checked():
    with pytest.raises(UserError, match="classes = 1"):
        DeepFool(classes=1)
    with pytest.raises(UserError, match="norm = '1'"):
        DeepFool(norm="1")
    with pytest.raises(TypeError, match="no setting 'confidence'"):
        CarliniWagner(confidence=1.0)


def test_an_image_whose_pixels_are_all_black_or_white_is_not_given_up_while_tanh_is_flat(trained):
    """Its objective stands still until its pixels have left the ends; a batch of one has no neighbour to carry it."""
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    y = trained(x).argmax(1)
    settings = {"steps": 150, "lr": 0.06, "c": 1.0, "searches": 2}
    for kept in (CarliniWagner(**settings), CarliniWagner(**settings, early_abort=False)):
        assert (trained(kept(trained, x, y)).argmax(1) != y).all()
