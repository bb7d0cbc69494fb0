"""Whatever is typed, the outcome is a result or one sentence with exit code 2, before any work."""

import itertools
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gambeson as gb
from gambeson.cli.app import run

ODD = [
    "",
    " ",
    "0",
    "-1",
    "nan",
    "1e999",
    "26",
    "8/0",
    "none",
    "no/where",
    ".",
    "/",
    "[1",
    "{",
    "a:b",
    "x.py:Y",
    "ü\n",
    "'",
]
NAMES = ["pgd", "stochastic-pgd", "standard", "shared-adversarial", "quick", "digits", "lenet5", "inf", "2", "auto"]
PAIRS = ["steps={", "steps=two", "recipe.momentum=[1", "recipe=3", "defense=3", "defense=[a]", "suite=1", "settings=x",
         "suite.eps=[[1]]", "a..b=1", "=1", "eps=2020-13-45", "recipe.epochs=!!python/object:os.x", "models=3",
         "attacks=pgd", "seed=[1]", "suite.diagnostics=[x.py:Y]", "defense.name=[]", "kind=audit", "data={a: 1}",
         "model=3", "device=7", "images=many", "suite.name=9", "settings.eps={}", "norm=inf"]  # fmt: skip
OPTIONS = {
    "train": ["--data", "--model", "--defense", "--epochs", "--batch-size", "--lr", "--augment", "--eps", "--norm",
              "--sharedness", "--sigma", "--init", "--config", "--seed", "--device"],
    "audit": ["--model", "--data", "--suite", "--eps", "--norm", "--budget", "--surrogate", "--label", "--config",
              "--seed", "--device"],
    "attack": ["--model", "--data", "--attack", "--eps", "--norm", "--eot-samples", "--images", "--config", "--seed",
               "--device"],
    "transfer": ["--data", "--attacks", "--eps", "--norm", "--eot-samples", "--images", "--config", "--seed"],
    "uap craft": ["--model", "--data", "--attack", "--eps", "--norm", "--seed", "--device"],
    "uap score": ["--model", "--data", "--seed", "--device"],
    "export": ["--model", "--to", "--data", "--images", "--votes", "--seed"],
    "bench attacks": ["--model", "--batch-size", "--steps", "--rounds", "--device"],
    "testbed score": ["--auditor", "--data", "--models"],
    "data get": ["--root"],
    "report": [],
    "list": [],
}  # fmt: skip


def outcome(capsys, arguments):
    """Run a command; return its code and what it said, which is one sentence if it failed."""
    code = run(arguments)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "warning:" not in line]
    assert code in (0, 2), (arguments, code)
    if code == 2:
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == 1, (arguments, said)
        assert "Traceback" not in "".join(said)
        assert not any(
            word in errors[0] for word in ("Input should", "Value error", "TrainRun", "AuditRun", "Settings")
        )
    return code, " ".join(said)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@st.composite
def commands(draw):
    name = draw(st.sampled_from(sorted(OPTIONS)))
    values = st.one_of(st.sampled_from(ODD), st.sampled_from(NAMES))
    words = [draw(values) for _ in range(draw(st.integers(0, 2)))]
    for option in draw(st.lists(st.sampled_from(OPTIONS[name] or ["--odd"]), max_size=4, unique=True)):
        words += [option, draw(values)]
    for pair in draw(st.lists(st.sampled_from(PAIRS), max_size=2)):
        words += ["--set", pair]
    # No real work: these two have data and a model by default.
    words += {"testbed score": ["--models", "nothing"], "bench attacks": ["--device", "quantum"]}.get(name, [])
    return [*name.split(), *(word for word in words if word != "digits")]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=commands())
