"""Mean IoU of models on label maps, clean and under a universal perturbation."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

import gambeson as gb
from gambeson.attacks import StochasticPGD, Target, UniversalPerturbation
from gambeson.base import UserError
from gambeson.cli.app import run
from gambeson.data import Dataset, LazySplit, Split
from gambeson.evaluation import strongest
from gambeson.evaluation.eps_uni import Found, scaled, search
from gambeson.evaluation.universal import errors_under, lost_iou
from gambeson.tasks import Counts, Rate
from gambeson.victim import Victim, predict


class Pixelwise(nn.Module):
    """Class 1 where a pixel is bright."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


def split(name, count=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 8, 8, generator=draw)
    labels = (images[:, 0] > 0.5).long()
    labels[torch.rand(labels.shape, generator=draw) < 0.1 + 0.1 * torch.rand(count, 1, 1, generator=draw)] = 0
    labels[:, 0, 0] = 255
    return Split(name, images, labels, ("dark", "bright"), ignore_index=255)


DATA = Dataset("maps", split("train", seed=1), split("validation", seed=2), split("test", seed=3), ("dark", "bright"))


def test_mean_iou_and_accuracy_of_a_model_equal_their_definition():
    truth, predicted = DATA.test.labels, (DATA.test.images[:, 0] > 0.5).long()
    valid = truth != 255
    iou = [
        float(((predicted == k) & (truth == k)).sum() / (((predicted == k) | (truth == k)) & valid).sum())
        for k in (0, 1)
    ]
    found = gb.evaluation.confusion(Pixelwise(), DATA)
    assert {name: rate.value for name, rate in found.iou.items()} == pytest.approx({"dark": iou[0], "bright": iou[1]})
    rate = gb.evaluation.mean_iou(Pixelwise(), DATA)
    assert rate == found.mean_iou
    assert (rate.value, rate.n) == (pytest.approx(sum(iou) / 2), 60)
    assert found.accuracy == gb.evaluation.accuracy(Pixelwise(), DATA)
    # 63 pixels of 60 images: narrower than 60 answers would be, wider than the 3780 pixels if they were independent.
    assert rate.high - rate.low < 0.3 * (Rate.of(50, 60).high - Rate.of(50, 60).low)


def test_a_perturbation_lowers_the_mean_iou_and_nothing_does_not():
    found = gb.evaluation.confusion(Pixelwise(), DATA)
    uap = StochasticPGD(eps=0.2, steps=10).craft(Pixelwise(), DATA)
    moved = gb.evaluation.confusion(Pixelwise(), DATA, uap)
    assert moved.mean_iou == gb.evaluation.mean_iou(Pixelwise(), DATA.test, uap)
    assert moved.accuracy.value == pytest.approx(1 - gb.evaluation.universal_evasion(Pixelwise(), DATA, uap).value)
    drop = found.drop(moved)
    assert drop.value == pytest.approx(found.mean_iou.value - moved.mean_iou.value)
    assert drop.low > 0.05
    still = type(uap)(torch.zeros_like(uap.delta), uap.about, uap.image_hashes)
    same = gb.evaluation.confusion(Pixelwise(), DATA, still)
    assert same.mean_iou == found.mean_iou
    assert found.drop(same).value == 0
    assert gb.evaluation.fooling_rate(Pixelwise(), DATA, still).value == 0


def test_data_without_a_label_is_refused():
    nothing = Split("nothing", DATA.test.images, DATA.test.labels.clone().fill_(255), ("dark", "bright"), 255)
    with pytest.raises(UserError, match="nothing has no label that counts"):
        gb.evaluation.mean_iou(Pixelwise(), nothing)


def test_notebooks_show_the_classes_and_their_means():
    pytest.importorskip("pandas")
    confusion = gb.evaluation.confusion(Pixelwise(), DATA)
    found = confusion.to_frame()
    names = ["pixel accuracy", "mean accuracy", "mean IoU", "IoU of dark", "IoU of bright"]
    assert found["metric"].tolist() == names
    assert found["value"][2] == pytest.approx(found["value"][3:].mean())
    (bars,) = confusion.plot().data
    assert (list(bars.x), list(bars.y)) == (["dark", "bright"], pytest.approx((100 * found["value"][3:]).tolist()))
    assert f"mean IoU        {confusion.mean_iou}" in repr(confusion)
    assert str(confusion.iou["dark"]) in confusion._repr_html_()


