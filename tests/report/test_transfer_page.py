"""The page about a transfer table."""

from __future__ import annotations

from pathlib import Path

from report_audits import transferred
from report_reader import Reader

from gambeson import report


def test_every_rate_stands_where_source_and_target_meet(tmp_path: Path) -> None:
    result = transferred()
    html = report.write_transfer(result, tmp_path / "page.html").read_text()
    seen = Reader(html)
    heads = [k for k, row in enumerate(seen.rows) if row[0] == "Made on"]
    assert len(heads) == len(result.tables)
    for start, table in zip(heads, result.tables, strict=True):
        assert seen.rows[start][1:] == [f"shown to {label}" for label in result.labels]
        clean, *sources, worst = seen.rows[start + 1 : start + 6]
        assert clean[1:] == [str(rate).replace(" %", " %", 1) for rate in result.clean]
        for label, row, rates in zip(result.labels, sources, table.errors, strict=True):
            assert row[0].startswith(label)
            assert row[1:] == ["–" if rate is None else str(rate) for rate in rates]
        assert worst[1:] == [str(rate) for rate in table.worst]


def test_the_answer_is_the_largest_rise_over_the_clean_error(tmp_path: Path) -> None:
    seen = Reader(report.write_transfer(transferred(), tmp_path / "page.html").read_text())
    # (100 * 6 + 111) of 1,000, less 21; on "box" the error is higher, 785, but so is the clean one, 301
    answer = "Images made on “hard” (pgd) make “plain” wrong on 71 of 100; without an attack it is wrong on 2."
    assert answer in seen.text
    assert "gambeson audit runs/a --data digits --surrogate runs/b --eps 8/255" in seen.text
    assert "1,000 test images were perturbed by 2 attacks (eps 8/255)" in seen.text


def test_the_page_is_closed_and_its_colours_follow_the_rates(tmp_path: Path) -> None:
    html = report.write_transfer(transferred(), tmp_path / "page.html").read_text()
    assert all(address.startswith(("data:", "#")) for address in Reader(html).addresses)
    shades = [float(part.split(")")[0]) for part in html.split("rgba(196, 80, 10, ")[1:]]
    assert shades[:3] == [round(0.6 * rate.value, 2) for rate in transferred().tables[0].errors[0] if rate]
    assert html.count('class="squares"') == 1