def test_any_options_end_in_one_sentence(nowhere, capsys, arguments):
    outcome(capsys, arguments)
    assert not list(nowhere.rglob("run.yaml")), arguments


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("attack x --attack stochastic-pgd", "craft it with `gambeson uap craft`"),
        ("transfer a b --attacks fgsm,sga", "craft it with `gambeson uap craft`"),
        ("uap craft x --attack fgsm", "run it with `gambeson attack`"),
        ("uap craft x --set restarts={", "error: --set restarts={: '{' is not YAML"),
        ("uap craft x --set tile={12,12}", "(12 is given twice), quote it"),
        ("uap craft x --set steps=3 --set steps=5", "error: --set steps=3 and --set steps=5 give the same setting"),
        ("train --data digits --epochs 1 --set recipe.epochs=2", "--epochs 1 and --set recipe.epochs=2 give the same"),
        (
            "train --data digits --defense standard --set defense=trades",
            "--defense standard and --set defense=trades give",
        ),
        ("train --data digits --model lenet5 --lr 1 --set recipe={}", "--lr 1.0 and --set recipe={} give the same"),
        ("train --data digits --model lenet5 --set recipe.milestones=[1", "error: --set recipe.milestones=[1: "),
        ("train --data digits --model lenet5 --set lr=-3", "error: --set lr=-3: expected greater than 0"),
        ("train --data digits --model lenet5 --lr -3", "error: --lr -3.0: expected greater than 0"),
        ("train --data digits --model lenet5 --defense trades --eps 12", "error: --eps 12: 12 is too large"),
        ("audit x --eps 0.1,13", "error: --eps 0.1,13: 13 is too large"),
        ("audit x --suite swift", "error: --suite swift: unknown suite 'swift'"),
        ("audit x --set pgd_step=3", "did you mean pgd_steps?"),
        ("attack x --set step=3", "did you mean steps?"),
        ("attack x --images 0", "error: --images 0: expected greater than or equal to 1"),
        ("transfer a b --images=few", "error: --images=few: expected a valid integer"),
        ("transfer a b --norm 7", "error: --norm 7: expected 'inf', '2' or '1'"),
        ("audit x --budget few", "error: --budget few: expected a valid integer"),
        ("bench attacks --rounds 0", "error: --rounds 0: expected greater than or equal to 3"),
        ("list atacks", "'atacks' is not one of 'attacks'"),
    ],
)
def test_mistakes_are_led_by_the_option_as_typed(nowhere, capsys, command, words):
    code, said = outcome(capsys, command.split())
    assert code == 2
    assert words in said


BAD = {
    "signature": "    def __call__(self, model, x):\n        return x\n",
    "nothing": "    def __call__(self, model, x, y, *, seed=0, task=None):\n        pass\n",
    "shape": "    def __call__(self, model, x, y, *, seed=0, task=None):\n        return x[:1, :1]\n",
    "range": "    def __call__(self, model, x, y, *, seed=0, task=None):\n        return x + 2\n",
    "raises": "    def __call__(self, model, x, y, *, seed=0, task=None):\n        return x / [0]\n",
    "exits": "    def __call__(self, model, x, y, *, seed=0, task=None):\n        raise SystemExit(3)\n",
    "craft nothing": "    def craft(self, model, data, *, seed=0):\n        return 3\n",
    "craft signature": "    def craft(self):\n        return 3\n",
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_of_own_attacks_are_sentences(trained, nowhere, capsys, fault):
    gb.models.save(trained, nowhere / "net.safetensors")
    head = "from gambeson.base import Config\n\nclass Mine(Config):\n    eps: float = 0.1\n\n"
    (nowhere / "mine.py").write_text(head + BAD[fault])
    command = ["uap", "craft"] if "craft" in fault else ["attack"]
    call = [*command, "net.safetensors", "--data", "digits", "--attack", "mine.py:Mine", "--out", "o"]
    code, said = outcome(capsys, call if command == ["uap", "craft"] else [*call, "--images", "20"])
    assert code == 2
    assert "Mine" in said
    if "craft" not in fault and fault != "signature":
        (nowhere / "mine.py").write_text(head + BAD["shape"].replace("x[:1, :1]", "(x + 0.05).clamp(0, 1)"))
        assert outcome(capsys, [*call, "--images", "20"])[0] == 0  # the corrected file is not blocked by the first one


def test_a_folder_is_taken_by_valid_settings_only(trained, nowhere, capsys):
    gb.models.save(trained, nowhere / "net.safetensors")
    base = ["net.safetensors", "--data", "digits"]
    for command in (["audit", *base, "--eps", "26"], ["audit", *base, "--surrogate", "net.safetensors"],
                    ["audit", *base, "--surrogate", "no/where"], ["audit", *base, "--set", "diagnostics=[x.py:y]"],
                    ["audit", *base, "--set", "attacks=[nothing]"]):  # fmt: skip
        for plan in ([], ["--plan"]):
            assert outcome(capsys, [*command, *plan, "--out", "o"])[0] == 2
            assert not (nowhere / "o").exists()
    held = gb.auditing.AuditRun(model="net.safetensors", data="digits", suite={"universal_steps": 7}).plain()
    for folder in (nowhere / "net.safetensors-audit", nowhere / "o"):
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump({**held, "environment": {}, "finished": False}))
        (folder / "state").write_text("begun")
    plan = ["audit", *base, "--suite", "glance", "--plan"]
    assert outcome(capsys, [*plan, "--out", "o"])[0] == 2
    assert outcome(capsys, plan)[0] == 0  # where it would be run is asked before it is
    assert outcome(capsys, plan[:-1])[0] == 2
    train = ["train", "--data", "digits", "--model", "lenet5", "--out", "t"]
    for wrong in (["--batch-size", "5000"], ["--defense", "ensemble-adversarial", "--set", "sources=[lenet5,lenet6]"]):
        for plan in ([], ["--plan"]):
            assert outcome(capsys, [*train, "--epochs", "1", *wrong, *plan])[0] == 2
            assert not (nowhere / "t").exists()
    (nowhere / "t").mkdir()
    (nowhere / "t" / "run.yaml").write_text(
        yaml.safe_dump(failed := {"kind": "train", "data": "digits", "model": "lenet"})
    )
    assert outcome(capsys, [*train, "--epochs", "1"])[0] == 2  # not what a run begins with
    (nowhere / "t" / "run.yaml").write_text(yaml.safe_dump({**failed, "environment": {}, "finished": False}))
    assert outcome(capsys, [*train, "--epochs", "1"])[0] == 0