def scenes(count, seed, spread=1.0):
    """Label maps of which half of the pixels is class 0, each at its own distance below 1/2, uniform on [0, 0.2].

    ``spread``: share of that distance which the pixels of an image have in common.
    """
    draw = torch.Generator().manual_seed(seed)
    own = 0.2 * torch.rand(count, 1, 8, 4, generator=draw)
    common = 0.2 * torch.rand(count, 1, 1, 1, generator=draw)
    chosen = torch.rand(count, 1, 1, 1, generator=draw) < spread
    dark = 0.5 - torch.where(chosen, common, own)
    bright = 0.7 + 0.1 * torch.rand(count, 1, 8, 4, generator=draw)
    labels = torch.cat([torch.zeros(count, 8, 4), torch.ones(count, 8, 4)], 2).long()
    return Split(f"scenes/{seed}", torch.cat([dark, bright], 3), labels, ("dark", "bright"))


ABOUT = StochasticPGD(eps=0.1, steps=1).craft(Pixelwise(), DATA).about


def brighter(eps, start=None):
    """The best perturbation: only dark pixels can fall, and all fall in one direction."""
    return UniversalPerturbation(torch.full((1, 1, 8, 8), eps), ABOUT.model_copy(update={"eps": eps}))


def searched(test, delta, measure, tolerance=0.01, **settings):
    few = scenes(20, 1)
    data = Dataset("scenes", few, few, test, few.classes)
    with Victim(Pixelwise()) as victim:
        return search(
            victim,
            data,
            brighter,
            norm="inf",
            delta=delta,
            tolerance=tolerance,
            controls=(),
            measure=measure,
            **settings,
        )


def test_eps_uni_of_the_mean_iou_is_where_its_formula_says():
    """With a share f of the dark pixels taken for bright ones, IoU is 1 - f and 1 / (1 + f)."""
    test = scenes(100, 2)
    margins = (0.5 - test.images[:, :, :, :4]).flatten().sort().values
    found = searched(test, 0.5, lost_iou)
    f = (5**0.5 - 1) / 2  # 1 - f + 1 / (1 + f) = 1
    assert found.value == pytest.approx(float(margins[int(f * len(margins))]), rel=0.02)
    assert found.measure == "mean-iou"
    assert found.low < found.value < found.high
    # Of all pixels half are bright, so that the error reaches 0.3 with f = 0.6.
    error = searched(test, 0.3, errors_under)
    assert error.value == pytest.approx(float(margins[int(0.6 * len(margins))]), rel=0.02)
    assert error.measure == "error"


def test_eps_uni_of_a_target_is_where_it_succeeds():
    def bright(victim, split, delta=None):
        """Pixels taken for bright ones, among those that are dark."""
        hits = (predict(victim, split, delta) == 1) & (split.labels == 0)
        total = (split.labels == 0).flatten(1).sum(1)
        return Counts(total - hits.flatten(1).sum(1), total)

    test = scenes(100, 3)
    margins = (0.5 - test.images[:, :, :, :4]).flatten().sort().values
    found = searched(test, 0.8, bright)
    assert found.value == pytest.approx(float(margins[int(0.8 * len(margins)) - 1]), rel=0.02)
    assert found.measure == "bright"
    with pytest.raises(UserError, match="measure 'miou'"):
        gb.evaluation.eps_uni(Pixelwise(), DATA, StochasticPGD(eps=0.1), measure="miou")


def test_the_public_search_measures_what_it_is_asked():
    attack = StochasticPGD(eps=0.1, steps=3, probe_starts=0)
    for measure, function in (("error", errors_under), ("mean-iou", lost_iou)):
        found = gb.evaluation.eps_uni(Pixelwise(), DATA, attack, delta=0.5, tolerance=0.2, controls=(), measure=measure)
        assert (found.measure, found.censored) == (measure, False)
        with Victim(Pixelwise()) as victim:
            assert function(victim, DATA.test, torch.full((1, 1, 8, 8), 0.0)).error < 0.5
        assert min(error for eps, error in found.tried if eps == found.value) >= 0.5


def test_the_interval_of_eps_uni_of_maps_covers_where_images_are_alike_within():
    f, hits = (5**0.5 - 1) / 2, 0
    for k in range(25):
        found = searched(scenes(60, 10 + k), 0.5, lost_iou, tolerance=0.2, seed=k)
        hits += found.low <= 0.2 * f <= found.high
        assert found.high - found.low < 0.08  # 3.9 standard errors of a share of 60 images are 0.05
    assert hits >= 21


