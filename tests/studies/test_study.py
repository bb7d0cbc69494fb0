"""Studies: what is computed, once, whoever is killed, whatever is damaged, and however full the disk is."""

import csv
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import gambeson as gb
from gambeson.base import OutOfSpace, UserError
from gambeson.cli.app import run
from gambeson.studies import Matrix, Study, cluster, code, export, joined, planning, read_study, run_study, store
from gambeson.studies.checks import metrics_of
from gambeson.studies.measures import JacobianMeasure, TrainedModel
from gambeson.studies.planning import makespan
from gambeson.studies.runner import Runner, prepare
from gambeson.studies.store import Estimates, Lock, Store
from gambeson.training import TrainRun
from tests.conftest import full

STUDIES = Path(__file__).parents[2] / "studies"
TINY: dict[str, Any] = {
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


def test_the_first_claim_has_all_its_seeds_before_anything_else_is_begun():
    transfer = {"kind": "attack", "attack": "fgsm", "source": "standard"}
    single = {"statement": "x", "how": "value", "of": {"defense": "heaps", "variant": "sigma 0.7"}, "at_least": 0}
    claims = {"T": {**single, "metric": "t.accuracy"}, "C": {**CLAIM, "keeping": {"than": "standard"}}}
    search = {"lr": [0.01], "lengths": [0.5, 1]}
    study = tiny(measures={**TINY["measures"], "t": transfer}, claims=claims, search=search)
    cells = Matrix(study).cells
    seen = set()
    for cell in cells:
        assert {need.address for need in cell.needs} <= seen
        seen.add(cell.address)
    assert len(seen) == len(cells)
    found = [(cell.label or cell.kind, cell.row.defense, cell.row.variant, cell.row.seed) for cell in cells]
    of_one_seed = [
        [
            ("train", "heaps", "sigma 0.7", seed),
            ("train", "standard", "", seed + 1000),
            ("t", "heaps", "sigma 0.7", seed),
        ]
        for seed in (0, 1)
    ]
    searches = [("search", "heaps", "", 0), ("search", "standard", "", 1000)]
    assert [one for one in found[:8] if one not in searches] == [*of_one_seed[0], *of_one_seed[1]]
    then = [one[0] for one in found[8:]]
    rest = then.index("clean")  # which no claim reads
    assert set(then[:rest]) == {"train", "fgsm"}
    assert then[-2:] == ["lengths", "lengths"]  # one per defence, last of all
    assert sum(one[0] == "search" for one in found) == 2  # not one per sigma


def test_at_equal_time_only_what_claims_read_is_done():
    claims = {"C": CLAIM, "once": {**CLAIM, "to": {"defense": "other"}, "at": ["steps"]}}
    defenses = {**TINY["defenses"], "other": "jacobian"}
    study = tiny(at=["steps", "seconds"], reference="heaps", claims=claims, defenses=defenses)
    rows = [row for row, _ in Matrix(study).table]
    assert {row.defense for row in rows if row.at == "steps"} == {"standard", "heaps", "other"}
    assert {row.defense for row in rows if row.at == "seconds"} == {"standard", "heaps"}
    more = study.measures["fgsm"].model_copy(update={"defenses": ("heaps",)})
    study = study.model_copy(update={"measures": {**study.measures, "more": more}})
    cells = [cells for row, cells in Matrix(study).table if (row.defense, row.at) == ("heaps", "seconds")]
    assert {label for one in cells for label in one} == {"train", "clean", "fgsm"}


@pytest.mark.parametrize("name", ["smoke", "speedrun", full("claims-small"), full("claims-paper")])
def test_every_claim_of_a_study_file_finds_what_it_reads(name):
    study = Study.load(STUDIES / f"{name}.yaml")
    matrix = Matrix(study)
    for claim in study.claims.values():
        for side in claim.sides:
            label = (side.metric or claim.metric).partition(".")[0]
            for at in claim.at or study.at:
                places = {
                    (row.data, row.seed)
                    for row, cells in matrix.table
                    if row.defense in (side.defense or row.defense, "") and row.at == at and label in cells
                }
                assert places == {(data, seed) for data, _ in places for seed in study.seeds}
                assert {data for data, _ in places} >= set(claim.data), claim.statement
                assert places


def test_a_claim_against_several_defences_is_one_against_each():
    rivals = ["standard", {"defense": "heaps", "variant": "sigma 0.3"}]
    claims = tiny(claims={"C": {**CLAIM, "statement": "Beats {to}.", "to": rivals}, "D": CLAIM}).claims
    assert list(claims) == ["C against standard", "C against heaps", "D"]
    assert [claim.statement for claim in claims.values()] == ["Beats standard.", "Beats heaps.", "x"]
    assert claims["C against heaps"].to.variant == "sigma 0.3"
    assert claims["C against heaps"].of == claims["D"].of


def test_a_measure_of_some_seeds_is_made_for_those_alone():
    few = {"kind": "accuracy", "seeds": [1]}
    table = Matrix(tiny(measures={"clean": few})).table
    assert {row.seed: set(cells) for row, cells in table} == {0: {"train"}, 1: {"train", "clean"}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "attack", "attack": "stochastic-pgd", "votes": 1}, "leave votes out"),
        ({"kind": "attack", "attack": "stochastic-pgd", "test_images": 50}, "leave test_images out"),
        ({"kind": "accuracy", "times_eps": 2}, "leave times_eps out"),
        ({"kind": "eps-uni", "times_eps": 0.5}, "leave times_eps out"),
        ({"kind": "jacobian", "times_eps": 0.5}, "leave times_eps out"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(measures={"it": settings})


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_study_can_be_read_as_it_is_stored_beside_its_results(file):
    study = Study.load(file)
    assert Study(**json.loads(json.dumps(study.plain()))) == study


def test_the_metrics_that_claims_may_name_are_those_that_are_measured(done):
    result, _ = done
    measures = {"train": None} | dict(tiny().measures)
    for row in result.rows:
        assert set(row.values) == {f"{label}.{name}" for label, one in measures.items() for name in metrics_of(one)}


def test_jacobians_are_measured_as_the_analysis_does(done):
    result, root = done
    row = result.rows[0]
    model = gb.models.load(root / row.folders["train"] / "run")
    data = gb.data.load("digits")
    measure = JacobianMeasure(test_images=20, pairs=10)
    trained = TrainedModel(model=model, data=data, eps=0.1, seed=3, folder=root, out=root, source=None)
    found = measure.measure(trained).metrics
    assert set(found) == set(metrics_of(measure))
    few = data.test.sample(20, seed=3)
    norms = gb.analysis.batch_jacobian(model, few.take(slice(None))[0]).flatten(1).norm(dim=1)
    assert found["jacobian"].value == pytest.approx(float(norms.mean()), rel=1e-5)
    assert found["pairs"].value == pytest.approx(
        float(gb.analysis.pair_sharing(model, few, pairs=10, seed=3).values["cos_F"].mean()), rel=1e-5
    )
    assert 1 / 20 <= found["sharing"].value <= 1


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


@pytest.mark.full
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
    search = {"lr": [1e-6, 0.01], "warmup": [0, 1], "share": 0.5, "train": 240, "lengths": [0.25, 0.5]}
    recipe = {**TINY["recipe"], "epochs": 4}
    few = {"seeds": 1, "defenses": {"standard": "standard"}, "measures": {"clean": {"kind": "accuracy"}}}
    study = tiny(search=search, recipe=recipe, **few)
    row = run_study(study, tmp_path).rows[0]
    assert row.recipe["lr"] == 0.01  # the other learns nothing
    files = [json.loads(file.read_text()) for file in tmp_path.glob("cells/*/result.json")]
    found = {file["cell"]["kind"]: file for file in files}
    tried = found["search"]["result"]["tried"]
    assert [one["epochs"] for one in tried] == [2] * 4
    assert found["search"]["cell"]["settings"]["data"]["train"] == 240
    best = max(tried, key=lambda one: one["accuracy"] - one["uer"])
    assert [found["search"]["result"][key] for key in ("lr", "warmup")] == [best["lr"], best["warmup"]]
    half, whole = found["lengths"]["result"]["lengths"]
    assert (half["epochs"], whole["epochs"], half["lr"]) == (1, 2, 0.01)
    gain = (whole["accuracy"] - whole["uer"] - half["accuracy"] + half["uer"]) / 2
    assert found["lengths"]["result"]["flat from"] == (1 if gain < 0.01 else None)
    assert row.flat is (gain < 0.01)
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


@pytest.mark.parametrize("text", ["[]", "{}", '{"message": 5, "run": "x", "times": 1}', '{"message": "x"', "7"])
def test_a_damaged_note_of_a_failure_is_none(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gambeson.studies.runner.execute", _made_up)
    study = tiny(seeds=1, defenses={"standard": "standard"})
    notes = [Store(tmp_path).folder(cell) / "failure.json" for cell in Matrix(study).cells]
    for note in notes:
        note.parent.mkdir(parents=True)
        note.write_text(text)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study.plain()))
    assert read_study(study, tmp_path).failed == {}
    assert run(["study", "status", str(tmp_path / "s.yaml"), "--out", str(tmp_path)]) == 0
    assert run_study(study, tmp_path).done == 3
    assert not [note for note in notes if note.exists()]


