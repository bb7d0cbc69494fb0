"""Studies: what is computed, once, whoever is killed, whatever is damaged, and however full the disk is."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest
import yaml

import gambeson as gb
from gambeson.base import OutOfSpace
from gambeson.cli.app import run
from gambeson.studies import Matrix, Study, code, read_study, run_study, store
from gambeson.studies.planning import makespan
from gambeson.studies.runner import Runner, prepare
from gambeson.studies.store import Lock, Store

TINY = {
    "name": "tiny",
    "data": [{"name": "digits", "eps": 0.1, "train": 256, "validation": 64, "test": 64}],
    "models": ["lenet5"],
    "defenses": {
        "standard": "standard",
        "heaps": {"name": "shared-adversarial", "settings": {"sharedness": 8}, "grid": {"sigma": [0.3, 0.7]}},
    },
    "seeds": 2,
    "recipe": {"epochs": 2, "batch_size": 16, "optimizer": "adam", "lr": 0.01},
    "measures": {"clean": {"kind": "accuracy"}, "fgsm": {"kind": "attack", "attack": "fgsm", "test_images": 32}},
}
CLAIM = {"statement": "x", "metric": "fgsm.accuracy", "of": "heaps", "to": "standard", "at_least": 0}


def tiny(**changes):
    return Study(**{**TINY, **changes})


def numbers(result):
    """Every number that is no time."""
    return {
        (row.defense, row.variant, row.at, row.seed, metric): value.value
        for row in result.rows
        for metric, value in row.values.items()
        if metric != "train.seconds"
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study and the folder of studies."""
    root = tmp_path_factory.mktemp("studies")
    return run_study(tiny(), root), root