def test_label_maps_that_are_read_with_their_images_have_the_same_rates():
    """Data that does not fit in memory is counted batch by batch."""
    test = DATA.test
    lazy = LazySplit(
        test.name, lambda k: (test.images[k], test.labels[k].to(torch.uint8)), len(test), test.classes, 255, workers=0
    )
    uap = brighter(0.15)
    for rate in (gb.evaluation.universal_evasion, gb.evaluation.fooling_rate, gb.evaluation.mean_iou):
        assert rate(Pixelwise(), lazy, uap) == rate(Pixelwise(), test, uap)
    assert gb.evaluation.accuracy(Pixelwise(), lazy) == gb.evaluation.accuracy(Pixelwise(), test)
    assert gb.evaluation.fooling_rate(Pixelwise(), test, uap).value > 0.1


def test_uap_score_prints_the_error_and_the_mean_iou_of_label_maps(tmp_path, capsys):
    draw = torch.Generator().manual_seed(7)
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for k in range(40):
        pixels = (torch.rand(8, 8, generator=draw) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{k}.png")
        Image.fromarray((pixels > 127).astype("uint8")).save(tmp_path / "data" / "masks" / f"{k}.png")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Pixelwise(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.cat([0.5 - x, x - 0.5], 1)\n"
    )
    file, data = str(tmp_path / "uap.safetensors"), f"mask-folder:{tmp_path / 'data'}?mode=grey"
    common = [f"{tmp_path / 'net.py'}:Pixelwise", "--data", data]
    craft = ["uap", "craft", *common, "--eps", "0.2", "--set", "steps=10", "--set", "restarts=1", "--out", file]
    assert run(craft) == 0
    capsys.readouterr()
    assert run(["uap", "score", file, *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clean"]["value"], found["mean_iou"]["clean"]["value"]) == (0, 1)
    assert found["uer"]["value"] == pytest.approx(found["fooling"]["value"])
    assert found["uer"]["value"] > 0.1
    assert found["mean_iou"]["perturbed"]["value"] < 0.9
    assert found["mean_iou"]["lost"]["value"] == pytest.approx(1 - found["mean_iou"]["perturbed"]["value"])
    assert found["mean_iou"]["lost"]["low"] > 0.05
    assert run(["uap", "score", file, *common]) == 0
    printed = "".join(capsys.readouterr())
    assert f"rates are of labelled pixels, their intervals over {found['uer']['n']} images" in printed
    assert f"mean IoU lost  +{100 * found['mean_iou']['lost']['value']:.1f} % [" in printed


def test_eps_uni_of_an_attack_with_a_target_is_that_of_its_success():
    data = Dataset("scenes", scenes(20, 4), scenes(20, 5), scenes(100, 6), ("dark", "bright"))
    settings = {"delta": 0.8, "tolerance": 0.05, "controls": ()}
    margins = (0.5 - data.test.images[:, :, :, :4]).flatten().sort().values
    exact = float(margins[int(0.6 * len(margins))])  # half of all pixels are bright; 0.6 of the others have to follow
    bright = StochasticPGD(eps=0.1, steps=4, probe_starts=0, target=1)
    found = gb.evaluation.eps_uni(Pixelwise(), data, bright, **settings)
    assert found.value == pytest.approx(exact, rel=0.06)
    assert found.measure == "target class:1"
    # All images have one map, which is reached without an attack.
    static = bright.model_copy(update={"target": Target.parse("static:0"), "labels": "prediction"})
    with pytest.raises(UserError, match="clean images"):
        gb.evaluation.eps_uni(Pixelwise(), data, static, **settings)
    error = gb.evaluation.eps_uni(Pixelwise(), data, bright, **settings | {"delta": 0.3}, measure="error")
    assert (error.measure, error.value) == ("error", pytest.approx(exact, rel=0.06))


def test_validation_chooses_by_what_is_measured():
    """The crafted perturbation does more harm, and the known one, scaled, more of what is asked for."""

    def dark(victim, split, delta=None):
        hits = (predict(victim, split, delta) == 0) & (split.labels == 1)
        total = (split.labels == 1).flatten(1).sum(1)
        return Counts(total - hits.flatten(1).sum(1), total)

    test, darker = scenes(60, 8), UniversalPerturbation(-brighter(0.1).delta, ABOUT)
    with Victim(Pixelwise()) as victim:
        known = {uap.about.eps: Found(uap, dark(victim, test, uap.delta)) for uap in (brighter(0.05), darker)}
        others = [scaled(darker, 0.25)]
        for measure, chosen in ((errors_under, 1), (dark, -1)):
            found, _ = strongest(victim, test, brighter(0.25), others=others, controls=(), measure=measure)
            assert bool((found.delta.sign() == chosen).all())
    margins = (test.images[:, :, :, 4:] - 0.5).flatten().sort().values
    found = searched(test, 0.5, dark, known=known)
    assert found.value == pytest.approx(float(margins[len(margins) // 2 - 1]), rel=0.02)