def _made_up(cell, here, device):
    """Store a result without any work."""
    values = {"values": {}, "recipe": {}} if cell.kind == "train" else {"metrics": {}, "verdict": {}}
    here.write(cell, values, 0.0, (), device)


def test_a_folder_in_place_of_a_result_is_damage_as_any_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gambeson.studies.runner.execute", _made_up)
    study = tiny(seeds=1, defenses={"standard": "standard"})
    folders = [Store(tmp_path).folder(cell) for cell in Matrix(study).cells]
    (folders[0] / "result.json" / "inside").mkdir(parents=True)
    (folders[1] / "failure.json").mkdir(parents=True)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study.plain()))
    assert run(["study", "status", str(tmp_path / "s.yaml"), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("damaged, made again by the next run: ") == 1
    assert f"train of standard on digits, lenet5, seed 0: {folders[0] / 'result.json'} is damaged" in said
    with pytest.warns(UserWarning, match=r"train of standard on digits.*is damaged.*it is made again"):
        again = run_study(study, tmp_path)
    assert (again.done, again.damaged, again.failed) == (3, {}, {})
    assert not (folders[1] / "failure.json").exists()


@pytest.mark.parametrize("text", ["[]", '{"device": "cpu"}', '{"seconds": [1]}', '{"device": "cpu", "sec', "null"])
def test_a_damaged_plan_is_measured_again(text, tmp_path, monkeypatch):
    study = tiny(seeds=1, defenses={"standard": "standard"})
    matrix = prepare(study, tmp_path)
    (tmp_path / "tiny" / "plan.json").write_text(text)
    monkeypatch.setattr(planning, "_timed", lambda cells, *_: dict.fromkeys(map(store.key_of, cells), 7.0))
    assert run_study(study, tmp_path, minutes=0).done == 0
    assert planning.plan(matrix, Store(tmp_path), "cpu").seconds[1] == 21
    assert Estimates(matrix, Store(tmp_path), "cpu").of(matrix.cells[0]) == 7


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
    _wait_until(lambda: (tmp_path / "lock.1").stat().st_mtime_ns > before, 60)  # its heart beats
    (tmp_path / "lock.2").write_text("{}")  # taken over by another
    third.release()
    assert (tmp_path / "lock.2").exists()


@pytest.mark.parametrize("text", ["[1]", "", "{}", '{"process": "x"}', '{"process": 1e99}'])
def test_a_damaged_lock_holds_until_it_is_old(text, tmp_path):
    named = text.replace("{", f'{{"machine": {json.dumps(store._machine())}' + (", " if len(text) > 2 else ""))
    for content in (text, named):
        (tmp_path / "lock.0").write_text(content)
        assert Lock.take(tmp_path) is None
        old = time.time() - store.STALE - 5
        os.utime(tmp_path / "lock.0", (old, old))
        lock = Lock.take(tmp_path)
        assert lock is not None
        lock.release()
        assert not list(tmp_path.iterdir())


def nothing_is_held(root):
    """A run killed between a result and the release of its lock leaves the file, which may not hold the cell."""
    for folder in root.glob("cells/*"):
        lock = Lock.take(folder)
        assert lock is not None
        lock.release()
        assert not list(folder.glob("lock.*"))


@pytest.mark.full
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(done, tmp_path):
    result, _ = done
    begun = killed_after(2, tmp_path)
    assert 2 <= begun < 18
    again = run_study(tiny(), tmp_path)
    assert again.done == 18
    assert numbers(again) == numbers(result)
    nothing_is_held(tmp_path)


def killed_after(cells, out):
    """Kill a run of the study once so many cells are finished; return how many were."""
    (out / "tiny.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY}))
    command = [sys.executable, "-m", "gambeson", "study", "run", str(out / "tiny.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: len(list(out.glob("cells/*/result.json"))) >= cells, 120)
    finally:
        process.kill()
        process.wait()
    return len(list(out.glob("cells/*/result.json")))


@pytest.mark.full
def test_the_workers_of_a_killed_run_end_with_it(tmp_path):
    long = {**TINY, "recipe": {**TINY["recipe"], "epochs": 100_000}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"kind": "study", **long}))
    command = [sys.executable, "-m", "gambeson", "study", "run", str(tmp_path / "s.yaml"), "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: len(list(tmp_path.glob("cells/*/run/metrics.jsonl"))) == 2, 120)  # both are training
        workers = [json.loads(lock.read_text())["process"] for lock in tmp_path.glob("cells/*/lock.*")]
    finally:
        process.kill()
        process.wait()
    assert len(set(workers) - {process.pid}) == 2
    _wait_until(lambda: not any(_runs(worker) for worker in workers), 20)


def _runs(process):
    """Whether a process is there and has not ended; where nobody waits for it, it stays as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.full
def test_two_runners_share_what_a_killed_run_has_left(done, tmp_path):
    result, _ = done
    killed_after(4, tmp_path)
    again = run_study(tiny(), tmp_path, workers=2)
    assert again.done == 18
    assert numbers(again) == numbers(result)
    nothing_is_held(tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_worker_killed_at_random_loses_its_unfinished_step_alone(done, tmp_path):
    result, _ = done
    found = []
    runner = threading.Thread(target=lambda: found.append(run_study(tiny(), tmp_path, workers=2)))
    runner.start()
    killed, deadline, draw = 0, time.monotonic() + 1200, random.Random(0)
    while runner.is_alive() and time.monotonic() < deadline:
        workers = multiprocessing.active_children()
        if workers and killed < 2 and len(list(tmp_path.glob("cells/*/result.json"))) > 3 * killed:
            time.sleep(draw.random())
            draw.choice(workers).kill()
            killed += 1
        time.sleep(0.2)
    runner.join(300)
    assert killed == 2
    assert (found[0].done, found[0].failed) == (18, {})
    assert numbers(found[0]) == numbers(result)
    nothing_is_held(tmp_path)


def test_a_full_disk_leaves_the_study_intact(done, tmp_path):
    result, _ = done
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutOfSpace, match="nothing half-written was left"):
            run_study(tiny(seeds=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    nothing_is_held(tmp_path)
    assert numbers(run_study(tiny(seeds=1), tmp_path)).items() == {
        (key, value) for key, value in numbers(result).items() if key[3] == 0
    }


def test_a_cell_that_fails_is_told_and_the_others_are_done(tmp_path, capsys):
    wide = {"name": "shared-adversarial", "settings": {"sharedness": 16}, "recipe": {"batch_size": 512, "epochs": 1}}
    changes = {"defenses": {"standard": "standard", "wide": wide}, "seeds": 1}
    result = run_study(tiny(**changes), tmp_path)
    assert [row.missing for row in result.rows] == [[], ["train", "clean", "fgsm"]]
    assert list(result.failed) == ["train of wide on digits, lenet5, seed 0"]
    assert "batch size 512 does not fit 256 training images" in str(result.failed)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY, **changes}))
    assert run(["study", "run", str(tmp_path / "s.yaml"), "--out", str(tmp_path)]) == 2  # the command says it too
    assert "1 of 6 cells have failed, among them train of wide" in capsys.readouterr().err


def test_a_cell_that_crashes_is_tried_again_as_often_as_the_study_says(tmp_path, monkeypatch):
    tried = []

    def fake(cell, here, device):
        tried.append(cell.title)
        if cell.label == "fgsm" and (cell.row.seed == 1 or tried.count(cell.title) < 3):
            raise RuntimeError("the machine had a bad moment")
        _made_up(cell, here, device)

    monkeypatch.setattr("gambeson.studies.runner.execute", fake)
    monkeypatch.setattr("gambeson.studies.runner._POLL", 0.01)
    study = tiny(defenses={"standard": "standard"}, resources={"retries": 2})
    result = run_study(study, tmp_path)
    assert [row.missing for row in result.rows] == [[], ["fgsm"]]
    assert {title: tried.count(title) for title in tried if title.startswith("fgsm")} == {
        "fgsm of standard on digits, lenet5, seed 0": 3,  # the third time it works
        "fgsm of standard on digits, lenet5, seed 1": 3,  # and here it never does
    }
    assert list(result.failed) == ["fgsm of standard on digits, lenet5, seed 1"]
    assert "RuntimeError: the machine had a bad moment" in str(result.failed)
    again = run_study(study, tmp_path)  # a new run tries again
    assert tried.count("fgsm of standard on digits, lenet5, seed 1") == 6
    assert list(again.failed) == list(result.failed)


@pytest.mark.full
def test_the_time_is_kept(tmp_path):
    assert run_study(tiny(), tmp_path, minutes=0).done == 0
    began = time.monotonic()
    matrix = prepare(tiny(), tmp_path)
    estimate = {"train": 1.0, "clean": 1e6, "fgsm": 1e6}
    runner = Runner(matrix, Store(tmp_path), "cpu", began + 100, lambda cell: estimate[cell.label or cell.kind])
    assert {cell.kind for cell in runner.go()} == {"measure"}  # what takes too long is not begun


def test_time_that_is_over_before_the_first_cell_is_no_error(tmp_path, monkeypatch):
    @contextmanager
    def slow(*_):
        time.sleep(0.5)  # the alarm comes here
        yield

    monkeypatch.setattr("gambeson.studies.runner._threads", slow)
    assert run_study(tiny(), tmp_path, minutes=0).done == 0


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


def test_a_large_network_is_planned_by_counting(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "LONG", 0.0)  # nothing is short

    def timed(*_):
        raise AssertionError("a step was timed")

    monkeypatch.setattr(planning, "plan_training", timed)
    defenses = {**TINY["defenses"], "pgd": {"name": "pgd-adversarial", "settings": {"steps": 10}}}
    prices = planning._Prices("cpu")
    data = gb.data.load("digits")
    cells = {cell.row.defense: cell for cell in Matrix(tiny(defenses=defenses)).cells if cell.kind == "train"}
    ratios = {name: prices.ratio(TrainRun(**cell.settings["run"]), data) for name, cell in cells.items()}
    assert ratios["standard"] == 1
    # Ten gradients of images, each of which costs two forwards, and a step of three; no input gradient in a plain step.
    assert 7 < ratios["pgd"] < 9
    assert 1 < ratios["heaps"] < ratios["pgd"]
    found = planning.plan(Matrix(tiny(defenses=defenses)), Store(tmp_path), "cpu")
    seconds = {
        cell.row.defense: Estimates(Matrix(tiny(defenses=defenses)), Store(tmp_path), "cpu").of(cell)
        for cell in cells.values()
    }
    assert (seconds["pgd"] - planning.OVERHEAD) / (seconds["standard"] - planning.OVERHEAD) == pytest.approx(
        ratios["pgd"], rel=1e-6
    )
    assert found.cells == 24


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
    before = file.read_bytes()
    for to in ("csv", "json", "cells"):
        assert run(["study", "export", str(file), "--out", str(root), "--to", to, "--file", str(file)]) == 2
        assert f"{file} exists and is not" in " ".join(capsys.readouterr().err.split())
        for _ in range(2):  # again, in its place
            own = str(tmp_path / f"own.{to}")
            assert run(["study", "export", str(file), "--out", str(root), "--to", to, "--file", own]) == 0
        capsys.readouterr()
    assert file.read_bytes() == before
    assert len(lines) == 1 + sum(len(row.values) for row in result.rows)
    with (tmp_path / "x.csv").open() as opened:
        table = list(csv.DictReader(opened))
    fgsm = next(
        line for line in table if (line["seed"], line["variant"], line["metric"]) == ("1", "sigma 0.7", "fgsm.accuracy")
    )
    row = next(row for row in result.rows if (row.variant, row.seed) == ("sigma 0.7", 1))
    assert float(fgsm["value"]) == row.values["fgsm.accuracy"].value
    assert run(["study", "export", str(file), "--out", str(root), "--to", "xls"]) == 2
    assert "expected one of csv, parquet, json" in capsys.readouterr().err


def test_an_earlier_summary_stands_in_for_data_sets_that_are_not_run(done, tmp_path, capsys):
    other = TINY["data"][0] | {"name": "mnist5k"}
    study, root = tiny(data=[*TINY["data"], other], claims={"c": CLAIM}), done[1]
    file, both = tmp_path / "tiny.yaml", tmp_path / "both.json"
    file.write_text(yaml.safe_dump(study.plain(), sort_keys=False))
    here = read_study(study, root)
    assert {row.data for row in here.rows if row.values} == {"digits"}
    assert run(["study", "export", str(file), "--to", "json", "-o", str(root), "-f", str(tmp_path / "here.json")]) == 0
    earlier = json.loads((tmp_path / "here.json").read_text())
    for row in earlier["rows"]:  # as if both had run, with other numbers
        row["values"] = row["values"] or {"fgsm.accuracy": {"value": 0.5 + 0.1 * (row["defense"] == "heaps")}}
        row["values"]["clean.accuracy"] = {"value": 0.25}
        row["not run"], row["flat"] = [], False
    earlier["date"] = "2020-01-01 00:00"
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    assert run(["study", "export", str(file), "--to", "json", "-o", str(root), "-f", str(both), "--join",
                str(tmp_path / "earlier.json")]) == 0  # fmt: skip
    found = json.loads(both.read_text())
    for row, own in zip(found["rows"], here.rows, strict=True):
        mine = own.values["clean.accuracy"].value if row["data"] == "digits" else 0.25
        assert row["values"]["clean.accuracy"]["value"] == mine
        assert row.get("flat") is (None if row["data"] == "digits" else False)
    assert (found["done"], found["cells"], here.done) == (36, 36, 18)
    assert found["joined"] == {"2020-01-01 00:00": ["mnist5k, lenet5, equal steps"]}
    digits, taken = found["claims"][0]["findings"]
    assert digits["effects"] == {str(seed): effect for seed, effect in here.claims[0].findings[0].effects.items()}
    assert taken["effects"] == {"0": pytest.approx(0.1), "1": pytest.approx(0.1)}
    assert joined(here, json.loads((tmp_path / "here.json").read_text())).joined == {}
    later = found | {"date": "2021-01-01 00:00"}  # whose data set was joined in its turn
    assert joined(here, later).joined == found["joined"]
    assert {row.date for row in joined(here, later).rows if row.data == "mnist5k"} == {"2020-01-01 00:00"}
    rows = [row.model_copy(update={"values": dict(list(row.values.items())[:1])}) for row in here.rows]
    few = joined(here.model_copy(update={"rows": rows}), earlier)  # of the digits too it has more
    assert {row.values["clean.accuracy"].value for row in few.rows} == {0.25}
    for content, words in (
        (earlier | {"study": earlier["study"] | {"seeds": [0, 1, 2]}}, "another seeds: expected one of the same study"),
        ({"rows": []}, "expected a summary of a study"),
        ([], "expected a summary of a study"),
    ):
        (tmp_path / "earlier.json").write_text(json.dumps(content))
        command = ["study", "export", str(file), "-o", str(root), "--join", str(tmp_path / "earlier.json")]
        assert run(command) == 2
        assert words in capsys.readouterr().err
    assert run([*command, "--to", "cells"]) == 2
    assert "--join takes in a summary" in capsys.readouterr().err


def test_parquet_has_what_csv_has(done, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    result, _ = done
    export(result, "csv", tmp_path / "x.csv")
    for _ in range(2):  # again, in its place
        export(result, "parquet", tmp_path / "x.parquet")
    with (tmp_path / "x.csv").open() as opened:
        text = list(csv.DictReader(opened))
    lines = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert [{key: "" if value is None else str(value) for key, value in line.items()} for line in lines] == text
    assert {type(line["value"]) for line in lines} == {float}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defenses": {"a": "heap"}}, "unknown defence 'heap'"),
        ({"claims": {"C": {**CLAIM, "of": "heap"}}}, "unknown defence of the study 'heap': did you mean heaps"),
        ({"claims": {"C": {**CLAIM, "metric": "uap.uer"}}}, "unknown measure of the study 'uap'"),
        ({"claims": {"C": {**CLAIM, "metric": "fgsm.acc"}}}, "unknown metric 'fgsm.acc'"),
        ({"claims": {"C": {**CLAIM, "at_least": None}}}, "either at_least or at_most"),
        ({"claims": {"C": CLAIM}, "seeds": 1}, "needs 2 or more"),
        ({"claims": {"C": {**CLAIM, "to": ["standard", "standard"]}}}, "two claims are called 'C against standard'"),
        ({"claims": {"C": {**CLAIM, "to": ["standard", "heap"]}}}, "unknown defence of the study 'heap'"),
        ({"claims": {"C": {**CLAIM, "to": []}}}, "Claim.to = []"),
        ({"claims": {"C": {**CLAIM, "to": "heaps"}}}, "both sides are heaps"),
        ({"claims": {"C": {**CLAIM, "keeping": {"than": "standard", "drop": 2}}}}, "less than 1"),
        ({"models": ["lenet5", "lenet5"]}, "model: lenet5 is given twice"),
        ({"data": [{"name": "digits", "eps": eps} for eps in (0.1, 0.2)]}, "data set: digits is given twice"),
        ({"data": [{"name": "digits", "eps": 51}]}, "did you mean 51/255?"),
        (
            {"defenses": {"a": {"name": "shared-adversarial", "grid": {"sigma": [0.3, 0.3]}}}},
            "sigma of a: 0.3 is given twice",
        ),
        (
            {"defenses": {"a": {"name": "shared-adversarial", "settings": {"sigma": 0.2}, "grid": {"sigma": [0.3]}}}},
            "sigma of a is in its grid",
        ),
        ({"measures": {"a": {"kind": "accuracy", "seeds": [7]}}}, "the measure a is of seed 7"),
        ({"measures": {"a": {"kind": "attack", "attack": "fgms"}}}, "unknown attack 'fgms'"),
        ({"measures": {"train": {"kind": "accuracy"}}}, "a measure is called 'train', as a study's own cells are"),
        ({"measures": {"search": {"kind": "accuracy"}}}, "a measure is called 'search', as a study's own cells are"),
        ({"measures": {"pgd.20": {"kind": "accuracy"}}}, "a measure is called 'pgd.20': give it a label without a dot"),
        ({"seeds": [1, 1]}, "expected different numbers"),
        ({"at": ["seconds"]}, "all train as long as one defence: name it as the reference"),
        ({"recipe": {"epoch": 3}}, "did you mean epochs?"),
        ({"name": "a/b"}, "name"),
        ({"name": "cells"}, "cells is the folder of all studies' results"),
        ({"at": ["steps", "steps"]}, "at: steps is given twice"),
        ({"claims": {"C": {**CLAIM, "at": ["seconds"]}}}, "the claim C is at equal seconds, and the study is not"),
        ({"claims": {"C": {**CLAIM, "metric": "clean.uer"}}}, "'clean.uer': did you mean clean.accuracy"),
        ({"claims": {"C": {**CLAIM, "metric": "fgsm.uer"}}}, "unknown metric of the claim C 'fgsm.uer'"),
        ({"claims": {"C": {**CLAIM, "metric": "train.accuracy"}}}, "did you mean train.validation_accuracy"),
        (
            {"claims": {"C": {**CLAIM, "of": {"defense": "heaps", "variant": "sigma 9"}}}},
            "unknown variant of heaps in the claim C 'sigma 9': did you mean sigma 0.",
        ),
        (
            {"claims": {"C": CLAIM}, "measures": {"fgsm": {**TINY["measures"]["fgsm"], "defenses": ["heaps"]}}},
            "the claim C reads fgsm of standard at equal steps, which is not measured there: widen",
        ),
        (
            {
                "claims": {"C": {**CLAIM, "data": ["digits"]}},
                "measures": {"fgsm": {**TINY["measures"]["fgsm"], "defenses": ["standard"]}},
            },
            "the claim C reads fgsm of heaps at equal steps, which is not measured there: widen",
        ),
        ({"search": {"lr": [-1]}}, "learning rates are positive, got -1"),
        ({"search": {"lr": {"low": 0, "high": 1}, "trials": 2}}, "learning rates are positive, got 0"),
        ({"search": {"lr": [0.1, 0.1]}}, "lr of the search: 0.1 is given twice"),
        ({"search": {"lr": [0.1], "warmup": [1, 0, 1]}}, "warmup of the search: 1.0 is given twice"),
        ({"search": {"lr": [0.1], "warmup": [-1]}}, "a warm-up takes 0 epochs or more, got -1"),
        ({"search": {"lr": [0.1], "lengths": [1, 0.5]}}, "expected ascending lengths, got 1, 0.5"),
        ({"search": {"lr": [0.1], "lengths": [1, 1]}}, "expected ascending lengths, got 1, 1"),
        (
            {
                "data": [TINY["data"][0], TINY["data"][0] | {"name": "mnist5k"}],
                "models": [{"name": "lenet5", "data": ["mnist5k"]}],
                "defenses": {"a": {"name": "standard", "data": ["digits"]}},
            },
            "the study tiny trains nothing",
        ),
        ({"models": ["lenet6"]}, "unknown model 'lenet6'"),
        ({"data": [{"name": "digit", "eps": 0.1}]}, "unknown data set 'digit'"),
        ({"data": [{"name": "image-folder:/nowhere/at/all", "eps": 0.1}]}, "/nowhere/at/all"),
        ({"seeds": 0}, "Study.seeds = 0: expected 1 or more"),
        ({"search": {"lr": []}}, "Search.lr = []: expected 1 or more"),
        ({"defenses": {"a": "mine.py"}}, "mine.py is a file: name a defence in it, as mine.py:NAME"),
    ],
)
def test_a_wrong_study_is_one_sentence(changes, words, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY, **changes}))
    assert run(["study", "run", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--minutes", "0"]) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert run(["study", "plan", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2


def test_a_data_set_that_is_yet_to_be_downloaded_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GAMBESON_DATA", str(tmp_path / "data"))

    def load(_):
        raise UserError("could not get cifar10, every way failed")

    monkeypatch.setattr("gambeson.studies.study.data_room.load", load)
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"kind": "study", **TINY, "data": [{"name": "cifar10", "eps": 0.1}]}))
    assert run(["study", "plan", str(file), "--out", str(tmp_path / "out")]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "on cifar10, lenet5, seed 0: could not get cifar10, every way failed" in said


def test_time_too_short_for_any_cell_is_said_with_what_the_next_one_takes(tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"kind": "study", **TINY}))
    monkeypatch.setattr("gambeson.studies.runner.execute", lambda *_: pytest.fail("begun"))
    command = ["study", "run", str(file), "--out", str(folder), "--minutes"]
    assert run([*command, "0"]) == 0
    said = "no cell was finished in 0.0 s: the next one, train of heaps (sigma 0.3) on digits, lenet5, seed 0, takes"
    assert f"{said} a time that `gambeson study plan` measures" in " ".join("".join(capsys.readouterr()).split())
    seconds = {store.key_of(cell): 90.0 for cell in Matrix(tiny()).cells}
    (folder / "tiny" / "plan.json").write_text(json.dumps({"device": "cpu", "seconds": seconds}))
    assert run([*command, "0.05", "--device", "cpu"]) == 0
    said = "no cell was finished in 3.0 s: the next one, train of heaps (sigma 0.3) on digits, lenet5, seed 0, takes"
    assert f"{said} 1 min 30 s" in " ".join("".join(capsys.readouterr()).split())
    monkeypatch.setattr("gambeson.studies.runner.execute", _made_up)
    (folder / "tiny" / "plan.json").unlink()
    assert run([*command, "1"]) == 0
    assert "no cell was finished" not in "".join(capsys.readouterr())


def test_more_images_than_there_are_are_refused(tmp_path, capsys):
    data = [{"name": "digits", "eps": 0.1, "test": 100_000}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY, "data": data}))
    for command in ("plan", "run"):
        assert run(["study", command, str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
        said = " ".join("".join(capsys.readouterr()).split())
        assert "digits/test has 449 images, and the study asks for 100000: ask for fewer" in said


def test_a_search_takes_all_images_where_there_are_fewer_than_it_may_take(tmp_path):
    search = {"lr": [0.01], "warmup": [0], "train": 100_000}
    study = tiny(search=search, seeds=1, defenses={"standard": "standard"}, measures={"clean": {"kind": "accuracy"}})
    result = run_study(study, tmp_path)
    assert not result.failed
    assert result.rows[0].recipe["lr"] == 0.01


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


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[ray\]'"):
        run_study(tiny(), tmp_path, ray="local")


CLUSTER = {
    "RAY_AUTH_MODE": "disabled",  # both ends are here
    "RAY_raylet_start_wait_time_s": "600",  # busy machines start slowly
    "RAY_memory_monitor_refresh_ms": "0",  # and are not this test's to tidy up
}


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@needs_ray
@pytest.mark.full
@pytest.mark.timeout(1800)  # a busy machine starts a cluster in minutes
def test_a_local_cluster_gives_the_numbers_of_one_process(tmp_path, monkeypatch):
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    small = {"seeds": 1, "defenses": {"standard": "standard"}}
    here = run_study(tiny(**small), tmp_path / "here")
    there = run_study(tiny(**small), tmp_path / "there", ray="local")
    assert there.done == there.cells
    assert numbers(there) == numbers(here)


def test_a_cluster_that_is_lost_is_waited_for_and_one_that_never_answers_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(
        "gambeson.studies.runner.execute", lambda cell, here, device: here.write(cell, {}, 0, (), device)
    )
    monkeypatch.setattr(cluster, "_AGAIN", 0.0)
    runner = Runner(prepare(tiny(), tmp_path), Store(tmp_path), "cpu")
    tries = []

    def driven(runner, address):
        tries.append(address)
        yield [("refused", "no cluster")] if len(tries) == 2 else [("connected", "")]
        if len(tries) == 2:
            return
        for cell in runner.look()[: 3 if len(tries) == 1 else None]:
            runner.attempt(cell)
        yield [] if len(tries) == 1 else [("done", "")]  # Ray ends its process without a word

    monkeypatch.setattr(cluster, "_driven", driven)
    assert cluster.run(runner, "there:1") == []
    assert tries == ["there:1"] * 3
    monkeypatch.setattr(cluster, "PATIENCE", -1)
    tries.clear()
    lost = Runner(prepare(tiny(name="lost", seeds=(7, 8)), tmp_path), Store(tmp_path), "cpu")
    with pytest.raises(UserError, match=r"the Ray cluster is lost \(its process was ended\)"):
        cluster.run(lost, "there:1")
    monkeypatch.setattr(cluster, "_driven", lambda *_: iter([[("refused", "no cluster")]]))
    with pytest.raises(UserError, match="no cluster"):
        cluster.run(lost, "there:1")
    monkeypatch.setattr(cluster, "_driven", lambda *_: iter([[("connected", "")], [("full", "no space")]]))
    with pytest.raises(OutOfSpace, match="no space"):
        cluster.run(lost, "there:1")


def head(port, folder):
    """Start the head of a cluster, with its own processes."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--port={port}", "--num-cpus=1", "--disable-usage-stats", f"--temp-dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | CLUSTER, start_new_session=True, **quiet)


@needs_ray
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_study_outlives_the_head_of_its_cluster(done, tmp_path):
    result, _ = done
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"kind": "study", **TINY}))
    command = [sys.executable, "-m", "gambeson", "study", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # Ray's sockets need a short path
        first = head(port, folder)
        study = None
        try:
            _wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            command += ["--ray", f"127.0.0.1:{port}"]
            study = subprocess.Popen(command, env=os.environ | CLUSTER, start_new_session=True)
            _wait_until(lambda: list(tmp_path.glob("cells/*/result.json")))
            first.terminate()
            first.wait(120)
            begun = len(list(tmp_path.glob("cells/*/result.json")))
            assert study.poll() is None
            first = head(port, folder)
            assert study.wait(900) == 0
        finally:
            first.terminate()
            first.wait(120)
            if study is not None and study.poll() is None:
                os.killpg(study.pid, signal.SIGKILL)
    assert begun < 18
    found = read_study(tmp_path / "tiny")
    assert (found.done, found.failed) == (18, {})
    assert numbers(found) == numbers(result)


def _wait_until(true, seconds=600):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defenses: [standard]", "defenses"),
        ("seeds: 100000000", "at most 1000"),
        ("2026-11-30: x", "no name of a setting"),
        ("claims: {c: {statement: s, metric: 5, of: standard, at_least: 0}}", "metric"),
        ("defenses: {standard: {name: shared-adversarial, grid: {times_eps: [a]}}}", "times_eps"),
    ],
)
def test_entries_of_a_wrong_kind_are_refused_in_a_sentence(tmp_path, text, said):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**tiny().plain(), **yaml.safe_load(text)}))
    with pytest.raises(UserError, match=said):
        assert Matrix(Study.load(file)).cells
