"""The rehearsal of a visit to an accelerator, and the bundle that goes there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gambeson.base import UserError
from gambeson.base.files import save_tensors
from gambeson.data import load
from gambeson.data.load import stored_file
from gambeson.data.pieces import load_available, read_piece, unpack, write_pieces
from gambeson.data.registry import DATASETS
from gambeson.studies.visit import Notebook, read_lines
from gambeson.studies.visit_training import choose_epochs

ROOT = Path(__file__).parent.parent


def rehearse(out: Path, *options: str, parts: str = "machine tests bench training") -> list[dict]:
    environment = os.environ | {"PARTS": parts, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sh", str(ROOT / "scripts" / "gpu.sh"), "2", str(out), "--tiny", "--device", "cpu", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== results" in done.stdout
    return read_lines(out / "visit.jsonl")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("visit")
    return out, rehearse(out, "--only", "standard,shared-adversarial 8")


def test_every_part_leaves_its_lines(rehearsal):
    out, lines = rehearsal
    kinds = {line["kind"] for line in lines}
    assert {"environment", "peak", "bench", "profile", "universal", "step", "plan", "trained", "audited"} <= kinds
    assert not [line for line in lines if line["kind"] in ("error", "skipped")]
    assert "skipped" in (out / "tests.txt").read_text() or torch.cuda.is_available()
    assert len(list(out.rglob("*"))) <= 8


def test_every_number_of_an_audit_is_there(rehearsal):
    _, lines = rehearsal
    audits = {line["defense"]: line for line in lines if line["kind"] == "audited"}
    assert set(audits) == {"standard", "shared-adversarial 8"}
    for kind in ("clean", "pgd", "uer"):
        assert len([line for line in lines if line["kind"] == kind]) == 2
    controls = next(line for line in lines if line["kind"] == "uer")["controls"]
    assert {one["name"] for one in controls} == {"random-sign", "chessboard"}


def test_a_later_visit_goes_on_where_this_one_stopped(rehearsal, tmp_path):
    out, _ = rehearsal
    only = "standard,shared-adversarial 8,shared-adversarial 1"
    lines = rehearse(tmp_path, "--done", str(out / "visit.jsonl"), "--only", only, parts="training")
    assert [line["defense"] for line in lines if line["kind"] == "audited"] == ["shared-adversarial 1"]


def test_a_part_that_fails_leaves_its_error_and_the_next_runs(tmp_path):
    book = Notebook(tmp_path / "lines.jsonl", 60)
    assert not book.attempt("broken", lambda: 1 / 0)
    assert book.attempt("whole", lambda: book.note("fine", value=1))
    assert [line["kind"] for line in book.lines()] == ["error", "fine", "took"]
    assert "ZeroDivisionError" in book.lines()[0]["error"]


def test_nothing_begins_without_time(tmp_path):
    book = Notebook(tmp_path / "lines.jsonl", 5)
    ran = []
    assert not book.attempt("long", lambda: ran.append(1), needs=30)
    assert not ran
    assert book.lines()[0]["kind"] == "skipped"


def test_a_line_that_was_cut_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"kind": "peak"}) + "\n" + '{"kind": "ben')
    assert read_lines(path) == [{"kind": "peak"}]


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (1000.0, 20),  # more than the most
        (2 * 5 + 1.15 * 4 * 12 + 0.1, 12),  # both runs, 12 epochs each
        (5 + 1.15 * 1 * 15 + 0.1, 15),  # room for the first alone
        (1.0, 10),  # for none: the fewest, and no run will begin
    ],
)
def test_as_many_runs_as_fit_and_then_as_many_epochs(left, expected):
    assert choose_epochs([1.0, 3.0], 5.0, left, (10, 20)) == expected


# The bundle


@pytest.fixture(scope="module")
def mnist_like(tmp_path_factory):
    """Something of CIFAR-10's shape that has all its values: stored where the prepared set would be."""
    root = tmp_path_factory.mktemp("root")
    draw = torch.Generator().manual_seed(0)
    recipe = DATASETS["cifar10"]
    tensors = {}
    for part, count in zip(("train", "test"), recipe.source, strict=True):
        tensors[f"{part}_images"] = torch.zeros((count, *recipe.shape), dtype=torch.uint8)
        some = torch.randint(0, 256, (300, *recipe.shape), generator=draw).to(torch.uint8)
        tensors[f"{part}_images"][:300] = some
        tensors[f"{part}_labels"] = torch.arange(count) % 10
    save_tensors(stored_file("cifar10", root), tensors, {"name": "cifar10", "source": "made", "classes": None})
    return root, tensors


def test_pieces_hold_every_bit(mnist_like, tmp_path):
    root, tensors = mnist_like
    cuts = [((0, 203), (0, 101)), ((203, 400), (0, 0))]
    files = write_pieces("cifar10", cuts, tmp_path, root)
    assert [file.name for file in files] == ["cifar10-1.tar", "cifar10-2.tar"]
    for file, ((first, stop), (from_test, to_test)) in zip(files, cuts, strict=True):
        found, _ = read_piece(file)
        assert torch.equal(found["train_images"], tensors["train_images"][first:stop])
        assert torch.equal(found["train_labels"], tensors["train_labels"][first:stop])
        assert torch.equal(found["test_images"], tensors["test_images"][from_test:to_test])


def test_all_pieces_make_the_data_set_and_some_make_a_part_of_it(mnist_like, tmp_path):
    root, tensors = mnist_like
    first, second = write_pieces("cifar10", [((0, 300), (0, 10000)), ((300, 50000), (0, 0))], tmp_path, root)
    there = tmp_path / "there"
    assert unpack([first], there) == {"cifar10": "300 of 50000 training and 10000 of 10000 test images"}
    part = load_available("cifar10", there)
    assert part.name == "cifar10[300]"
    assert [len(one) for one in (part.train, part.validation, part.test)] == [270, 30, 10000]
    assert torch.equal(part.test.images, tensors["test_images"])
    assert unpack([second], there) == {"cifar10": "complete"}
    whole, expected = load("cifar10", there), load("cifar10", root)
    assert whole.train.fingerprint == expected.train.fingerprint
    assert whole.test.fingerprint == expected.test.fingerprint
    assert load_available("cifar10", there).name == "cifar10"


def test_a_damaged_piece_is_refused(mnist_like, tmp_path):
    root, _ = mnist_like
    (file,) = write_pieces("cifar10", [((0, 100), (0, 100))], tmp_path, root)
    blob = bytearray(file.read_bytes())
    labels = blob.index(b'"sha256": "') + 11
    blob[labels] = ord("0") if blob[labels] != ord("0") else ord("1")
    file.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="does not hold the train images"):
        unpack([file], tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_set_without_parts_is_refused(tmp_path):
    with pytest.raises(UserError, match="digits is not cut into pieces"):
        write_pieces("digits", [((0, 1), (0, 1))], tmp_path)


def test_running_needs_no_report_library():
    """A machine that trains and attacks may lack plotly."""
    code = "import sys; sys.modules['plotly'] = None; import gambeson, gambeson.cli, gambeson.studies.visit"
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
    )
    assert time.monotonic() - began < 200
