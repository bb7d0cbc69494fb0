"""Per-image attacks on label maps, against closed forms of a 1 x 1 convolution and loops from the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PGD, SEA, AutoPGD, CosPGD, Loss, SegPGD
from gambeson.base import generator
from gambeson.tasks import Segmentation
from gambeson.threat import Ball
from gambeson.victim import Victim

TASK = Segmentation(ignore_index=255)


class Pixelwise(nn.Module):
    """Logits W x + b of every pixel: a 1 x 1 convolution, whose worst case has a formula."""

    def __init__(self, classes, channels=3, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 1)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=draw))
            self.conv.bias.copy_(0.3 * torch.randn(classes, generator=draw))

    def forward(self, x):
        return self.conv(x)


class Patchwise(nn.Module):
    """A net whose pixels share their surroundings."""

    def __init__(self, classes=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 3, padding=1))

    def forward(self, x):
        return 4 * self.layers(x)


def maps(model, count=4, side=6, seed=0, wrong=0.1):
    """Images up to black and white, and labels that the model mostly gets right, some of which are ignored."""
    draw = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(count, 3, side, side, generator=draw) - 0.2).clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    classes = model(x[:1]).shape[1]
    other = torch.randint(0, classes, y.shape, generator=draw)
    y = torch.where(torch.rand(y.shape, generator=draw) < wrong, other, y)
    return x, y.masked_fill(torch.rand(y.shape, generator=draw) < 0.2, 255)


def margins(model, x, y):
    """Per wrong class k: u_k - u_y (N, K, H, W), -inf at the label, and its gradient (N, K, C, H, W)."""
    index = y.where(y != 255, 0)[:, None]
    with torch.no_grad():
        u, w = model(x).double(), model.conv.weight.detach().double()[:, :, 0, 0]
    m = (u - u.gather(1, index)).scatter(1, index, -torch.inf)
    d = w[None, :, :, None, None] - w[index[:, 0]].movedim(-1, 1)[:, None]
    return m, d


def breakable(model, x, y, eps):
    """The pixels that some perturbation in the norm inf, inside the box, turns wrong: the exact worst case."""
    m, d = margins(model, x, y)
    room = torch.where(d > 0, 1 - x.double()[:, None], x.double()[:, None]).clamp(max=eps)
    return ((m + (d.abs() * room).sum(2)) > 0).any(1) & (y != 255)


def right(model, x, y):
    with torch.no_grad():
        return TASK.counts(model(x).argmax(1), y).right


MADE = {
    "pgd": PGD(eps=0.06, steps=40, start="zero"),
    "segpgd": SegPGD(eps=0.06),
    "cospgd": CosPGD(eps=0.06),
    "sea": SEA(eps=0.06, steps=30),
    "apgd, mce": AutoPGD(eps=0.06, steps=30, loss="mce"),
    "apgd, segpgd": AutoPGD(eps=0.06, steps=30, loss="segpgd"),
}


@pytest.mark.parametrize("name", MADE)
def test_two_classes_are_brought_to_the_exact_worst_case(name):
    model = Pixelwise(2)
    x, y = maps(model, side=12)
    broken = breakable(model, x, y, 0.06)
    clean, least = right(model, x, y), (y != 255).sum((1, 2)) - broken.sum((1, 2))
    assert (least < 0.95 * clean).all()
    assert (least > 0.2 * clean).all()
    assert torch.equal(right(model, MADE[name](model, x, y, task=TASK), y), least)


def test_one_sign_step_is_enough_for_two_classes():
    model = Pixelwise(2)
    x, y = maps(model, side=12)
    moved = gb.attacks.FGSM(eps=0.06)(model, x, y, task=TASK)
    assert torch.equal(right(model, moved, y), ((y != 255) & ~breakable(model, x, y, 0.06)).sum((1, 2)))


@pytest.mark.parametrize("name", MADE)
def test_of_several_classes_no_attack_breaks_more_than_can_be_broken(name):
    model = Pixelwise(5)
    x, y = maps(model, side=12)
    least = ((y != 255) & ~breakable(model, x, y, 0.06)).sum((1, 2))
    found = right(model, MADE[name](model, x, y, task=TASK), y)
    assert (found >= least).all()
    missed = (found - least).sum() / (right(model, x, y) - least).sum()
    assert missed < (0.25 if name == "pgd" else 0.12)


@pytest.mark.parametrize("name", MADE)
def test_in_the_euclidean_ball_no_attack_breaks_more_than_the_cheapest_pixels(name):
    model = Pixelwise(3)
    x, y = maps(model, side=12)
    attack = MADE[name].model_copy(update={"norm": "2", "eps": 0.4, "restarts": 2})
    m, d = margins(model, x, y)
    cost = (-m / d.norm(dim=2).clamp(min=1e-12)).clamp(min=0).amin(1).masked_fill(y == 255, torch.inf)
    most = (cost.square().flatten(1).sort(1).values.cumsum(1) < 0.4**2).sum(1)
    moved = attack(model, x, y, task=TASK)
    assert ((moved - x).flatten(1).norm(dim=1) <= 0.4 + 1e-5).all()
    valid = (y != 255).sum((1, 2))
    assert (valid - right(model, moved, y) <= most).all()
    assert (right(model, moved, y) < right(model, x, y)).all()


def by_formula(model, x, y, eps, alpha, steps, weight):
    """Sign steps along the weighted cross-entropy of the pixels that count, from the image itself."""
    valid, index = y != 255, y.where(y != 255, 0)
    delta = torch.zeros_like(x)
    for t in range(1, steps + 1):
        point = (x + delta).requires_grad_()
        u = model(point)
        entropy = F.cross_entropy(u, index, reduction="none")
        w = weight(u.detach(), index, t) * valid
        (gradient,) = torch.autograd.grad((w * entropy).sum(), point)
        delta = (delta + alpha * gradient.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return x + delta


def test_segpgd_and_cospgd_follow_their_papers():
    model, eps, steps = Patchwise(), 8 / 255, 7
    x, y = maps(model, side=8)

    def segpgd(u, index, t):
        lam = (t - 1) / (2 * steps)
        return torch.where(u.argmax(1) == index, 1 - lam, lam)

    def cospgd(u, index, t):
        return F.cosine_similarity(u.softmax(1), F.one_hot(index, u.shape[1]).movedim(3, 1).float(), dim=1)

    for attack, weight in ((SegPGD, segpgd), (CosPGD, cospgd)):
        made = attack(eps=eps, steps=steps, start="zero", keep="last", early_stop=False)
        expected = by_formula(model, x, y, eps, 0.01, steps, weight)
        torch.testing.assert_close(made(model, x, y, task=TASK), expected, atol=1e-6, rtol=0)
        assert made.lengths == [pytest.approx(0.01)] * steps
    assert SegPGD(eps=64 / 255, norm="2").lengths[0] == pytest.approx(0.1)
    assert SegPGD(eps=128 / 255, norm="2").lengths[0] == pytest.approx(0.2)


def published_sea(model, x, y, eps, steps, loss, start):
    """One run of SEA on one image, from the paper: slots, Auto-PGD with momentum, judged by cross-entropy."""
    valid, index = y != 255, y.where(y != 255, 0)

    def look(delta):
        point = (x + delta).detach().requires_grad_()
        u = model(point)
        entropy = F.cross_entropy(u, index, reduction="none")
        hit = u.argmax(1) == index
        if loss == "mce":
            target = (hit * entropy)[valid].sum()
        else:
            p = u.softmax(1)
            half = (p + F.one_hot(index, u.shape[1]).movedim(3, 1)) / 2
            kl = (p * (p / half).log()).sum(1) - half.gather(1, index[:, None])[:, 0].log()
            target = (kl / 2)[valid].sum()
        (gradient,) = torch.autograd.grad(target, point)
        return gradient, float(entropy[valid].detach().mean()), int((~hit & valid).sum())

    delta = start
    for share, radius in ((0.3, 2 * eps), (0.3, 1.5 * eps), (0.4, eps)):
        count = round(share * steps)

        def inside(delta, radius=radius):
            return (x + delta.clamp(-radius, radius)).clamp(0, 1) - x

        marks, gap = [0, math.ceil(0.22 * count)], 0.22
        at = 0.22
        while at < 1:
            gap = max(gap - 0.03, 0.06)
            at += gap
            marks.append(math.ceil(round(at * count, 6)))
        delta = before = inside(delta)
        gradient, value, wrong = look(delta)
        best, result = (delta, gradient, value), (delta, wrong, value)
        eta, rises, checked, halved, last = 2 * radius, 0, value, False, 0
        for step in range(1, count + 1):
            if step > 1 and step - 1 in marks:
                if rises < 0.75 * (step - 1 - last) or (not halved and best[2] <= checked):
                    eta, halved = eta / 2, True
                    delta, gradient, value = best
                    before = delta
                else:
                    halved = False
                rises, checked, last = 0, best[2], step - 1
            moved = inside(delta + eta * gradient.sign())
            if step > 1:
                moved = inside(delta + 0.75 * (moved - delta) + 0.25 * (delta - before))
            before, delta, previous = delta, moved, value
            gradient, value, wrong = look(delta)
            rises += value > previous
            best = (delta, gradient, value) if value > best[2] else best
            result = (delta, wrong, value) if (wrong, value) > result[1:] else result
        delta = result[0]
    return x + delta, result[1]


@pytest.mark.parametrize("loss", ["mce", "js"])
def test_sea_follows_its_paper(loss):
    model, eps, steps = Patchwise(), 0.02, 30
    x, y = maps(model, count=6, side=12)
    attack = SEA(eps=eps, steps=steps, losses=(loss,), early_stop=False)
    found = attack(model, x, y, task=TASK, seed=5)
    draw = Ball(eps=eps, norm="inf").uniform(x.shape, generator(5, "start", f"0/{loss}"))
    start = torch.minimum(torch.maximum(2 * draw, -x), 1 - x)
    for n in range(len(x)):
        one = slice(n, n + 1)
        expected, wrong = published_sea(model, x[one], y[one], eps, steps, loss, start[one])
        assert wrong == int((y[n] != 255).sum()) - int(right(model, found[one], y[one]))
        torch.testing.assert_close(found[one], expected, atol=1e-5, rtol=0)


def test_the_result_of_sea_is_the_worst_of_its_losses_and_of_all_its_points():
    model = Patchwise()
    x, y = maps(model, count=6, side=8)
    each = [
        right(model, SEA(eps=0.02, steps=20, losses=(loss,))(model, x, y, task=TASK), y) for loss in SEA(eps=1).losses
    ]
    assert torch.equal(right(model, SEA(eps=0.02, steps=20)(model, x, y, task=TASK), y), torch.stack(each).amin(0))
    assert len({tuple(counts.tolist()) for counts in each}) > 1
    best, last = (
        right(model, SegPGD(eps=0.02, steps=12, rel_step_size=1.5, keep=keep)(model, x, y, task=TASK, seed=2), y)
        for keep in ("best", "last")
    )
    assert (best <= last).all()
    assert (best < last).any()


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (SEA(eps=0.01), 3 * 303, 3 * 300),
        (SEA(eps=0.01, losses=("js",)), 303, 300),
        (SegPGD(eps=0.01), 21, 20),
        (CosPGD(eps=0.01, steps=5, restarts=2), 12, 10),
        (CosPGD(eps=0.01, steps=5, keep="last"), 5, 5),
    ],
)
def test_costs_are_those_stated(attack, forwards, backwards):
    model = Pixelwise(3)
    x, y = maps(model, count=2, side=3)
    with Victim(model) as victim:
        attack(victim, x, y, task=TASK)
        assert (victim.forwards, victim.backwards) == (2 * forwards, 2 * backwards)


def test_an_image_without_a_right_pixel_costs_sea_nothing_more():
    model = Pixelwise(2)
    x, y = maps(model, count=2, side=3, wrong=0)
    y[0] = 1 - model(x).argmax(1)[0]
    with Victim(model) as victim:
        SEA(eps=0.001, losses=("js", "mce"))(victim, x, y, task=TASK)
        # The outer balls are no result: the first loss finds out in its last stage, the second does not begin.
        assert victim.forwards == 2 * 303 + 91 + 91 + 1


@pytest.mark.parametrize("name", gb.attacks.names("image"))
def test_every_attack_takes_label_maps_or_refuses_them_before_it_asks_the_model(name):
    """What it takes, ignored pixels do not change, bit for bit; and a map of one pixel is a classification."""
    attack = made(name)
    model, alone = Pixelwise(5), Counted()
    x, y = maps(model, count=3, side=4)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    if name in REFUSED:
        with pytest.raises(UserError, match=r"label maps \(N, H, W\): .* expects one label per image"):
            attack(model, x, y, task=TASK)
        assert not calls
        return
    ignored = (y == 255)[:, None]
    moved = attack(model, x, y, task=TASK, seed=1)
    marked = attack(model, x, y.masked_fill(y == 255, -1), task=Segmentation(ignore_index=-1), seed=1)
    assert torch.equal(moved, marked)
    if name not in GLOBAL:
        others = torch.where(ignored, 1 - x, x)
        elsewhere = attack(model, others, y, task=TASK, seed=1)
        assert torch.equal(moved.where(~ignored, 0), elsewhere.where(~ignored, 0))
    assert (right(model, moved, y) <= right(model, x, y)).all()
    one, labels = x[:, :, :1, :1], model(x[:, :, :1, :1]).argmax(1)
    alone.conv = model.conv
    found = attack(alone, one, labels[:, 0, 0], seed=1)
    assert torch.equal(attack(model, one, labels, seed=1), found)
    assert not torch.equal(found, one)


class Counted(nn.Module):
    """The same net for images of one pixel with one label."""

    def forward(self, x):
        return self.conv(x).flatten(1)


REFUSED = ("deepfool", "carlini-wagner", "di-fgsm", "mi-di-fgsm", "ti-dim", "si-ni-ti-dim", "rays")
GLOBAL = ("square", "random-search", "nes", "spsa", "one-pixel", "l1-auto-pgd")
"""Attacks whose step at one pixel depends on others, such as those that accept or reject a whole image."""


def made(name):
    settings = {"eps": 0.1} if gb.attacks.entry(name).needs("eps") else {}
    known = gb.attacks.entry(name).settings
    brief = {"queries": 60, "steps": 12} if name not in ("fgsm", "r-fgsm", "step-ll", "r-step-ll") else {}
    return gb.attacks.create(name, **settings, **{key: value for key, value in brief.items() if key in known})


def test_settings_that_are_not_for_maps_are_refused_and_masked_losses_do_not_rank():
    model = Pixelwise(3)
    x, y = maps(model)
    with pytest.raises(UserError, match="early_abandon expects one label per image"):
        gb.attacks.Square(eps=0.1, early_abandon=3)(model, x, y, task=TASK)
    with pytest.raises(UserError, match=r"targets = 3: expected None"):
        SEA(eps=0.1, targets=3)
    single = right(model, PGD(eps=0.05, steps=3, loss="mce")(model, x, y, task=TASK), y)
    several = right(model, PGD(eps=0.05, steps=3, loss="mce", restarts=4)(model, x, y, task=TASK), y)
    assert (several <= single).all()


def test_targets_of_maps_are_reached_and_ignored_pixels_are_left():
    model = Pixelwise(2)
    x, y = maps(model, side=12, wrong=0)
    goal = torch.where(y == 255, y, 1 - y)
    reach = breakable(model, x, y, 0.1)
    for attack in (
        SegPGD(eps=0.1, targeted=True),
        CosPGD(eps=0.1, targeted=True),
        SEA(eps=0.1, steps=30, targeted=True),
    ):
        moved = attack(model, x, goal, task=TASK)
        assert torch.equal((model(moved).argmax(1) == goal) & (y != 255), reach)


def test_auto_pgd_follows_the_schedule_of_segpgd_too(monkeypatch):
    assert Loss(kind="js").at(3, 4) == Loss(kind="js")
    model, seen = Patchwise(), []
    x, y = maps(model, count=2)
    weights = Loss._weights
    monkeypatch.setattr(Loss, "_weights", lambda loss, *given: seen.append(loss) or weights(loss, *given))
    AutoPGD(eps=0.02, steps=4, loss="segpgd")(model, x, y, task=TASK)
    assert [loss.wrong_weight for loss in seen if loss.kind == "segpgd"] == [0, 0.125, 0.25, 0.375]