def test_what_cannot_be_written_is_noticed_before_the_work(nowhere, capsys, monkeypatch):
    (nowhere / "file").write_text("")
    monkeypatch.setattr(gb.data, "load", lambda *a, **k: pytest.fail("worked"))
    for place in ("file/x", "/proc/x"):
        code, said = outcome(capsys, ["train", "--data", "digits", "--model", "lenet5", "--out", place])
        assert code == 2
        assert f"{place} cannot be written" in said
        assert "free some space" not in said
        assert "choose another --out" in said


SMALL = ["--suite", "quick", "--eps", "0.1", "--surrogate", "none"] + [
    word
    for pair in ("universal_steps=5", "pgd_steps=2", "test_images=60", "sample=20", "queries=0", "eps_uni_runs=0",
                 "eps_adv=false", "jacobian_backwards=40", "universal_queries=300")
    for word in ("--set", pair)
]  # fmt: skip


@pytest.mark.full
def test_the_advice_for_a_truncated_file_works(nowhere, capsys):
    train = ["train", "--data", "digits", "--model", "lenet5", "--epochs", "2", "--out", "t"]
    audit = ["audit", "t", *SMALL, "--out", "a"]
    assert outcome(capsys, train)[0] == outcome(capsys, audit)[0] == 0
    for command, files in ((train, ["t/model.safetensors", "t/state/latest.safetensors"]),
                           (audit, ["a/result.json", "a/state/stages.json", "a/uap-0.1.safetensors"])):  # fmt: skip
        for name in files:
            path = nowhere / name
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            if "state" in name:
                settings = yaml.safe_load((path.parent.parent / "run.yaml").read_text())
                (path.parent.parent / "run.yaml").write_text(yaml.safe_dump({**settings, "finished": False}))
            code, said = outcome(capsys, command)
            assert code == 2, name
            assert "delete it and run the command that made it" in said
            path.unlink()
            assert outcome(capsys, command)[0] == 0, name
            assert "state" in name or path.read_bytes() == whole, name  # a state has times
    os.remove(nowhere / "a" / "result.json")
    code, said = outcome(capsys, ["report", "a"])
    assert "gambeson audit --config a/run.yaml --out a" in said
    assert outcome(capsys, ["audit", "--config", "a/run.yaml", "--out", "a"])[0] == 0
    assert outcome(capsys, ["report", "a"])[0] == 0


def test_an_eps_that_was_named_is_kept_or_refused():
    from gambeson.auditing.budget import fit_queries as fit
    from gambeson.auditing.cost import most_images
    from gambeson.auditing.suite import Suite

    data = gb.data.load("digits")
    suite = Suite(eps=(0.05, 0.1, 0.2), surrogate="none", budget=10**6)
    least = min(plan.images for plan in _plans(fit, suite, data))
    with pytest.raises(gb.UserError, match=r"the smallest audit of 3 eps asks about \d+; .* or fewer --eps"):
        fit(suite, data, least, 1, keep_eps=True)
    dropped = fit(suite, data, 2 * least, 1)
    assert len(dropped.suite.eps) < 3 or most_images(dropped.suite, data, 1) <= 2 * least


def _plans(fit, suite, data):
    for room in itertools.accumulate([2000] * 60):
        try:
            yield fit(suite, data, room, 1)
        except gb.UserError:
            continue
