"""A perturbation is not scored on images that it was crafted on, whatever form and order they come back in."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson.attacks import GaborNoise, StochasticPGD, UniversalPerturbation
from gambeson.attacks.universal.stochastic_pgd import ClasswiseStochasticPGD
from gambeson.auditing import Suite
from gambeson.base import UserError
from gambeson.cli.app import run
from gambeson.data import Dataset, LazySplit, Split, disjoint
from gambeson.data.split import image_hashes
from gambeson.evaluation import eps_uni, fooling_rate, universal_evasion

SHAPE = (3, 5, 5)  # 75 pixels: no whole number of 8-byte words
SUITE = Suite(
    eps=(0.1,),
    universal_steps=5,
    universal_restarts=1,
    universal_batch=16,
    pgd_steps=2,
    pgd_restarts=1,
    suite_images=0,
    sample=10,
    queries=0,
    surrogate="none",
    jacobian_backwards=0,
    universal_queries=300,
    eps_uni_runs=0,
    edits=(),
)


class Net(nn.Module):
    """Three classes by the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * x.flatten(2).mean(2)


def pictures(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *SHAPE), generator=draw, dtype=torch.uint8)
    return images, images.double().mean((2, 3)).argmax(1)


@pytest.fixture(scope="module")
def pair():
    return pictures(600)


@pytest.fixture(scope="module")
def uap(pair):
    return StochasticPGD(eps=0.1, steps=5, probe_starts=0, restarts=1).craft(Net(), pair)


