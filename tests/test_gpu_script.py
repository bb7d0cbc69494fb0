"""The rehearsal of a visit to an accelerator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from visit import Notebook, measure_machine, read_lines, tiny
from visit_bench import measure_curve
from visit_run import print_table
from visit_segmentation import run_segmentation
from visit_training import choose_epochs, run_trainings

ROOT = Path(__file__).parent.parent


def rehearse(out: Path, *options: str, parts: str = "machine tests bench training") -> list[dict]:
    environment = os.environ | {"PARTS": parts, "PYTHON": sys.executable}
    command = ["sh", str(ROOT / "scripts" / "gpu.sh"), "2", str(out), "--tiny", "--device", "cpu", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== results" in done.stdout
    return read_lines(out / "visit.jsonl")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("visit")
    return out, rehearse(out, "--only", "standard,shared-adversarial 8")


@pytest.mark.full
def test_the_script_runs_the_part_that_is_named(tmp_path):
    lines = rehearse(tmp_path, parts="machine")
    assert {"environment", "peak"} <= {line["kind"] for line in lines}
    assert not {"bench", "trained"} & {line["kind"] for line in lines}


@pytest.mark.full
def test_every_part_leaves_its_lines(rehearsal):
    out, lines = rehearsal
    kinds = {line["kind"] for line in lines}
    assert {"environment", "peak", "bench", "profile", "universal", "step", "plan", "trained", "audited"} <= kinds
    assert not [line for line in lines if line["kind"] in ("error", "skipped")]
    assert "skipped" in (out / "tests.txt").read_text() or torch.cuda.is_available()
    assert len(list(out.rglob("*"))) <= 8


@pytest.mark.full
def test_every_number_of_an_audit_is_there(rehearsal):
    _, lines = rehearsal
    audits = {line["defense"]: line for line in lines if line["kind"] == "audited"}
    assert set(audits) == {"standard", "shared-adversarial 8"}
    for kind in ("clean", "pgd", "uer"):
        assert len([line for line in lines if line["kind"] == kind]) == 2
    controls = next(line for line in lines if line["kind"] == "uer")["controls"]
    assert {one["name"] for one in controls} == {"random-sign", "chessboard"}


@pytest.mark.full
def test_a_later_visit_goes_on_where_this_one_stopped(rehearsal, tmp_path):
    out, _ = rehearsal
    only = "standard@3,standard,shared-adversarial 8,shared-adversarial 1"
    lines = rehearse(tmp_path, "--done", str(out / "visit.jsonl"), "--only", only, parts="training")
    audited = [(line["defense"], line["seed"]) for line in lines if line["kind"] == "audited"]
    assert audited == [("standard", 3), ("shared-adversarial 1", 0)]


def test_segmentation_networks_are_timed_in_one_precision_on_a_cpu(tmp_path):
    book = Notebook(tmp_path / "lines.jsonl", 600)
    measure_machine(tiny("cpu"), book)
    run_segmentation(tiny("cpu"), book)
    assert not [line for line in book.lines() if line["kind"] in ("error", "skipped")]
    lines = [line for line in book.lines() if line["kind"] == "segmentation"]
    # 2 images a batch, 2 steps; a universal attack chooses on 2 validation images, here among one candidate.
    assert [(line["name"], line["forwards"], line["backwards"]) for line in lines] == [
        ("forward", 2, 0),
        ("PGD step", 4, 4),
        ("universal step", 6, 4),
    ]
    assert all(line["images_a_second"] > 0 and line["share_of_peak"]["float32"] > 0 for line in lines)
    assert torch.backends.cudnn.allow_tf32


def test_a_curve_is_timed_at_equal_gradients(tmp_path, capsys):
    book = Notebook(tmp_path / "lines.jsonl", 600)
    measure_curve(tiny("cpu"), book)
    separate, together = book.lines()
    assert [separate["name"], together["name"]] == ["one after another", "together"]
    # Two probes of 2 steps on 16 images and a run of 2 on 32 at each eps, and a run from each smaller one.
    assert separate["backwards"] == together["backwards"] == 5 * (2 * 2 * 16 + 2 * 32) + 4 * 2 * 32
    print_table(book.lines())
    assert capsys.readouterr().out.count(f"universal at 5 eps, together: {together['seconds']:.2f} s for 896 grad") == 1


@pytest.mark.full
def test_a_model_is_audited_once(tmp_path):
    book = Notebook(tmp_path / "lines.jsonl", 600)
    visit = tiny("cpu").model_copy(update={"judged": "standard", "seeds": 2})
    run_trainings(visit, book, [], ["standard"])
    (audit,) = [line for line in book.lines() if line["kind"] == "audit"]
    assert audit["seconds"] > 0
    assert audit["verdict"]["reasons"]


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


def test_running_needs_no_report_library():
    """A machine that trains and attacks may lack plotly."""
    code = "import sys; sys.modules['plotly'] = None; import gambeson, gambeson.cli, gambeson.studies"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
