"""Auto-PGD and its L1 form, step by step: the papers' algorithms in plain loops over one image after the other."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from gambeson.attacks import AutoPGD, L1AutoPGD
from gambeson.attacks.gradient.auto_pgd import State
from gambeson.attacks.gradient.base import BestSoFar
from gambeson.base import generator
from gambeson.threat import Ball
from tests.conftest import full, shaded_images

SHAPE = (1, 4, 4)


def curved(classes=4, seed=0):
    """A net whose loss rises and falls along a step, so that every rule has something to decide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, classes))
        net[1].weight.data *= 6
        net[3].weight.data *= 6
    return net.eval()


class Look:
    """Loss, its gradient and success of every image of a batch at ``delta``."""

    def __init__(self, net, x, y):
        self.net, self.x, self.y = net, x, y

    def __call__(self, delta):
        point = (self.x + delta).requires_grad_()
        logits = self.net(point)
        value = nn.functional.cross_entropy(logits, self.y, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient, logits.argmax(1) != self.y


def kept_by(marks):
    """Index of the first of the best: adversarial before not, then by loss."""
    return max(range(len(marks)), key=lambda k: (marks[k][0], marks[k][1], -k))


def started(x, ball, seed=0):
    delta = ball.uniform(x.shape, generator(seed, "start", "0")).to(x)
    return torch.minimum(torch.maximum(delta, -x), 1 - x)


def by_the_paper(net, x, y, ball, steps):
    """Croce and Hein 2020, algorithm 1, with rho = alpha = 0.75 and a first step of two eps; momentum is reset."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    checkpoints = [math.ceil(round(share * steps, 6)) for share in shares]
    look = Look(net, x, y)

    def project(delta):
        return torch.minimum(torch.maximum(ball.project(delta), -x), 1 - x)

    delta = started(x, ball)
    before = delta.clone()
    length = torch.full((len(x), 1, 1, 1), 2 * ball.eps)
    value, gradient, down = look(delta)
    points, values, downs, gradients = [delta], [value], [down], [gradient]
    best = [0] * len(x)  # the step at which each image's loss was highest
    rises, halved, at_check = [0] * len(x), [False] * len(x), value.clone()
    halvings = 0
    for step in range(1, steps + 1):
        if step - 1 in checkpoints and step > 1:
            since = step - 1 - max(k for k in checkpoints if k < step - 1)
            delta, before, gradient, value = delta.clone(), before.clone(), gradient.clone(), value.clone()
            for i in range(len(x)):
                top = values[best[i]][i]
                halve = rises[i] < 0.75 * since or (not halved[i] and bool(top <= at_check[i]))
                if halve:
                    length[i] /= 2
                    delta[i] = before[i] = points[best[i]][i]
                    gradient[i], value[i] = gradients[best[i]][i], top
                    halvings += 1
                rises[i], halved[i], at_check[i] = 0, halve, top
        moved = project(delta + length * ball.steepest(gradient))
        if step > 1:
            moved = project(delta + 0.75 * (moved - delta) + 0.25 * (delta - before))
        before, delta, last = delta, moved, value
        value, gradient, down = look(delta)
        points.append(delta), values.append(value), downs.append(down), gradients.append(gradient)
        for i in range(len(x)):
            rises[i] += bool(value[i] > last[i])
            if value[i] > values[best[i]][i]:
                best[i] = step
    assert halvings > len(x)
    chosen = [kept_by([(bool(d[i]), float(v[i])) for d, v in zip(downs, values, strict=True)]) for i in range(len(x))]
    return torch.stack([points[k][i] for i, k in enumerate(chosen)])


def sparsely(net, x, y, ball, steps):
    """Croce and Hein 2021, algorithm 1, on one radius: adaptive sparsity, no momentum; stuck values are skipped."""
    look, size = Look(net, x, y), x[0].numel()
    delta = started(x, ball)
    delta = ball.project_in_box(delta, -x, 1 - x)
    value, gradient, down = look(delta)
    points, values, downs, gradients = [delta], [value], [down], [gradient]
    best, length, moved = [0] * len(x), [ball.eps] * len(x), [0.2 * size] * len(x)
    changed, every, kinds = [float(size)] * len(x), max(1, math.floor(0.04 * steps)), set()
    for step in range(1, steps + 1):
        if step > 1 and (step - 1) % every == 0:
            delta, gradient = delta.clone(), gradient.clone()
            for i in range(len(x)):
                count = int((points[best[i]][i] != 0).sum())
                sparser = count < 0.95 * changed[i]
                if sparser:
                    length[i] = ball.eps
                    delta[i], gradient[i] = points[best[i]][i], gradients[best[i]][i]
                else:
                    length[i] = max(length[i] / 1.5, ball.eps / 10)
                kinds.add((sparser, length[i] == ball.eps / 10))
                moved[i], changed[i] = count / 1.5, float(count)
        step_of = torch.zeros_like(x)
        for i in range(len(x)):
            room = torch.where(gradient[i] > 0, 1 - x[i] - delta[i], x[i] + delta[i])
            usable = torch.where(room > 0, gradient[i], 0.0).flatten()
            count = min(max(int(moved[i]), 1), size)
            marks = usable.abs() >= usable.abs().sort(descending=True).values[count - 1]
            signs = usable.sign() * marks
            step_of[i] = (length[i] * signs / signs.abs().sum().clamp(min=1)).view(SHAPE)
        delta = ball.project_in_box(delta + step_of, -x, 1 - x)
        value, gradient, down = look(delta)
        points.append(delta), values.append(value), downs.append(down), gradients.append(gradient)
        for i in range(len(x)):
            if value[i] > values[best[i]][i]:
                best[i] = step
    assert kinds == {(True, False), (False, False), (False, True)}
    chosen = [kept_by([(bool(d[i]), float(v[i])) for d, v in zip(downs, values, strict=True)]) for i in range(len(x))]
    return torch.stack([points[k][i] for i, k in enumerate(chosen)])


def pictures(count):
    net, x = curved(), shaded_images(count, SHAPE, seed=1)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


@pytest.mark.parametrize(("norm", "eps"), [("inf", 0.02), ("inf", 0.3), ("2", 0.3)])
def test_every_step_is_that_of_the_paper(norm, eps):
    net, x, y = pictures(6)
    found = AutoPGD(eps=eps, norm=norm, steps=30, early_stop=False, exact_box=False)(net, x, y) - x
    torch.testing.assert_close(found, by_the_paper(net, x, y, Ball(eps=eps, norm=norm), 30), rtol=0, atol=2e-6)


@pytest.mark.parametrize("eps", [3.0, full(0.3)])
def test_every_sparse_step_is_that_of_the_paper(eps):
    net, x, y = pictures(5)
    attack = L1AutoPGD(eps=eps, steps=50, radii=(1.0,), portions=(1.0,), early_stop=False)
    found = attack(net, x, y) - x
    torch.testing.assert_close(found, sparsely(net, x, y, Ball(eps=eps, norm="1"), 50), rtol=0, atol=2e-6)


def test_success_comes_before_the_loss_and_the_first_of_equals_stays():
    draw = torch.Generator().manual_seed(0)
    record = BestSoFar.into(torch.zeros(30, 1, 1, 1))
    marks = [[] for _ in range(30)]
    for turn in range(6):
        rows = torch.randperm(30, generator=draw)[:20]
        values, down = torch.randint(4, (20,), generator=draw).float(), torch.rand(20, generator=draw) < 0.3
        record.note(rows, torch.full((20, 1, 1, 1), turn + 1.0), values, down)
        for row, value, success in zip(rows.tolist(), values.tolist(), down.tolist(), strict=True):
            marks[row].append((success, value, turn + 1.0))
    expected = [one[kept_by(one)][2] if one else 0.0 for one in marks]
    assert record.delta.flatten().tolist() == expected
    assert record.is_adversarial.tolist() == [any(success for success, *_ in one) for one in marks]


def state(**given):
    """A state of images of one pixel, whose fields are zero unless they are given by image."""
    count = len(next(iter(given.values())))
    fields = {field.name: torch.zeros(count) for field in dataclasses.fields(State)}
    wide = ("images", "delta", "before", "gradient", "best", "best_gradient")
    fields |= {name: torch.zeros(count, 1, 1, 1) for name in wide}
    return State(**fields | {name: torch.tensor(values) for name, values in given.items()})


def test_a_step_is_halved_by_either_condition_of_the_paper():
    """Fewer than three of four steps that rose; or the same best loss as before, unless the last check halved too."""
    now = state(
        rises=[2.0, 3.0, 4.0, 4.0, 4.0, 2.0],
        halved=[False, False, False, False, True, True],
        checked_value=[1.0, 1.0, 1.0, 2.0, 2.0, 1.0],
        best_value=[2.0] * 6,
        length=[8.0] * 6,
    )
    found = now.at_checkpoint(4, 0.75)
    assert found.halved.tolist() == [True, False, False, True, False, True]
    assert found.length.tolist() == [4.0, 8.0, 8.0, 4.0, 8.0, 4.0]
    assert found.rises.tolist() == [0.0] * 6
    assert found.checked_value.tolist() == [2.0] * 6


def test_a_step_that_raises_the_loss_counts_also_below_the_best():
    now = state(value=[1.0, 1.0, 1.0, 1.0], best_value=[3.0, 3.0, 1.0, 1.0], rises=[5.0, 5.0, 5.0, 5.0])
    found = now.after_step(now.delta + 1, now.gradient + 2, torch.tensor([2.0, 0.5, 1.5, 1.0]))
    assert found.rises.tolist() == [6.0, 5.0, 6.0, 5.0]
    assert found.best_value.tolist() == [3.0, 3.0, 1.5, 1.0]
    assert found.best.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]
    assert found.best_gradient.flatten().tolist() == [0.0, 0.0, 2.0, 0.0]


def test_sparsity_is_checked_after_every_25th_of_the_steps():
    for steps, every in ((10, 1), (50, 2), (75, 3), (100, 4), (250, 10)):
        assert L1AutoPGD(eps=1.0, steps=steps).checkpoints == list(range(every, steps, every))
