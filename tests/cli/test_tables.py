"""The table in the terminal: complete, and no wider than 80 columns."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gambeson.auditing import AuditResult
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
            (k,) = (k for k, line in enumerate(lines) if line.strip().startswith(f"UER, eps {point.eps:.3g} "))
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
