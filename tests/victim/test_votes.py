"""The majority of a random model's votes, by counting them."""

from collections import Counter

import pytest
import torch
from torch import nn

from gambeson import UserError
from gambeson.data import Split
from gambeson.tasks import Rate
from gambeson.victim import ABSTAIN, Victim, predict, score, vote
from gambeson.victim.scoring import majority, predicted, votes_right


def counted(votes):
    """The class with more than half of the votes of one image, or none."""
    value, hits = Counter(votes).most_common(1)[0]
    return value if 2 * hits > len(votes) else ABSTAIN


@pytest.mark.parametrize("passes", [1, 2, 3, 4, 5, 21])
def test_the_majority_is_more_than_half_of_the_votes(passes):
    draw = torch.Generator().manual_seed(passes)
    votes = torch.randint(3, (passes, 400), generator=draw)
    votes[: passes // 2, :40] = 1  # half of the votes, rounded down, are of one class
    expected = [counted(column.tolist()) for column in votes.T]
    assert majority(votes).tolist() == expected
    assert passes == 1 or ABSTAIN in expected
    assert majority(votes.view(passes, 20, 20)).flatten().tolist() == expected  # label maps


class InTurn(nn.Module):
    """Answers with the columns of ``script``, (images, passes), one after the other; the first pixel names the image.

    Args:
        script: classes.
        classes: number of classes.
    """

    def __init__(self, script, classes=3):
        super().__init__()
        self.script, self.classes = script, classes
        self.begin()

    def begin(self):
        self.calls = torch.zeros(len(self.script), dtype=torch.long)

    def forward(self, x):
        rows = (x[:, 0, 0, 0] * 255).round().long()
        answers = self.script[rows, self.calls[rows]]
        self.calls[rows] += 1
        return nn.functional.one_hot(answers, self.classes).float()


@pytest.mark.parametrize("passes", [1, 2, 3, 5, 6])
def test_voting_ends_early_only_where_nothing_could_change(passes):
    script = torch.randint(3, (60, passes + 1), generator=torch.Generator().manual_seed(passes))
    script[:20, : passes // 2 + 1] = 2  # one more than half: decided before the rest is asked
    script[20:30, : passes // 2] = 0
    script[20:30, passes // 2 :] = 1
    images = (torch.arange(60) / 255).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    expected = [counted(row[:passes].tolist()) for row in script]
    model = InTurn(script)
    with Victim(model) as victim:
        victim.votes = passes
        assert vote(victim, images).tolist() == expected
        model.begin()
        labels = torch.zeros(60, dtype=torch.long)
        right = votes_right(victim, images, labels)
        assert right.tolist() == (script[:, :passes] == 0).sum(1).tolist()


def test_an_image_without_a_majority_is_wrong_whatever_its_label():
    script = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 1, 2], [2, 1, 2, 1, 0]])
    images = (torch.arange(3) / 255).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    for label, hits in ((0, 1), (1, 0), (2, 0)):
        split = Split("three", images, torch.full((3,), label), ("a", "b", "c"))
        with Victim(InTurn(script)) as victim:
            victim.votes = 5
            found = predict(victim, split)
        assert found.tolist() == [ABSTAIN, 0, ABSTAIN]
        assert score(found, split).counts.accuracy == Rate.of(hits, 3)


class SharedCoin(nn.Module):
    """One coin per forward, which all its images share: class 1 where it shows heads, in 60 % of forwards."""

    def forward(self, x):
        self.most = max(getattr(self, "most", 0), len(x))
        head = torch.rand(()) < 0.6
        return torch.where(head, torch.tensor([-1.0, 2.0]), torch.tensor([2.0, -1.0])).expand(len(x), 2)


def test_images_that_share_a_draw_are_decided_few_at_a_time():
    """An interval over images takes them as independent: 200 that share every draw would all be right, or all wrong."""
    images, model = torch.rand(200, 1, 2, 2), SharedCoin()
    with Victim(model) as victim:
        assert victim.inspect(images).shared
        for count in (lambda: vote(victim, images), lambda: votes_right(victim, images, torch.ones(200).long())):
            model.most = 0
            found = count()
            assert model.most == 25
            assert found.shape == (200,)
            alike = found.view(8, 25)  # what shares its draws has one answer
            assert bool((alike == alike[:, :1]).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_logit_that_is_not_finite_is_no_answer(value):
    for shape, where in (((4, 3), (2, 1)), ((4, 3, 2, 2), (2, 1, 0, 1))):
        logits = torch.zeros(shape)
        logits[where] = value
        with pytest.raises(UserError, match="infinite logits for 1 of 4 images"):
            predicted(logits)


def test_flips_are_counted_where_labels_are_and_nowhere_else():
    labels = torch.tensor([0, 1, 2, 9, 9, 0])
    split = Split("six", torch.zeros(6, 1, 2, 2), labels, ("a", "b", "c"), ignore_index=9)
    clean, now = torch.tensor([0, 0, 2, 0, 1, 1]), torch.tensor([1, 0, 0, 2, 2, 0])
    found = score(now, split, clean)
    assert (found.flipped, found.errors, found.total) == (3, 3, 4)
    assert found.changed.tolist() == [1, 0, 1, 0, 0, 1]
    assert found.change_rate == Rate.of(3, 4)
    maps = torch.stack([labels, labels.flip(0)]).view(2, 2, 3)
    split = Split("maps", torch.zeros(2, 1, 2, 3), maps, ("a", "b", "c"), ignore_index=9)
    both = [torch.stack([one, one]).view(2, 2, 3) for one in (now, clean)]
    found = score(both[0], split, both[1])
    assert found.changed.tolist() == [3, 4]
    assert found.counts.total.tolist() == [4, 4]


def test_other_seeds_are_other_votes():
    split = Split("made", torch.rand(40, 1, 2, 2), torch.arange(40) % 2, ("a", "b"))

    class Coin(nn.Module):
        def forward(self, x):
            z = torch.rand(len(x), 1) - 0.5
            return torch.cat([z, -z], 1) * 10

    with Victim(Coin()) as victim:
        first, again, other = (predict(victim, split, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert 0.2 < float((first != other).float().mean()) < 0.8
