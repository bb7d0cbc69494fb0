"""The architecture's rules: imports run downwards, no device is spelt out, checks exist once, one vocabulary."""

import ast
import functools
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "gambeson"
FLOORS = [
    {"base"},
    {"tasks"},
    {"threat", "data"},
    {"models"},
    {"victim"},
    {"attacks", "analysis"},
    {"defenses"},
    {"training", "evaluation"},
    {"auditing"},
    {"testbed", "zoo"},  # built-in auditors of the testbed are the audit
    {"studies"},
    {"report"},
    {"hardening"},
    {"cli"},
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gambeson":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("gambeson.")}
    return found


def test_imports_run_downwards_only():
    seen = 0
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).parts
        if len(parts) == 1:
            continue
        room = parts[0]
        for other in imports_of(file) - {room, "UserError"}:
            seen += 1
            assert FLOOR[other] < FLOOR[room], f"{file} in {room} imports {other}"
    assert seen > 50


def modules() -> dict[str, Path]:
    """Every module of the package by name; a package's name stands for its ``__init__.py``."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = ("gambeson", *file.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


class Imports(ast.NodeVisitor):
    """What a file imports of the package: while it is itself imported, and when a function of it runs."""

    def __init__(self, known: set[str]) -> None:
        self.known = known
        self.at_import: set[str] = set()
        self.in_functions: set[str] = set()
        self._inside = 0

    def visit_Import(self, node):
        self._note([name.name for name in node.names])

    def visit_ImportFrom(self, node):
        assert node.level == 0, "imports are absolute"
        # `from package import name` asks for a module where there is one of that name, else for the package itself.
        self._note([f"{node.module}.{name.name}" for name in node.names], node.module)

    def visit_FunctionDef(self, node):
        for part in [*node.decorator_list, node.args]:
            self.visit(part)
        self._inside += 1
        for part in node.body:
            self.visit(part)
        self._inside -= 1

    def visit_If(self, node):
        test = ast.unparse(node.test)
        for part in [] if test in {"TYPE_CHECKING", "typing.TYPE_CHECKING"} else node.body:
            self.visit(part)
        for part in node.orelse:
            self.visit(part)

    def _note(self, names: list[str], otherwise: str | None = None) -> None:
        found = {name if name in self.known else otherwise for name in names}
        (self.in_functions if self._inside else self.at_import).update(name for name in found if name in self.known)


def graphs(files: dict[str, Path]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Who imports whom: at import, and with what functions import as well."""
    early, late = {}, {}
    for name, file in files.items():
        imports = Imports(set(files))
        imports.visit(parsed(file))
        early[name], late[name] = imports.at_import, imports.at_import | imports.in_functions
    return early, late


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def walk(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                walk(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in graph[name]:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            walk(name)
    return found


def test_no_files_import_each_other_in_a_circle():
    files = modules()
    early, late = graphs(files)
    assert sum(map(len, early.values())) > 500
    assert circles(early) == []
    assert circles(late) == []  # an import inside a function hides a circle, and is no way out of one


def test_a_circle_is_found_wherever_it_hides(tmp_path):
    texts = {
        "p": "",
        "p.a": "from p.b import f",
        "p.b": "if True:\n    from p import c",
        "p.c": "import p.a",
        "p.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.e",
        "p.e": "def f():\n    from p import d",
        "p.f": "def f():\n    from p import g",
        "p.g": "class G:\n    from p.f import x",
    }
    files = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        files[name].write_text(text)
    early, late = graphs(files)
    assert circles(early) == [["p.a", "p.b", "p.c"]]
    assert circles(late) == [["p.a", "p.b", "p.c"], ["p.f", "p.g"]]


LABELS = re.compile(r"(^|[._])(labels?|maps|truths?|targets)(\[.*\])?$")
DOOR = {"data/torch_dataset.py"}  # where items of any form come in, one by one
FILLS = {"data/augment.py"}  # what comes into shifted maps at their edges is the ignore index


def test_only_tasks_ask_what_form_labels_have_and_which_count():
    asked = []
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        if not name.startswith("tasks/"):
            asked += [(name, text) for text in questions_about_labels(parsed(file))]
    assert {name for name, _ in asked} == DOOR | FILLS, asked


def questions_about_labels(tree: ast.AST) -> list[str]:
    """Comparisons with an ignore index, and looks at the dimensions of labels."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if any(re.search(r"(^|\.)ignore_index$", side) for side in sides):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in {"ndim", "dim"} and LABELS.search(ast.unparse(node.value)):
            found.append(ast.unparse(node))
    return found


def test_questions_about_labels_are_found_however_they_are_put():
    asked = "labels.ndim == 1; batch.labels.dim(); y[labels != task.ignore_index]; ignore_index is None; truth.ndim"
    assert len(questions_about_labels(ast.parse(asked))) == 5
    fine = "images.ndim; labels == 3; task.valid(labels); f(ignore_index=255); images.ndim == labels.shape"
    assert questions_about_labels(ast.parse(fine)) == []


def test_no_file_spells_out_an_accelerator():
    for file in SOURCE.rglob("*.py"):
        if file.name in {"seeds.py", "environment.py", "graphs.py"}:
            continue  # generators and names that a machine has; CUDA graphs
        assert not re.search(r"[\"']cuda(:\d)?[\"']", file.read_text()) or file.name == "split.py", file


def test_ranges_are_checked_in_one_place():
    for file in (SOURCE / "attacks").glob("*.py"):
        text = file.read_text()
        assert not re.search(r"def (check_|_check_range|clip)", text), file
        assert file.name == "solver.py" or "def project" not in text, file  # it asks the ball, for ball and box


def test_what_docstrings_refer_to_is_there():
    role, seen, missing = re.compile(r":(?:func|class|data|mod|meth):`~?(gambeson\.[\w.]+)`"), 0, []
    for file in SOURCE.rglob("*.py"):
        for name in role.findall(file.read_text()):
            seen += 1
            try:
                pkgutil.resolve_name(name)
            except (AttributeError, ImportError):
                missing.append((file.relative_to(SOURCE).as_posix(), name))
    assert seen > 100
    assert not missing


def test_files_can_be_read_at_a_sitting():
    for file in SOURCE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 450, file


def test_no_pickle_is_loaded():
    """``torch.load`` alone reads files of others, in one place, and with ``weights_only=True`` spelt out."""
    readers = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"pickle.load", "pickle.loads", "np.load"}:
                raise AssertionError(file)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], file
                readers.append(file.relative_to(SOURCE).as_posix())
    assert readers == ["models/storage.py"]


RENAMED = {
    # what users type
    "--draws": "--votes or --eot-samples",
    "bounded-logit": "df-uap",
    "few-pixel": "one-pixel",
    # attacks
    "Ascent": "ProjectedGradient",
    "BoundedLogit": "DFUAP",
    "FewPixel": "OnePixel",
    "HeldRival": "RivalLogit",
    "NotFinite": "NonFiniteGradientError",
    "Workshop": "CraftingContext",
    "gradient_draws": "eot_samples",
    "screen_steps": "probe_start_steps",
    "truncate_correct": "truncate_margin",
    "truncate_right": "truncate_margin",
    "universal_screened": "universal_probe_starts",
    # victims and rates
    "Cascade": "SuiteRun",
    "CascadeResult": "SuiteResult",
    "DRAWS": "DEFAULT_VOTES",
    "NO_ANSWER": "ABSTAIN",
    "Several": "AveragedVictim",
    "look_at": "inspect_model",
    "run_cascade": "run_suite",
    "shorten": "project_l2_box",
    "soften": "project_l1_box",
    "standard_attacks": "standard_suite",
    "still_right": "what victim/scoring.py decides",
    # defences and training
    "Compared": "EnsembleObjective",
    "Follows": "AfterStep",
    "Pool": "UAPBank",
    "Scene": "TrainContext",
    "Separate": "IndependentEnsemble",
    "Together": "JointEnsemble",
    "Voting": "EnsembleDefense",
    "_descend": "_optimizer_steps",
    "equip": "add_noise",
    "inner_step": "rel_inner_step_size",
    "whole_from": "fully_active_epoch",
    # audits, data and models
    "Evidence": "AuditContext",
    "FunctionScores": "FunctionModel",
    "Gain": "PairedDifference",
    "HttpScores": "HttpModel",
    "Material": "DataInfo",
    "OnnxScores": "OnnxModel",
    "RECIPES": "DATASETS",
    "Stages": "Checkpoints",
    "Subject": "ModelInfo",
    "Towards": "NearestClass",
    "load_subject": "load_model",
    "load_target": "load_model",
}
"""Names that this code had of its own where the field or a paper has a word, which is the one to use."""

PROSE = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
CODE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("src", "tests", "benchmarks", "docs", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)
)


def names_in_code(text: str) -> Iterator[tuple[int, str]]:
    """Every name that a file uses, with its line: those of the code, and those that strings and comments quote."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from ((token.start[0] + line, name) for line, name in quoted(token.string))
            if re.fullmatch(r"""["']\w+["']""", token.string):
                yield token.start[0], token.string[1:-1]


def quoted(text: str) -> Iterator[tuple[int, str]]:
    """Every name between backticks, with its line, counted from 0; an English word of the same spelling is none."""
    for k, line in enumerate(text.splitlines()):
        for code in re.findall(r"`+([^`]+)`+", line):
            yield from ((k, name) for name in re.findall(r"\w+", code))


def renamed_in(text: str, *, code: bool) -> list[str]:
    """What a file calls by a former name, in the order of its lines.

    A name that is an English word too, such as ``Several``, counts where it is a name; any other wherever it stands.
    """
    if not any(name in text for name in RENAMED):
        return []
    names = names_in_code(text) if code else ((k + 1, name) for k, name in quoted(text))
    found = {(line, name) for line, name in names if name in RENAMED}
    for k, line in enumerate(text.splitlines()):
        found |= {(k + 1, name) for name in RENAMED if not is_english(name) and spelt(name, line)}
    return [f"line {line}: {name} is {RENAMED[name]}" for line, name in sorted(found)]


def is_english(name: str) -> bool:
    """Whether a name looks like an English word, perhaps with a capital."""
    return name.isalpha() and name[1:].islower()


def spelt(name: str, line: str) -> bool:
    """Whether a line has a name, not as a part of another one."""
    return name in line and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", line) is not None


@pytest.mark.parametrize(("files", "code"), [(CODE, True), (PROSE, False)], ids=["code", "prose"])
def test_what_was_renamed_has_one_name(files, code):
    assert len(files) > 5
    found = {file: renamed_in((ROOT / file).read_text(), code=code) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


def test_a_former_name_is_found_and_an_english_word_is_not():
    lines = [
        "# Several, not NO_ANSWER",
        "import Several",
        "x.run_cascade()",
        "'See `Pool.perturb`.'",
        "f(x, 'Scene')",
    ]
    assert renamed_in("\n".join(lines), code=True) == [
        "line 1: NO_ANSWER is ABSTAIN",
        "line 2: Several is AveragedVictim",
        "line 3: run_cascade is run_suite",
        "line 4: Pool is UAPBank",
        "line 5: Scene is TrainContext",
    ]
    prose = "Several pass `--draws 3`.\n\nTogether, see `gb.attacks.FewPixel`; a few-pixel attack.\n"
    assert renamed_in(prose, code=False) == [
        "line 1: --draws is --votes or --eot-samples",
        "line 3: FewPixel is OnePixel",
        "line 3: few-pixel is one-pixel",
    ]