def own_of(uap: UniversalPerturbation, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of the pair that were crafted on, whichever they are."""
    own = torch.isin(image_hashes(pair[0]), uap.image_hashes)
    return pair[0][own], pair[1][own]


def test_a_pair_given_twice(uap, pair):
    assert len(uap.image_hashes) == 420
    for rate in (universal_evasion, fooling_rate):
        with pytest.raises(UserError, match=r"^420 of the 420 images that this perturbation was crafted on "):
            rate(Net(), pair, uap)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


@pytest.mark.parametrize(
    "form",
    [
        lambda images: images,
        as_floats,
        lambda images: as_floats(images).half(),
        lambda images: (images.double() / 255 * 2 - 1) / 2 + 0.5,  # normalised and back
        lambda images: as_floats(images).numpy(),
        lambda images: images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ],
)
def test_less_one_image_shuffled_in_another_form(uap, pair, form):
    images, labels = own_of(uap, pair)
    order = torch.randperm(420, generator=torch.Generator().manual_seed(1))[:-1]
    with pytest.raises(UserError, match=r"^419 of the 420 images .* among the 419 to be scored \(data\): score it on"):
        universal_evasion(Net(), (form(images[order]), labels[order]), uap)


@pytest.mark.parametrize("own", [250, 37, 26])
def test_some_of_them_among_others(uap, pair, own):
    images, labels = own_of(uap, pair)
    others = pictures(500 - own, seed=9)
    mixed = torch.cat([others[0], images[:own]]), torch.cat([others[1], labels[:own]])
    with pytest.raises(UserError, match=rf"^{own} of the 420 images .* among the 500 to be scored"):
        universal_evasion(Net(), mixed, uap)


def test_few_that_were_crafted_on_among_many(pair):
    few = pair[0][:40], pair[1][:40]
    uap = StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(Net(), few)
    with pytest.raises(UserError, match=r"^28 of the 28 images .* among the 600 to be scored"):
        universal_evasion(Net(), pair, uap)


def test_a_handful_is_left_out_of_the_rate(uap, pair, tmp_path):
    images, labels = own_of(uap, pair)
    others = pictures(200, seed=9)
    mixed = torch.cat([images[:4], others[0], images[:4]]), torch.cat([labels[:4], others[1], labels[:4]])
    uap.save(tmp_path / "uap.safetensors")
    for one in (uap, UniversalPerturbation.load(tmp_path / "uap.safetensors")):
        found = universal_evasion(Net(), mixed, one)
        assert found.n == 200
        assert found == universal_evasion(Net(), others, one)
        assert fooling_rate(Net(), mixed, one) == fooling_rate(Net(), others, one)
        assert len(Split("mixed", *mixed).without(one.image_hashes)) == 200
        with pytest.raises(UserError, match="420 images"):
            universal_evasion(Net(), pair, one)


def test_a_picture_that_occurs_often_counts_once(uap, pair):
    """Blank pictures in train and test are no reason to refuse."""
    images, labels = own_of(uap, pair)
    others = pictures(100, seed=9)
    blank = images[:1].expand(60, -1, -1, -1), labels[:1].expand(60)
    mixed = torch.cat([others[0], blank[0]]), torch.cat([others[1], blank[1]])
    assert universal_evasion(Net(), mixed, uap).n == 100


def test_what_saw_no_image_is_scored_on_any(pair):
    class Blind(GaborNoise):
        @property
        def sees_train(self) -> bool:
            return False

    blind = Blind(eps=0.1, patterns=2, images=5).craft(Net(), pair)
    assert len(blind.image_hashes) == 0
    assert universal_evasion(Net(), pair, blind).n == 600


def test_each_class_of_a_classwise_attack_keeps_them(pair):
    found = ClasswiseStochasticPGD(eps=0.1, steps=2).craft_classes(Net(), pair)
    assert all(len(one.image_hashes) == 420 for one in found.values())


def splits(train, validation, test):
    parts = [Split(name, *one) for name, one in (("t", train), ("v", validation), ("r", test))]
    return Dataset("three", *parts, parts[0].classes)


def test_splits_that_were_given_twice(pair):
    fresh, attack = pictures(120, seed=5), StochasticPGD(eps=0.1, steps=2, probe_starts=0)
    half = tuple(torch.cat([ours[:60], theirs[:60]]) for ours, theirs in zip(pair, fresh, strict=True))
    with pytest.raises(UserError, match=r"^60 of the 600 images to craft on \(t\) are among the 120 .*\(v\)"):
        attack.craft(Net(), splits(pair, half, fresh))
    floats = as_floats(pair[0]), pair[1]
    partly = [torch.cat([ours[:60], theirs]) for ours, theirs in zip(fresh, pictures(60, seed=6), strict=True)]
    for job in (lambda data: gb.audit(Net(), data, SUITE), lambda data: eps_uni(Net(), data, attack)):
        with pytest.raises(UserError, match=r"^600 of the 600 images of t are among the 600 to be scored \(r\)"):
            job(splits(pair, fresh, floats))
        with pytest.raises(UserError, match=r"^60 of the 120 images of v are among the 120 to be scored \(r\)"):
            job(splits(pair, fresh, partly))


def test_an_audit_says_how_many_were_left_out(pair):
    validation, test = pictures(120, seed=5), pictures(120, seed=6)
    mixed = [torch.cat([a, b[:3], c[:2]]) for a, b, c in zip(test, pair, validation, strict=True)]
    found = gb.audit(Net(), splits(pair, validation, mixed), SUITE).results
    assert found.material.test == found.clean.n == found.middle.uer.n == 120
    assert "5 of 125 test images were left out: they also occur in train or validation." in found.notes
    clean = gb.audit(Net(), splits(pair, validation, test), SUITE).results
    assert clean.middle.uer == found.middle.uer
    assert not any("left out: the same" in note for note in clean.notes)


def test_a_data_set_without_equal_pictures_is_left_alone(digits):
    assert disjoint(digits) is digits


def test_uap_score(trained, digits, tmp_path, capsys):
    gb.models.save(trained, tmp_path / "m.safetensors")
    uap = StochasticPGD(eps=0.1, steps=2, probe_starts=0).craft(trained, digits)
    command = ["uap", "score", "", "--model", str(tmp_path / "m.safetensors"), "--data", "digits", "--json"]
    for own, count in (("few", 3), ("all", len(digits.test))):
        seen = torch.cat([uap.image_hashes, digits.test.image_hashes[:count]])
        command[2] = str(tmp_path / f"{own}.safetensors")
        UniversalPerturbation(uap.delta, uap.about, seen).save(command[2])
    command[2] = str(tmp_path / "few.safetensors")
    assert run(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["left_out"], found["uer"]["n"], found["clean"]["n"]) == (3, 446, 446)
    assert run(command[:-1]) == 0
    assert "3 of the 449 images of digits/test were left out" in capsys.readouterr().err
    command[2] = str(tmp_path / "all.safetensors")
    assert run(command) == 2
    assert "449 of the 1527 images" in capsys.readouterr().err


# The hashes.


def mixed(word: int) -> int:
    """SplitMix64's mixer in Python's integers."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_hashes_are_what_files_hold():
    images, _ = pictures(3)
    for image, found in zip(images, image_hashes(images).tolist(), strict=True):
        data = bytes(image.flatten().tolist()) + b"\0" * 5
        total = 0
        for place in range(0, 80, 8):
            key = mixed((place // 8 + 1) * 0x9E3779B97F4A7C15 % 2**64)
            total += mixed((int.from_bytes(data[place : place + 8], "little") + key) % 2**64)
        assert found % 2**64 == mixed(total % 2**64)


def test_no_two_images_share_a_hash():
    black_and_grey = torch.tensor(list(itertools.product((0, 128), repeat=16)), dtype=torch.uint8).view(-1, 1, 4, 4)
    levels = torch.arange(256, dtype=torch.uint8).repeat_interleave(256), torch.arange(256, dtype=torch.uint8)
    two = torch.stack([levels[0], levels[1].repeat(256)], 1).view(-1, 1, 1, 2)
    for images in (black_and_grey, two):
        assert len(image_hashes(images).unique()) == len(images) == 65536
    image = torch.arange(75, dtype=torch.uint8).view(1, *SHAPE)
    exchanged = [image]
    for apart in (1, 8):  # within a word, and between words
        for place in range(75 - apart):
            other = image.clone()
            other.view(-1)[[place, place + apart]] = other.view(-1)[[place + apart, place]]
            exchanged.append(other)
    assert len(image_hashes(torch.cat(exchanged)).unique()) == len(exchanged) == 142


def test_a_stream_has_the_hashes_of_its_pictures(pair):
    whole = Split("whole", *pair)
    stream = LazySplit("s", lambda number: (pair[0][number], pair[1][number]), pair[1], whole.classes, None, 0)
    assert torch.equal(stream.image_hashes, whole.image_hashes)
    assert torch.equal(stream.sample(50).image_hashes, whole.image_hashes[whole.sample_indices(50)])
    assert whole.to("cpu").subset([3]).image_hashes == whole.image_hashes[3]
    assert len(image_hashes(pair[0][:0])) == 0


def test_hashing_is_fast():
    images = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8)
    began = time.process_time()
    image_hashes(images)
    assert time.process_time() - began < 1  # 0.05 s; one image at a time by hashlib takes 0.2 s
