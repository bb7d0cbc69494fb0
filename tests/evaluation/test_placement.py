"""A patch by placement: each number from what it is defined as, controls at the same places, the page and the print."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import PATCH_CONTROLS, AdversarialPatch, StochasticPGD, UniversalPatch, UniversalPerturbation
from gambeson.cli.app import run
from gambeson.evaluation import by_placement, under_edits, universal_evasion
from gambeson.report import print_patch, write_patch
from gambeson.threat import Placement
from tests.conftest import LinearNet


@pytest.fixture(scope="module")
def spot():
    """A model that answers by whether the pixel in row 1, column 4 is brighter than 0.9, and a white patch for it."""
    weight = torch.zeros(2, 1, 6, 7)
    weight[1, 0, 1, 4], weight[0, 0, 1, 4] = 10, -10
    model = LinearNet(weight, torch.tensor([9.0, -9.0]))
    x = torch.rand(80, 1, 6, 7, generator=torch.Generator().manual_seed(0)) * 0.5
    x[40:, 0, 1, 4] = 0.95
    data = gb.data.as_dataset((x, (torch.arange(80) >= 40).long()))
    attack = UniversalPatch(area=0.1, probe_starts=0, steps=2)
    about = attack.craft(model, data).about
    white = AdversarialPatch(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), (1, 6, 7), about)
    dark = torch.rand(60, 1, 6, 7, generator=torch.Generator().manual_seed(1)) * 0.5
    return model, gb.data.Split("dark", dark, torch.zeros(60).long(), ("dark", "bright")), white


def test_under_edits_the_controls_are_those_of_patches(spot):
    model, data, found = spot
    (rates, _) = under_edits(model, data, found, ["blur:0.3"]).rates
    assert {one.name for one in rates.controls} == set(PATCH_CONTROLS)


def test_rates_are_those_of_each_place(spot):
    model, data, found = spot
    result = by_placement(model, data, found, grid=3, controls=("grey", "image-piece"))
    # A patch of 2 x 2 pixels covers row 1 and column 4 at the tops 0 and 1, and the lefts 3 and 4.
    tops, lefts = [0, 2, 4], [0, 2, 5]  # a half is rounded to even
    expected = [[float(top in (0, 1) and left in (3, 4)) for left in lefts] for top in tops]
    assert [[one.rate.value for one in row] for row in result.places] == expected
    assert result.clean.value == 0
    assert all(one.control.value == 0 for one in result.every.values())
    fine = by_placement(model, data, found, grid=6, controls=(), scales=[], rotations=[])
    assert [one.rate.value for one in fine.places[0]] == [0, 0, 0, 1, 1, 0]
    assert [row[3].rate.value for row in fine.places] == [1, 1, 0, 0, 0, 0]
    assert fine.places[1][4].at == (0.2, 0.8)
    assert fine.places[1][4].control is None
    whole = universal_evasion(model, data, found)
    assert result.whole.rate == whole
    assert 0 < whole.value < 0.5  # 4 of 30 places
    assert result.harm.value == pytest.approx(whole.value)
    assert result.whole.lead == result.harm  # grey and pieces of dark images do nothing
    assert f"beats its strongest control, by {100 * result.harm.low:+.1f} to" in result.whole.comparison
    assert fine.whole.lead is None
    assert fine.whole.comparison == ""
    assert [one.at for one in result.rotations] == [0, 15, 30, 45, 90, 180]
    assert result.rotations[0].rate == whole
    # The larger it is, the more places cover the pixel.
    large = by_placement(model, data, found, grid=1, controls=(), scales=(1, 2, 3), rotations=[])
    assert [row.rate.value > 0 for row in large.scales] == [True] * 3
    assert large.scales[0].rate.value < large.scales[1].rate.value < large.scales[2].rate.value
    assert result.cost.forwards > 0
    assert result.cost.backwards == 0


def test_a_target_is_what_is_counted(spot):
    model, data, found = spot
    about = found.about.model_copy(update={"settings": found.about.settings | {"target": 1}})
    aimed = AdversarialPatch(found.pattern, found.mask, found.shape, about)
    result = by_placement(model, data, aimed, grid=2, controls=("grey",), scales=[], rotations=[])
    assert (result.target, result.what) == ("bright", "taken for bright")
    assert result.whole.rate.value == universal_evasion(model, data, found).value
    other = AdversarialPatch(found.pattern, found.mask, found.shape, about.model_copy(
        update={"settings": about.settings | {"target": 0}}
    ))  # fmt: skip
    with pytest.raises(UserError, match="every image of .* is of the class 'dark'"):
        by_placement(model, data, other)


def test_what_does_not_fit_is_left_out_or_refused(spot):
    model, data, found = spot
    settings = found.about.settings | {"rotation": [0.0, 0.0]}
    tall = AdversarialPatch(
        torch.ones(1, 1, 5, 2),
        torch.ones(1, 1, 5, 2),
        found.shape,
        found.about.model_copy(update={"settings": settings}),
    )
    result = by_placement(model, data, tall, grid=1, controls=(), images=20)
    assert result.left_out == ["scale 1.25", "scale 1.5"]
    assert [one.at for one in result.scales] == [0.5, 0.75, 1]
    assert result.clean.n == 20
    with pytest.raises(UserError, match="takes up to 8x3, and the images have 6x7"):
        by_placement(model, data, tall, scales=[1.5])
    with pytest.raises(UserError, match="grid = 0: expected 1 or more"):
        by_placement(model, data, found, grid=0)
    ball = UniversalPerturbation(torch.zeros(1, 1, 6, 7), found.about)
    with pytest.raises(UserError, match="got a UniversalPerturbation: expected an AdversarialPatch"):
        by_placement(model, data, ball)
    assert str(Placement()) == "place random, scale 1, rotation 0"
    assert str(Placement(place=(0, 0.5), scale=(0.5, 2), rotation=30)) == (
        "place (0, 0.5), scale 0.5 to 2, rotation -30 to 30"
    )


def test_it_is_shown(spot, tmp_path):
    model, data, found = spot
    result = by_placement(model, data, found, grid=2, images=20)
    assert "place 0, 1" in repr(result)
    assert "control" in repr(result)
    assert len(result.to_frame()) == 1 + 5 * len(result.every)
    figure = result.plot()
    assert [list(line) for line in figure.data[0].z] == [[100 * one.rate.value for one in row] for row in result.places]
    assert figure.data[0].x[1] == "100%"
    page = write_patch(found, result, data, tmp_path / "patch.html").read_text()
    assert "One patch makes this model wrong on" in page
    assert page.count("data:image/png") >= 10  # icon, patch and eight images
    assert "turned by 180 degrees" in page
    assert "lead, points" in page
    assert result.whole.comparison in " ".join(page.replace("\N{NO-BREAK SPACE}", " ").replace("&nbsp;", " ").split())
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_print_has_its_size_and_every_pixel(spot, tmp_path):
    _, _, found = spot
    pattern = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])[None, None]
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])[None, None]
    wide = AdversarialPatch(pattern, mask, found.shape, found.about)
    assert print_patch(wide, tmp_path / "a.png", "50mm", marks=False) == (394, 591)
    picture = Image.open(tmp_path / "a.png")
    assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert picture.size[0] / picture.info["dpi"][0] * 25.4 == pytest.approx(50, abs=0.05)
    seen = [picture.getpixel((100 + 197 * (k % 3), 100 + 197 * (k // 3))) for k in range(6)]
    assert [one[0] for one in seen] == [0, 51, 102, 153, 204, 255]
    assert [one[3] for one in seen] == [255, 255, 0, 255, 255, 255]
    print_patch(wide, tmp_path / "new" / "a.pdf", "2 in", 100, marks=False)  # in a folder that is made
    content = (tmp_path / "new" / "a.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/MediaBox [ 0 0 144.0 95.76 ]" in content  # 200 x 133 dots in points of 1/72 inch
    for out, size, message in (
        ("a.png", "50", "--print 50: expected the length of the longer side with its unit"),
        ("a.gif", "50mm", "a.gif is no file for a printer"),
        ("a.png", "0.1mm", "0.1mm at 300 dpi is 1 dots for 3 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            print_patch(wide, tmp_path / out, size)


def test_the_lead_is_over_the_strongest_pattern_on_the_same_images(spot):
    model, data, found = spot
    grey = AdversarialPatch(torch.full((1, 1, 2, 2), 0.5), found.mask, found.shape, found.about)
    result = by_placement(model, data, grey, grid=1, scales=[], rotations=[])
    rates = {one.name: one.worst.value for one in result.whole.controls}
    assert rates["uniform"] > rates["grey"] == 0
    assert result.whole.lead.value == -max(rates.values())
    assert result.whole.lead.n == 60
    assert result.whole.lead.high < 0
    name = max(rates, key=rates.get)
    assert result.whole.comparison.startswith("The patch is behind its strongest control, by -")
    assert f"({name};" in result.whole.comparison
    level = by_placement(model, data, grey, grid=1, controls=("grey",), scales=[], rotations=[]).whole
    assert level.lead.low < level.lead.value == 0 < level.lead.high
    assert "not clearly ahead of its strongest control: -" in level.comparison


def test_crop_marks_point_to_the_corners_and_the_size_is_written(spot, tmp_path):
    _, _, found = spot
    white = AdversarialPatch(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), found.shape, found.about)
    height, width = print_patch(white, tmp_path / "a.png", "2in", 254)  # ten dots a millimetre
    assert (height, width) == (254, 508)
    picture = Image.open(tmp_path / "a.png")
    assert picture.info["dpi"] == pytest.approx((254, 254), abs=0.01)
    channels = torch.from_numpy(np.array(picture))
    opaque = channels[..., 3] > 0
    dark = opaque & (channels[..., 0] < 128)
    bright = (opaque & ~dark).nonzero()
    (top, left), (bottom, right) = bright[: height * width].amin(0), bright[: height * width].amax(0)
    assert (bottom - top + 1, right - left + 1) == (height, width)
    assert not dark[top - 14 : bottom + 16, left - 14 : right + 16].any()  # a gap of 1.5 mm
    for x in (left - 1, right + 1):  # marks of 4 mm, above and below the corners
        assert dark[:top, x].sum() == 40
        assert dark[bottom + 16 : bottom + 56, x].all()
    for y in (top - 1, bottom + 1):
        assert dark[y, :left].sum() == dark[y, right + 1 :].sum() == 40
    assert dark[bottom + 56 :].sum() > 500  # its size, in letters
    lines = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("PIL.ImageDraw.ImageDraw.text", lambda _, at, text, *rest: lines.append(text))
        print_patch(white, tmp_path / "a.pdf", "2in", 254)
        print_patch(white, tmp_path / "a.pdf", "50 mm", 300)
    assert lines == ["2 x 1 in: print at 100 %, 254 dpi", "50 x 25 mm: print at 100 %, 300 dpi"]


def test_the_commands(trained, digits, tmp_path, capsys, monkeypatch):
    few = partial(by_placement, images=40, controls=("grey",))
    monkeypatch.setattr("gambeson.evaluation.uap_score.by_placement", few)
    net, file = str(tmp_path / "net.safetensors"), str(tmp_path / "patch.safetensors")
    gb.models.save(trained, net)
    craft = ["uap", "craft", net, "--data", "digits", "--attack", "universal-patch", "--set", "probe_starts=0"]
    craft += ["--set", "steps=20", "--set", "place=[0.5, 0.5]", "--out", file]
    assert run([*craft, "--set", "area=0.25"]) == 0
    assert "universal-patch of 4x4 pixels, 25 % of an image (done); UER" in " ".join(capsys.readouterr().err.split())
    assert run(["uap", "score", file, net, "--data", "digits", "--placements", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    patch = gb.attacks.load(file)
    assert found["uer"] == universal_evasion(trained, digits, patch).plain()
    assert [one["name"] for one in found["controls"]] == ["grey", "uniform", "random-sign", "image-piece"]
    assert len(found["placements"]["places"]) == 5
    assert found["placements"]["places"][2][2]["rate"] == few(trained, digits, patch).whole.rate.plain()  # the middle
    assert run(["uap", "export", file, "--print", "50mm", "--to", str(tmp_path / "a.pdf")]) == 0
    assert "4x4 pixels as 591x591 dots, 50mm at 300 dpi" in capsys.readouterr().out
    assert run(["uap", "list", str(tmp_path), "--json"]) == 0
    assert [one["attack"] for one in json.loads(capsys.readouterr().out)] == ["universal-patch"]
    ball = str(tmp_path / "ball.safetensors")
    StochasticPGD(eps=0.1, probe_starts=0, steps=1).craft(trained, digits).save(ball)
    for command, message in (
        (["uap", "score", ball, net, "--data", "digits", "--placements"], "has no place: leave --placements out"),
        (["uap", "export", ball, "--print", "50mm", "--to", str(tmp_path / "b.png")], "expected a patch"),
        ([*craft[:-1], str(tmp_path / "c"), "--set", "area=2"], "area=2: expected less than or equal to 1"),
        ([*craft[:-1], str(tmp_path / "c"), "--eps", "0.6"], "expected less than or equal to 0.5"),
    ):
        assert run(command) == 2, command
        assert message in " ".join(capsys.readouterr().err.split())
