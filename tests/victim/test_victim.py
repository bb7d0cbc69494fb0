import pytest
import torch
from torch import nn

from gambeson import UserError
from gambeson.data import Split
from gambeson.victim import Victim, predict, score, vote
from gambeson.victim.scoring import predicted


def mixed():
    """A net whose parts are in unlike states: a BatchNorm frozen by its user, one parameter without gradient."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )
    net.train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    return net


def state(net):
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    return modes, flags, [value.clone() for value in net.state_dict().values()]


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def test_everything_comes_back_as_it_was_also_after_an_exception():
    net = mixed()
    before = state(net)
    with Victim(net) as victim:
        assert not any(module.training for module in net.modules())
        assert not any(parameter.requires_grad for parameter in net.parameters())
        victim(torch.rand(5, 1, 4, 4))
    assert same(before, state(net))
    with pytest.raises(ZeroDivisionError), Victim(net):
        raise ZeroDivisionError
    assert same(before, state(net))


def test_work_is_counted_in_images():
    with Victim(mixed()) as victim:
        x = torch.rand(5, 1, 4, 4, requires_grad=True)
        victim.gradient(victim(x).sum(), x, 5)
        victim(torch.rand(2, 1, 4, 4))
    assert (victim.forwards, victim.backwards) == (7, 5)


def test_outputs_with_logits_are_taken_and_others_refused():
    class Odd(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(x.flatten(1))

    with Victim(Odd(lambda z: type("Out", (), {"logits": z})())) as victim:
        assert victim(torch.rand(2, 1, 1, 3)).shape == (2, 3)
    for wrap in (lambda z: [z], lambda z: (z, None), lambda z: {"logits": z}, lambda z: {"out": z, "aux": -z}):
        with Victim(Odd(wrap)) as victim:
            images = torch.rand(2, 1, 1, 3)
            torch.testing.assert_close(victim(images), images.flatten(1))
    for wrap, words in ((lambda z: {"scores": z}, "dict with the keys scores"), (lambda z: 3, "returned int")):
        with Victim(Odd(wrap)) as victim, pytest.raises(UserError, match=f"{words}: expected"):
            victim(torch.rand(2, 1, 1, 3))


def test_wrong_channels_are_named():
    with (
        Victim(mixed()) as victim,
        pytest.raises(UserError, match="images have 3 channels, but the model takes 1"),
    ):
        victim(torch.rand(2, 3, 4, 4))


class Lookup(nn.Module):
    """Answers with the channels themselves: predictions are whatever the test wrote into the images."""

    def forward(self, x):
        return x


def test_pixels_are_scored_without_the_ignored_ones():
    images = torch.zeros(2, 3, 2, 2)
    images[:, 1] = 1.0  # predicts class 1 everywhere
    labels = torch.tensor([[[1, 1], [0, 255]], [[1, 2], [255, 255]]])
    split = Split("maps", images, labels, ("a", "b", "c"), ignore_index=255)
    with Victim(Lookup()) as victim:
        predictions = predict(victim, split)
        moved = predict(victim, split, torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    found = score(predictions, split)
    assert (found.errors, found.total, found.counts.images) == (2, 5, 2)
    assert score(moved, split, predictions).changed.tolist() == [3, 2]
    assert score(moved, split, predictions).change_rate.value == 1
    assert score(moved, split, predictions).errors == 4


def test_broken_logits_stop_the_scoring():
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1) / 0.0

    split = Split("zeros", torch.zeros(4, 1, 1, 2), torch.tensor([0, 1, 0, 1]))
    with (
        Victim(Broken()) as victim,
        pytest.raises(UserError, match="NaN or infinite logits for 4 of 4 images"),
    ):
        predict(victim, split)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_answer_as_in_evaluation_mode_and_come_back(kind):
    """They are held in training mode, in which cuDNN has a gradient, without their dropout."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.drop = kind(4, 5, num_layers=3, dropout=0.5, batch_first=True), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.rnn(x.flatten(1, 2))[0][:, -1])

    x = torch.rand(6, 1, 4, 4)
    for training in (True, False):
        net = Recurrent().train(training)
        with torch.no_grad():
            expected = net.eval()(x)
        net.train(training)
        with Victim(net) as victim:
            assert torch.allclose(victim(x), expected, atol=1e-6)
            assert net.rnn.training
            assert not net.drop.training
        assert net.rnn.training == training
        assert net.rnn.dropout == 0.5


def test_predict_and_vote_take_arrays(trained, digits):
    with Victim(trained) as victim:
        expected = predict(victim, digits.test)
        images, labels = digits.test.images, digits.test.labels
        for data in (digits, (images.numpy(), labels.numpy()), (images.float() / 255, labels.tolist())):
            assert torch.equal(predict(victim, data), expected)
        for batch in (images[:20], images[:20].numpy(), (images[:20] / 255).numpy()):
            assert torch.equal(vote(victim, batch), expected[:20])
        with pytest.raises(UserError, match=r"images must lie in \[0, 1\]|expected"):
            predict(victim, images[:3].numpy())


def test_a_class_that_is_masked_by_infinity_is_named():
    logits = torch.randn(4, 10)
    logits[:, [3, 7]] = -torch.inf
    with pytest.raises(UserError, match="-inf for every image at class 3, 7: give a masked class a large negative"):
        predicted(logits)
    logits[0, 1] = -torch.inf
    with pytest.raises(UserError, match="NaN or infinite logits for 4 of 4 images"):
        predicted(logits)
