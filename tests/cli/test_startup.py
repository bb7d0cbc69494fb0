"""What a start costs: help and ``import gambeson`` wait for no heavy library."""

import io
import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata

import pytest
import typer

import gambeson as gb
from gambeson.auditing import SUITES, Suite
from gambeson.cli import options
from gambeson.cli.app import app, run
from gambeson.evaluation import AttackRun, TransferRun
from gambeson.models.export import TARGETS
from gambeson.training.recipe import PRESETS, Recipe
from tests.conftest import full

HEAVY = {
    "torchvision",
    "accelerate",
    "plotly",
    "jinja2",
    "scipy",
    "httpx2",
    "pooch",
    "pandas",
    "sklearn",
    "torch._dynamo",
}
COMMANDS = [
    "quickstart",
    "train",
    "audit",
    "attack",
    "transfer",
    "report",
    "export",
    "data",
    "uap",
    "bench",
    "study",
    "zoo",
]
EVERY_PACKAGE = "import gambeson as gb; [getattr(gb, name) for name in gb.__all__]"


def start(arguments, code="from gambeson.cli import main; main()"):
    """Run Python anew: its output, the modules that it imported, and the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, set(done.stderr.split()), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_lists_every_command_without_torch():
    text, modules, seconds = start(["--help"])
    for name in COMMANDS:
        assert re.search(rf"^\W+{name} +\w.*\.", text, re.MULTILINE), name
    assert {"gambeson", "gambeson.cli.audit"} <= modules
    assert not modules & (HEAVY | {"torch", "numpy", "gambeson.base"})
    assert seconds < 1.5


@pytest.mark.parametrize(
    "command",
    [
        "audit",
        "transfer",
        "export",
        "data get",
        "bench training",
        "bench audit",
        "study run",
        "train",
        "attack",
        "uap craft",
        "list",
    ],
)
def test_help_of_a_command_needs_no_torch(command):
    _, modules, seconds = start([*command.split(), "--help"])
    assert not modules & (HEAVY | {"torch", "numpy"})
    assert seconds < 1.5


def test_import_costs_no_more_than_that_of_torch():
    _, modules, seconds = start([], "import gambeson")
    assert not modules & (HEAVY | {"torch", "pydantic"})
    assert seconds < start([], "import torch")[2] + 0.5


def test_no_package_imports_what_only_some_of_its_functions_use():
    _, modules, _ = start([], EVERY_PACKAGE)
    assert {"torch", "gambeson.attacks.query.square", "gambeson.report.page", "gambeson.training.loop"} <= modules
    assert not modules & HEAVY


def test_the_version_is_that_of_the_installed_package_and_needs_no_torch(monkeypatch):
    code = "from importlib import metadata\nmetadata.version = lambda name: {'gambeson': '7.8.9'}[name]\n"
    text, modules, _ = start(["--version"], code + "from gambeson.cli import main; main()")
    assert text == "gambeson 7.8.9\n"
    assert not modules & (HEAVY | {"torch", "numpy", "gambeson.base"})
    assert "importlib.metadata" not in start([], "import gambeson")[1]
    assert gb.__version__ == metadata.version("gambeson")
    assert "__version__" in dir(gb)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.delattr(gb, "__version__")  # kept since it was first asked for
    monkeypatch.setattr(metadata, "version", missing)
    assert gb.__version__ == "unknown"


@pytest.mark.parametrize("kind", ["attacks", *map(full, ("defenses", "models", "data", "diagnostics"))])
def test_a_listing_imports_what_registers_and_nothing_heavy(kind):
    text, modules, _ = start(["list", kind])
    assert len(text.splitlines()) > 5
    assert "gambeson.base.registry" in modules
    assert not modules & HEAVY


def test_lazy_names_are_those_of_the_packages():
    from gambeson.auditing import audit
    from gambeson.training import train

    assert gb.train is train
    assert gb.audit is audit
    assert gb.UserError is gb.base.UserError
    assert set(gb.__all__) <= set(dir(gb))
    for name in gb.__all__:
        assert getattr(gb, name) is not None
    with pytest.raises(AttributeError, match="module 'gambeson' has no attribute 'atacks'"):
        _ = gb.atacks
    with pytest.raises(ImportError, match="cannot import name 'atacks'"):
        exec("from gambeson import atacks")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["audit"], "{}, {}, {} or {}:".format(*SUITES)),
        (["export"], "{}, {} or {}.".format(*TARGETS)),
    ],
)
def test_help_names_what_can_be_chosen(capsys, command, names):
    for _ in range(2):
        assert run([*command, "--help"]) == 0
        text = re.sub(r"[\s│]+", "", capsys.readouterr().out)  # without the table's lines and wrapping
        assert names.replace(" ", "") in text


THREADS = "import gambeson.cli.app as app, sys; app.run(sys.argv[1:]); import torch; print(torch.get_num_threads())"


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        full(["list", "models", "--threads", "1"], None, "1"),
        full(["--threads=1", "list", "models"], "2", "1"),
        full(["list", "models"], "2", "2"),
        (["list", "models"], None, None),
    ],
)
def test_threads_depend_on_the_machine_and_the_user_not_on_the_load(arguments, given, expected):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    code = f"import os; os.getloadavg = lambda: (900, 0, 0)\n{THREADS}; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split()[-2:] == [expected or str(cores), "PASSIVE"]


def test_the_testbed_is_listed_without_importing_it():
    text, modules, seconds = start(["testbed", "list"])
    assert "four grey levels" in text
    assert not modules & (HEAVY | {"torch", "numpy", "gambeson.testbed"})
    assert seconds < 1.5


def test_names_are_completed_by_the_shell(monkeypatch):
    monkeypatch.setenv("_GAMBESON_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gambeson attack --attack auto-")
    monkeypatch.setenv("COMP_CWORD", "3")
    text, _, _ = start([])
    assert {"auto-pgd", "auto-pgd-targeted"} <= set(text.split())


@pytest.mark.parametrize(
    ("command", "run", "paths"),
    [
        ("attack", AttackRun, {"attack": "attack", "images": "images", "seed": "seed"}),
        ("transfer", TransferRun, {"images": "images", "norm": "norm", "seed": "seed"}),
        ("train", Recipe, {"epochs": "epochs", "batch_size": "batch_size", "lr": "lr", "augment": "augment"}),
        ("audit", Suite, {"surrogate": "surrogate", "norm": "norm"}),
    ],
)
def test_the_defaults_that_help_shows_are_those_of_the_settings(command, run, paths):
    shown = {one.name: one.show_default for one in typer.main.get_command(app).commands[command].params}
    for option, setting in paths.items():
        usual, _, maps = shown[option].partition("; ")
        assert usual == str(run.model_fields[setting].default), option
        assert not maps or maps.split()[0] == str(PRESETS["segmentation"][setting]), option


def test_without_a_terminal_progress_is_lines(monkeypatch):
    from rich.console import Console

    from gambeson.base import progress

    text, clock = io.StringIO(), iter(range(0, 100, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.show_progress(Console(file=text, width=40)), progress.task("train a net", 5) as advance:
        for _ in range(5):
            advance()
    assert text.getvalue().splitlines() == [
        "train a net: 1 of 5, about 24 s left",
        "train a net: 3 of 5, about 12 s left",
        "train a net: 5 of 5, 30 s",
    ]


@pytest.mark.full
def test_an_attack_loads_no_algebra():
    """Torch imports sympy, for a second, where a gradient is asked for with a cotangent of its own."""
    script = (
        "import sys, gambeson as gb; data = gb.data.load('digits'); x, y = data.test.take(slice(0, 8));"
        "gb.attacks.PGD(eps=0.1, steps=2)(gb.models.create('lenet5', data), x, y); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_steps_are_shown_unless_they_are_part_of_a_task():
    from rich.console import Console

    from gambeson.base import progress

    text = io.StringIO()
    with progress.show_progress(Console(file=text, width=40)):
        assert list(progress.tracked("abc", "restart 1", 3)) == ["a", "b", "c"]
        with progress.task("audit", 1) as advance:
            assert list(progress.tracked("abc", "restart 2", 3)) == ["a", "b", "c"]
            advance()
        list(progress.tracked("abc", "restart 3", 3))
    assert [line.split(":")[0] for line in text.getvalue().splitlines()] == ["restart 1", "audit", "restart 3"]


@pytest.mark.parametrize("kind", list(options.Kind))
def test_completion_knows_every_name_and_reads_registries_once(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "NAMES", tmp_path / "new" / "names.json")
    names = sorted(entry.name for entry in options.registry(kind).own())  # other tests register more
    assert options.complete(kind)("") == names
    with monkeypatch.context() as without:
        without.setattr(options, "registry", None)
        assert options.complete(kind)("s") == [name for name in names if name.startswith("s")]
    for spoilt in ("{", "[]", json.dumps({"stamp": "of other files", kind: ["old"]})):
        options.NAMES.write_text(spoilt)
        assert options.complete(kind)("") == names
