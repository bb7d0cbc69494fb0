"""A study goes on elsewhere, from the results of its cells; and no cell is taken for one of other files or weights."""

import gzip
import json

import pytest

from gambeson.base import UserError, read_json, write_json
from gambeson.cli.app import run
from gambeson.studies import Matrix, Study, export_cells, import_cells, run_study
from gambeson.studies.store import Store, digest
from tests.studies.test_study import TINY, numbers, tiny

FEW = {"clean": {"kind": "accuracy"}, "fgsm": {"kind": "attack", "attack": "fgsm", "test_images": 32}}
SMALL = {**TINY, "measures": FEW, "defenses": {"standard": "standard"}, "seeds": 1}
PGD = {"pgd": {"kind": "attack", "attack": "pgd", "test_images": 32}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished study, the folder of studies, and the file of its results."""
    root = tmp_path_factory.mktemp("studies")
    result = run_study(Study(**SMALL), root)
    return result, root, root / "x.jsonl.gz", export_cells(Study(**SMALL), root, root / "x.jsonl.gz")


def trained(root, study):
    """The one training of a study, and its stored result."""
    cell = next(cell for cell in Matrix(study).cells if cell.kind == "train")
    return cell, Store(root).folder(cell) / "result.json"


def test_what_was_computed_elsewhere_is_not_computed_again(small, tmp_path, monkeypatch, capsys):
    result, _, file, count = small
    assert count == result.cells == 3
    assert run(["study", "import", str(file), "--out", str(tmp_path)]) == 0
    assert f"3 results are new in {tmp_path / 'cells'}\nnext: gambeson report {tmp_path / 'tiny'}" in (
        capsys.readouterr().out
    )
    assert run(["report", str(tmp_path / "tiny")]) == 0
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "3 of 3 cells are done" in page
    assert f">{100 * result.rows[0].values['clean.accuracy'].value:.1f}" in page
    with monkeypatch.context() as patch:
        patch.setattr("gambeson.studies.runner.execute", lambda *_: pytest.fail("computed again"))
        assert numbers(run_study(Study(**SMALL), tmp_path)) == numbers(result)
    assert import_cells(file, tmp_path) == (0, 3, "tiny")
    capsys.readouterr()
    assert run(["study", "import", str(file), "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(tmp_path / "cells"),
        "new": 0,
        "known": 3,
        "study": "tiny",
    }


def test_a_measurement_that_is_missing_gets_its_weights_trained_again(small, tmp_path):
    result, _, file, _ = small
    import_cells(file, tmp_path)
    with pytest.warns(UserWarning, match=r"cannot begin: .*model\.safetensors is damaged or gone; that is made again"):
        more = run_study(tiny(defenses=SMALL["defenses"], seeds=1, measures={**FEW, **PGD}), tmp_path)
    assert numbers(result).items() <= numbers(more).items()
    assert len(numbers(more)) > len(numbers(result))


def test_measurements_of_other_weights_are_made_again(small, tmp_path):
    _, _, file, _ = small
    import_cells(file, tmp_path)
    cell, stored = trained(tmp_path, Study(**SMALL))
    content = read_json(stored)
    content["files"] = dict.fromkeys(content["files"], "0" * 64)  # as if the training had been done anew, elsewhere
    write_json(stored, content | {"sha256": digest(content)})
    with pytest.warns(UserWarning, match="made again") as told:
        again = run_study(Study(**SMALL), tmp_path)
    assert sum("is not of the weights" in str(one.message) for one in told) == 2
    assert again.done == again.cells
    assert Store(tmp_path).read(cell, files=True) is not None


def test_what_is_there_stays_as_it_is(small, tmp_path):
    _, _, file, _ = small
    _, stored = trained(tmp_path, Study(**SMALL))
    write_json(stored, {"mine": 1})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "study.yaml").write_text("mine: 1")
    assert import_cells(file, tmp_path) == (2, 1, "tiny")
    assert read_json(stored) == {"mine": 1}
    assert (tmp_path / "tiny" / "study.yaml").read_text() == "mine: 1"


def test_results_without_their_study_are_taken_over(small, tmp_path):
    _, _, file, _ = small
    (tmp_path / "old.gz").write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).rsplit(b"\n", 1)[0]))
    assert import_cells(tmp_path / "old.gz", tmp_path / "out") == (3, 0, "")


def test_a_file_that_is_not_whole_stores_nothing(small, tmp_path, capsys):
    _, _, file, _ = small
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    elsewhere = json.dumps(json.loads(lines[1]) | {"address": "../../x"})
    changed = lines[1].replace('"value": 0.', '"value": 1.', 1)
    assert changed != lines[1] or '"value": 0.' not in lines[1]
    escaping = {"study": {"name": "../x"}}
    escaping["sha256"] = digest(escaping)
    wrong = {
        "line 1 of ": gzip.compress(json.dumps(escaping).encode()),
        "line 2": gzip.compress("\n".join([lines[0], lines[1][:-9]]).encode()),
        "line 2 of": gzip.compress("\n".join([lines[0], elsewhere]).encode()),
        "line 1 of": gzip.compress(b"[1]"),
        "cannot be read": file.read_bytes()[:-20],
        "cannot be read (": b"no gzip",
    }
    for words, content in wrong.items():
        (tmp_path / "y.gz").write_bytes(content)
        assert run(["study", "import", str(tmp_path / "y.gz"), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
    assert run(["study", "import", str(tmp_path / "no.gz"), "--out", str(tmp_path / "out")]) == 2
    with pytest.raises(UserError, match="has no results yet"):
        export_cells(tiny(), tmp_path / "empty", tmp_path / "z.gz")


def test_an_address_follows_what_a_named_file_holds(small, tmp_path):
    _, root, _, _ = small
    _, stored = trained(root, Study(**SMALL))
    source = tmp_path / "source.safetensors"
    source.write_bytes((stored.parent / "run" / "model.safetensors").read_bytes())
    pool = {"pool": {"name": "ensemble-adversarial", "settings": {"sources": [str(source)]}}}
    before = {cell.address for cell in Matrix(tiny(defenses=pool)).cells}
    assert before == {cell.address for cell in Matrix(tiny(defenses=pool)).cells}
    source.write_bytes(source.read_bytes()[:-4] + b"\0\0\1\0")
    assert not before & {cell.address for cell in Matrix(tiny(defenses=pool)).cells}
