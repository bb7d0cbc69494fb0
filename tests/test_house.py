"""The house's own rules: imports run downwards, no device is spelt out, checks exist once."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "gambeson"
FLOORS = [
    {"base"},
    {"threat", "data", "models"},
    {"victim"},
    {"attacks", "analysis"},
    {"defenses"},
    {"training", "evaluation"},
    {"auditing"},
    {"studies"},
    {"report"},
    {"cli"},
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
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


def test_no_file_spells_out_an_accelerator():
    for file in SOURCE.rglob("*.py"):
        if file.name in {"seeds.py", "environment.py"}:
            continue  # which generators and names a machine has
        assert not re.search(r"[\"']cuda(:\d)?[\"']", file.read_text()) or file.name == "split.py", file


def test_ranges_are_checked_in_one_place():
    for file in (SOURCE / "attacks").glob("*.py"):
        text = file.read_text()
        assert not re.search(r"def (check_|_check_range|clip)", text), file
        assert file.name == "solver.py" or "def project" not in text, file  # it asks the ball, for ball and box


def test_files_can_be_read_at_a_sitting():
    for file in SOURCE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 450, file


def test_no_pickle_is_loaded():
    for file in SOURCE.rglob("*.py"):
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not {"torch.load", "pickle.load", "pickle.loads", "np.load"} & set(calls), file