def test_every_row_has_its_numbers_and_the_study_its_own_seeds(done):
    result, _ = done
    assert (result.done, result.cells, result.failed) == (18, 18, {})
    assert len(result.rows) == 6
    assert all(row.missing == [] for row in result.rows)
    found = numbers(result)
    dataset = gb.data.load("digits")
    assert all(value.n == 64 for row in result.rows for name, value in row.values.items() if name == "clean.accuracy")
    assert found["standard", "", "steps", 0, "train.steps"] == 2 * (256 // 16)
    assert len({found["standard", "", "steps", seed, "train.validation_uer"] for seed in (0, 1)}) == 2
    assert all(found[row.defense, row.variant, "steps", row.seed, "train.learnt"] for row in result.rows)
    assert len(dataset.test) > 64


def test_a_row_is_what_train_and_attack_give_by_hand(done):
    result, root = done
    row = next(row for row in result.rows if (row.variant, row.seed) == ("sigma 0.7", 1))
    model = gb.models.load(root / row.folders["train"] / "run")
    test = gb.data.load("digits").test.sample(64)
    assert row.values["clean.accuracy"].value == gb.evaluation.accuracy(model, test).value
    attack = gb.attacks.FGSM(eps=0.1)
    found = gb.evaluation.accuracy_under(model, test.sample(32, seed=1), attack, 1)
    assert row.values["fgsm.accuracy"].value == found.value
    stored = yaml.safe_load((root / row.folders["train"] / "run" / "run.yaml").read_text())
    assert stored["defense"]["sigma"] == 0.7
    assert stored["defense"]["eps"] == 0.1


def test_nothing_is_computed_twice_across_studies_either(done):
    result, root = done
    times = {file: file.stat().st_mtime_ns for file in root.glob("cells/*/result.json")}
    other = tiny(name="other", measures={**TINY["measures"], "more": {"kind": "attack", "attack": "r-fgsm"}})
    Runner(prepare(other, root), Store(root), "cpu").go()
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert len(list(root.glob("cells/*/result.json"))) == len(times) + 6
    again = read_study(root / "other")
    assert numbers(again).items() >= numbers(result).items()


def test_every_defence_comes_once_before_a_second_seed_and_after_what_it_needs():
    cells = Matrix(tiny(measures={"t": {"kind": "attack", "attack": "fgsm", "source": "standard"}})).cells
    seen = set()
    for cell in cells:
        assert {need.address for need in cell.needs} <= seen
        seen.add(cell.address)
    assert len(seen) == len(cells)
    seeds = [cell.row.rank[0] for cell in cells]
    assert seeds == sorted(seeds)
    trained = [cell.row for cell in cells if cell.kind == "train"]
    assert {row.seed for row in trained} == {0, 1, 1000, 1001}  # two more, from which examples are transferred


def test_an_address_follows_the_settings_and_the_code(monkeypatch):
    first = {cell.title: cell.address for cell in Matrix(tiny()).cells}
    other = {cell.title: cell.address for cell in Matrix(tiny(recipe={**TINY["recipe"], "lr": 0.2})).cells}
    assert not set(first.values()) & set(other.values())
    smaller = {**TINY["measures"], "fgsm": {"kind": "attack", "attack": "fgsm", "test_images": 31}}
    other = {cell.title: cell.address for cell in Matrix(tiny(measures=smaller)).cells}
    assert {title for title in first if first[title] != other[title]} == {t for t in first if t.startswith("fgsm")}

    def changed(module, edit):
        texts = {**code._texts(), module: edit(code._texts()[module])}
        monkeypatch.setattr(code, "_texts", lambda: texts)
        for cached in (code._module, code._reach, code._hash):
            cached.cache_clear()
        now = {cell.title: cell.address for cell in Matrix(tiny()).cells}
        monkeypatch.undo()
        for cached in (code._module, code._reach, code._hash):
            cached.cache_clear()
        return {title for title in first if first[title] != now[title]}

    heaps = "gambeson.defenses.shared_adversarial"
    assert changed(heaps, lambda text: f'"""Other words."""\n# and a comment\n{text}') == set()
    assert changed(heaps, lambda text: f"{text}\nx = 1\n") == {title for title in first if "heaps" in title}
    assert changed("gambeson.base.seeds", lambda text: f"{text}\nx = 1\n") == set(first)
    assert changed("gambeson.defenses.trades", lambda text: f"{text}\nx = 1\n") == set()


def test_at_equal_time_a_cheaper_training_gets_more_epochs(tmp_path):
    study = tiny(at=["steps", "seconds"], reference="heaps", seeds=1, measures={"clean": {"kind": "accuracy"}})
    found = numbers(run_study(study, tmp_path))
    steps = {(name, at): found[name, variant, at, 0, "train.steps"] for name, variant, at, _, _ in found}
    assert steps["heaps", "seconds"] == steps["heaps", "steps"] == steps["standard", "steps"]
    costs = [json.loads(file.read_text()) for file in tmp_path.glob("cells/*/result.json")]
    costs = {cost["cell"]["title"]: cost["result"]["ratio"] for cost in costs if cost["cell"]["kind"] == "cost"}
    heaps, plain = (costs[f"cost of {name} on digits, lenet5, seed 0"] for name in ("heaps", "standard"))
    assert steps["standard", "seconds"] == 16 * max(1, round(2 * heaps / plain))
    assert heaps > 1.5  # several passes a step


def test_the_search_chooses_on_validation(tmp_path):
    search = {"lr": [1e-6, 0.01], "warmup": [0, 1], "lengths": [1, 2]}
    study = tiny(search=search, seeds=1, defenses={"standard": "standard"}, measures={"clean": {"kind": "accuracy"}})
    row = run_study(study, tmp_path).rows[0]
    assert row.recipe["lr"] == 0.01  # the other learns nothing
    files = [json.loads(file.read_text()) for file in tmp_path.glob("cells/*/result.json")]
    found = next(file["result"] for file in files if file["cell"]["kind"] == "search")
    assert len(found["tried"]) == 4
    best = max(found["tried"], key=lambda one: one["accuracy"] - one["uer"])
    assert (found["lr"], found["warmup"]) == (best["lr"], best["warmup"])
    assert row.flat is not None
    assert not list(tmp_path.glob("cells/*/runs"))


def test_a_damaged_result_is_named_and_made_again(done, tmp_path):
    result, root = done
    matrix, here = Matrix(tiny()), Store(root)
    train = matrix.table[0][1]["train"]
    fgsm = matrix.table[0][1]["fgsm"]
    file = here.folder(fgsm) / "result.json"
    whole = file.read_text()
    for damage in (whole[:-40], whole.replace('"value"', '"valuf"', 1), "[]"):
        file.write_text(damage)
        with pytest.warns(UserWarning, match=r"fgsm of standard on digits.*damaged.*it is made again"):
            again = run_study(tiny(), root)
        assert numbers(again) == numbers(result)
    weights = here.folder(train) / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
    file.unlink()
    with pytest.warns(UserWarning, match=r"cannot begin: .*model.safetensors is damaged or gone"):
        again = run_study(tiny(), root)
    assert numbers(again) == numbers(result)


def test_a_lock_has_one_holder_until_it_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BEAT", 0.05)
    first = Lock.take(tmp_path)
    assert first is not None
    assert Lock.take(tmp_path) is None
    first.release()
    assert list(tmp_path.iterdir()) == []
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"token": "x", "machine": store._machine(), "process": dead.pid}
    (tmp_path / "lock.0").write_text(json.dumps(owner))
    second = Lock.take(tmp_path)
    assert second is not None
    assert second.number == 1
    assert Lock.take(tmp_path) is None
    second.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lock.0").write_text(json.dumps({**owner, "machine": "another", "process": os.getpid()}))
    assert Lock.take(tmp_path) is None
    old = time.time() - store.STALE - 5
    os.utime(tmp_path / "lock.0", (old, old))
    third = Lock.take(tmp_path)
    assert third is not None
    before = (tmp_path / "lock.1").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / "lock.1").stat().st_mtime_ns > before  # its heart beats
    (tmp_path / "lock.2").write_text("{}")  # taken over by another
    third.release()
    assert (tmp_path / "lock.2").exists()


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(done, tmp_path):
    result, _ = done
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY}))
    command = [sys.executable, "-m", "gambeson", "study", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("cells/*/result.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = len(list(tmp_path.glob("cells/*/result.json")))
    assert 4 <= begun < 18
    again = run_study(tiny(), tmp_path, workers=2)  # two runners on one folder
    assert again.done == 18
    assert numbers(again) == numbers(result)
    assert not list(tmp_path.glob("cells/*/lock.*"))


def test_a_full_disk_leaves_the_study_intact(done, tmp_path):
    result, _ = done
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutOfSpace, match="nothing half-written was left"):
            run_study(tiny(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("cells/*/lock.*"))
    assert numbers(run_study(tiny(), tmp_path)) == numbers(result)


def test_a_cell_that_fails_is_told_and_the_others_are_done(tmp_path):
    wide = {"name": "shared-adversarial", "settings": {"sharedness": 16}, "recipe": {"batch_size": 512, "epochs": 1}}
    study = tiny(defenses={"standard": "standard", "wide": wide}, seeds=1)
    result = run_study(study, tmp_path)
    assert [row.missing for row in result.rows] == [[], ["train", "clean", "fgsm"]]
    assert list(result.failed) == ["train of wide on digits, lenet5, seed 0"]
    assert "batch size 512 does not fit 256 training images" in str(result.failed)


def test_the_time_is_kept(tmp_path):
    assert run_study(tiny(), tmp_path, minutes=0).done == 0
    began = time.monotonic()
    matrix = prepare(tiny(), tmp_path)
    estimate = {"train": 1.0, "clean": 1e6, "fgsm": 1e6}
    runner = Runner(matrix, Store(tmp_path), "cpu", began + 100, lambda cell: estimate[cell.label or cell.kind])
    assert {cell.kind for cell in runner.go()} == {"measure"}  # what takes too long is not begun


def test_a_plan_counts_cells_and_keeps_dependencies(done, tmp_path, capsys):
    cells = Matrix(tiny()).cells
    one = makespan(cells, lambda cell: 3.0 if cell.kind == "train" else 1.0, 1)
    assert one == 6 * 3 + 12 * 1
    assert makespan(cells, lambda cell: 3.0 if cell.kind == "train" else 1.0, 64) == 4
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY}))
    assert run(["study", "plan", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cells"], found["done"]) == (18, 0)
    assert {kind["name"]: kind["cells"] for kind in found["kinds"]} == {"train": 6, "clean": 6, "fgsm": 6}
    assert all(kind["seconds"] > 0 and not kind["measured"] for kind in found["kinds"])
    assert found["seconds"]["1"] > found["seconds"]["8"] >= found["seconds"]["64"] > 0
    assert not list(tmp_path.glob("cells"))


def test_commands_say_what_there_is(done, tmp_path, capsys):
    result, root = done
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"kind": "study", **TINY, "claims": {"C": CLAIM}}))
    assert run(["study", "status", str(file), "--out", str(root)]) == 0
    text = capsys.readouterr().out
    assert "18 of 18 cells are done" in text
    assert "undecided" in text or "reproduced" in text
    assert run(["study", "export", str(file), "--out", str(root), "--file", str(tmp_path / "x.csv")]) == 0
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(row.values) for row in result.rows)
    assert run(["study", "export", str(file), "--out", str(root), "--to", "xls"]) == 2
    assert "expected one of csv, parquet, json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defenses": {"a": "heap"}}, "unknown defence 'heap'"),
        ({"claims": {"C": {**CLAIM, "of": "heap"}}}, "unknown defence of the study 'heap': did you mean heaps"),
        ({"claims": {"C": {**CLAIM, "metric": "uap.uer"}}}, "unknown measure of the study 'uap'"),
        ({"claims": {"C": {**CLAIM, "metric": "fgsm.acc"}}}, "unknown metric 'fgsm.acc'"),
        ({"claims": {"C": {**CLAIM, "at_least": None}}}, "either at_least or at_most"),
        ({"claims": {"C": CLAIM}, "seeds": 1}, "needs 2 or more"),
        ({"measures": {"a": {"kind": "attack", "attack": "fgms"}}}, "unknown attack 'fgms'"),
        ({"seeds": [1, 1]}, "expected different numbers"),
        ({"at": ["seconds"]}, "unknown defence of the study ''"),
        ({"recipe": {"epoch": 3}}, "did you mean epochs?"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_a_wrong_study_is_one_sentence(changes, words, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY, **changes}))
    assert run(["study", "run", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--minutes", "0"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_ensembles_are_attacked_through_every_part_of_them(tmp_path):
    measures = {
        name: {"kind": "attack", "attack": {"name": "pgd", "steps": 5}, "test_images": 64, "adaptive": adaptive}
        for name, adaptive in (("plain", False), ("adaptive", True))
    }
    defenses = {"two": {"name": "jacobian-ensemble", "settings": {"strength": 0.01, "members": 2}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = run_study(tiny(defenses=defenses, seeds=1, measures=measures), tmp_path).rows[0]
    assert row.missing == []
    assert row.values["adaptive.accuracy"].value <= row.values["plain.accuracy"].value
