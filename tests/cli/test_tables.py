"""The table in the terminal: complete, and no wider than 80 columns."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

import gambeson.cli
from gambeson.auditing import AuditResult
from gambeson.base import eps_text, say, show_progress, task
from gambeson.cli.app import run
from gambeson.cli.options import plain_console, progress
from gambeson.cli.tables import audit_table

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from report_audits import three, write_audit


def drawn(results: list[AuditResult]) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=80)
    console.print(audit_table(results))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("colour", [False, True])
def test_three_models_fit_into_80_columns(tmp_path: Path, colour: bool) -> None:
    _, results = three(tmp_path, colour=colour)
    lines = drawn(results)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    (trust,) = (line for line in lines if line.strip().startswith("numbers"))
    assert trust.split() == ["numbers", "trusted", "trusted", "not", "trusted"]
    (failed,) = (line for line in lines if "checks failed" in line)
    assert failed.split()[2:] == ["0", "of", "3", "0", "of", "3", "1", "of", "3"]  # what does not apply is not counted
    for result in results:
        worst = min(attack.accuracy.value for attack in result.per_image)
        moved = max(found.error.value for found in result.transfer)
        for name, value in (
            ("per image  ", worst),
            ("error, transfer", moved),
            ("accuracy, clean", result.clean.value),
        ):
            (line,) = (line for line in lines[3:-1] if name in line)
            assert f" {100 * value:.1f} [" in line
        for point in result.universal:
            (k,) = (k for k, line in enumerate(lines) if line.strip().startswith(f"UER, eps {eps_text(point.eps)} "))
            assert f" {100 * point.uer.value:.1f} [" in lines[k]
            rival = max(control.worst.value for control in point.controls)
            assert f" {100 * rival:.1f} [" in lines[k + 1]
    assert "> 1.000" in text


def test_the_size_of_the_noise_is_told(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "a")
    assert f"noise (eps to {max(one.size for one in result.corruption):.3g})" in " ".join(
        " ".join(drawn([result])).split()
    )


def test_parts_that_were_not_measured_are_dashes(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "a").model_copy(update={"transfer": [], "corruption": [], "per_image": []})
    lines = drawn([result])
    for name in ("  per image", "error, transfer", "error, noise"):
        (line,) = (line for line in lines[3:-1] if name in line)
        assert line.split()[-1] == "–"


@pytest.mark.parametrize("label", ["[/b]", "a[blue]b", ":smile:"])
def test_names_are_printed_as_they_are(
    tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"of {label}"
    write_audit(folder, label=label, with_jacobian=False)
    assert run(["report", str(folder), "--gate", "clean>=0.9"]) == 0
    shown = capsys.readouterr()
    assert f"gates of {label}" in shown.err + shown.out
    plain_console().print(audit_table([AuditResult.load(folder)]))
    assert label in capsys.readouterr().out
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with progress(False), task(f"audit {label}", 1) as advance:
            say(f"first {label}")
            advance()
        error = capsys.readouterr().err
        assert f"audit {label}" in error
        assert f"first {label}" in error
    text = io.StringIO()
    with show_progress(Console(file=text, force_terminal=False)):  # of another program
        say(label)
    assert text.getvalue() == f"{label}\n"


def test_every_console_of_a_command_is_made_in_one_place() -> None:
    files = Path(gambeson.cli.__path__[0]).glob("*.py")
    assert [file.name for file in files if re.search(r"\bConsole\(", file.read_text())] == ["options.py"]
