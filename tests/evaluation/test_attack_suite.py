import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import FGSM, PGD, RFGSM
from gambeson.evaluation import Rate, run_suite
from gambeson.victim import Victim


class Nothing:
    def __call__(self, model, x, y, *, seed=0, task=None):
        self.seen = len(x)
        return x


@pytest.fixture(scope="module")
def suite(trained, digits):
    attacks = {"nothing": Nothing(), "fgsm": FGSM(eps=0.1), "pgd": PGD(eps=0.1, restarts=2), "r-fgsm": RFGSM(eps=0.1)}
    with Victim(trained, fast=True) as victim:
        return run_suite(victim, digits.test, attacks, batch_size=100)


def test_the_suite_keeps_the_worst_case_of_every_image(suite, trained, digits):
    result = suite.result
    assert result.clean == gb.evaluation.accuracy(trained, digits)
    assert [found.attack for found in result.rounds] == ["nothing", "fgsm", "pgd", "r-fgsm"]
    assert result.rounds[0].broken == 0
    assert result.rounds[1].broken > 0
    for before, after in zip(result.rounds, result.rounds[1:], strict=False):
        assert after.tried == before.tried - before.broken  # the fallen are left alone
        assert after.accuracy.value <= before.accuracy.value
    assert result.robust == result.rounds[-1].accuracy
    assert result.success.n == result.rounds[0].tried


def test_stored_images_score_the_reported_number_in_any_batch_size(suite, trained, digits):
    for size in (7, 100, 449):
        with torch.no_grad():
            right = sum(
                int((trained(x).argmax(1) == y).sum())
                for x, y in zip(suite.images.split(size), digits.test.labels.split(size), strict=True)
            )
        assert Rate.of(right, len(digits.test)) == suite.result.robust
    x, _ = digits.test.take(slice(None))
    moved = (suite.images - x).abs().amax((1, 2, 3))
    assert float(moved.max()) <= 0.1 + 1e-6
    assert torch.equal(moved > 0, suite.broken_by >= 0)
    assert suite.result.largest == pytest.approx(float(moved.max()))


def test_an_attack_alone_is_never_stronger_than_the_suite(suite, trained, digits):
    with Victim(trained, fast=True) as victim:
        alone = run_suite(victim, digits.test, {"fgsm": FGSM(eps=0.1)}, batch_size=100)
        nothing = run_suite(victim, digits.test, {"nothing": Nothing()})
    assert suite.result.robust.value < alone.result.robust.value < nothing.result.robust.value
    assert nothing.result.robust == nothing.result.clean
    assert (nothing.result.largest, nothing.result.mean) == (0.0, 0.0)


def test_a_random_model_is_decided_by_many_votes():
    """One draw would break an image of margin 1 under noise of size 2 in three of ten attempts, whatever the attack."""

    class Noisy(nn.Module):
        def forward(self, x):
            margin = x.flatten(1)[:, 0] * 2
            return torch.stack([margin + 2 * torch.randn_like(margin), torch.zeros_like(margin)], 1)

    x = torch.full((200, 1, 1, 2), 0.5)
    split = gb.data.as_split((x, torch.zeros(200, dtype=torch.long)))
    nothing = {"nothing": lambda victim, x, y, **_: x}
    torch.manual_seed(0)
    with Victim(Noisy()) as victim:
        found = run_suite(victim, split, nothing).result
    assert found.votes == 21
    assert found.clean.value > 0.9  # by one draw, 0.69
    with Victim(Noisy()) as victim:
        broken = run_suite(victim, split, {"pgd": PGD(eps=0.5, steps=5, eot_samples=20)}).result
        assert broken.robust.value < 0.8 * broken.clean.value
        unset, ten = ({"pgd": PGD(eps=0.5, steps=5, eot_samples=samples)} for samples in (None, 10))
        assert run_suite(victim, split, unset).counts.right.equal(run_suite(victim, split, ten).counts.right)
