"""The evidence behind a verdict: other attacks, and the model's Jacobian."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from report_audits import three, write_audit
from report_reader import Reader, Written
from test_report_page import ends, figure, show
from test_report_safety import pixels

from gambeson import UserError, report
from gambeson.base import load_tensors, save_tensors
from gambeson.report.pictures import painted, signed

HEADS = ("Attack", "Noise", "Accuracy", "Measure", "Metric", "Pattern", "Directions")


def table(seen: Reader, first: str) -> list[list[str]]:
    """The rows of the table whose head begins with this word, without it."""
    start = next(k for k, row in enumerate(seen.rows) if row[0] == first)
    width = len(seen.rows[start])
    rows = []
    for row in seen.rows[start + 1 :]:
        if len(row) not in (1, width) or row[0] in HEADS:
            break
        rows.append(row)
    return rows


def test_every_other_attack_stands_in_a_table(written: Written) -> None:
    rows = {row[0]: row[1:] for row in table(written.seen, "Attack")}
    for k, result in enumerate(written.results):
        pgd, worst = result.per_image
        assert rows["no attack clean images"][k] == f"{show(result.clean.value)} {ends(result.clean)}"
        assert rows["pgd eps 0.15"][k] == f"{show(pgd.accuracy.value)} {ends(pgd.accuracy)}"
        assert rows["the attack suite eps 0.15"][k].endswith(f"{ends(worst.accuracy)} on 200 images")
        for turn in worst.rounds:
            cell = f"{show(turn.accuracy.value)} broke {turn.broken} of {turn.tried}"
            assert rows[f"after {turn.attack}"][k] == cell
        for moved in result.transfer:
            assert f"{show(moved.error.value)} {ends(moved.error)}" in written.seen.text
    noise = {row[0]: row[1:] for row in table(written.seen, "Noise")}
    for k, result in enumerate(written.results):
        assert noise["gaussian standard deviation 0.15"][k] == (
            f"{show(result.corruption[0].error.value)} {ends(result.corruption[0].error)}"
        )
        assert len(noise) == 1 + len(result.corruption)
    assert "random models" not in written.seen.text


def test_a_random_model_shows_its_draws_beside_others(tmp_path: Path) -> None:
    write_audit(tmp_path / "a", label="noisy", random=True)
    write_audit(tmp_path / "b", label="plain")
    page = report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    rows = {row[0]: row[1:] for row in table(Reader(page.read_text()), "Accuracy")}
    assert rows["mean of all passes ± one standard deviation"] == ["92.1 % ± 0.5 20 passes", "not random"]
    assert rows["lowest and highest pass"][0] == "91.1 % to 93.0 %"
    assert rows["randomness turned off"][0].startswith("94.1 % [")


def test_the_jacobian_stands_in_tables(written: Written) -> None:
    rows = {row[0]: row[1:] for row in table(written.seen, "Measure")}
    bounds = [row for row in written.seen.rows if row[0].startswith("eps 0.") and len(row) == 7]
    assert len(bounds) == 15
    for k, result in enumerate(written.results):
        jacobian = result.jacobian
        assert jacobian
        norms, table_ = jacobian.norms, jacobian.bounds.table
        assert rows["Jacobian, spectral norm logits per pixel unit"][k].startswith(f"{norms.spectral.median:.3g} ")
        assert rows["loss gradient exactly zero share of images"][k].startswith(show(jacobian.gradients.loss_zero))
        assert any(
            name.startswith("sharing factor") and cells[k].startswith(f"{jacobian.sharing:.3f}")
            for name, cells in rows.items()
        )
        for row, found in zip(bounds[5 * k : 5 * k + 5], table_.rows, strict=True):
            assert row[1:] == [
                show(value)
                for value in (
                    found.measured_error,
                    found.linear_error,
                    found.counted_error,
                    found.effect_error,
                    found.bound_error,
                    found.attained,
                )
            ]
    metrics = {row[0].split()[0]: row[1:] for row in table(written.seen, "Metric")}
    assert set(metrics) == {"cos_F", "ratio_s", "rank1", "cka"}
    first = written.results[0].jacobian.pairs[0]
    assert metrics["cos_F"][0].startswith(f"{first.within.median:.2f} / {first.between.median:.2f} ")
    assert "norm inf, eps 0.15 at least 1 / 4 / 16 / 64 directions" in written.seen.text
    assert "81 / 43 / 11 / 0 % n = 35" in written.seen.text
    assert "subspace of a guide : no guide was given" in written.seen.text


def test_jacobian_charts_hold_the_numbers(written: Written) -> None:
    lines = figure(written.html, "along")
    go.Figure(lines)
    assert [trace["name"] for trace in lines["data"][::2]] == [r.subject.label for r in written.results]
    for k, result in enumerate(written.results):
        surface = result.jacobian.surface
        middle = len(surface.steps) // 2
        assert lines["data"][2 * k]["y"] == [row[middle] for row in surface.loss]
        assert lines["data"][2 * k + 1]["y"] == surface.loss[middle]
        plot = figure(written.html, f"surface-{k}")
        go.Figure(plot)
        np.testing.assert_allclose(np.array(plot["data"][0]["z"]).T, surface.loss)
        np.testing.assert_allclose(np.array(plot["data"][1]["z"]).T, surface.wrong)
        bars = figure(written.html, f"pairs-{k}")
        go.Figure(bars)
        pairs = result.jacobian.pairs[0]
        for trace, counts in zip(bars["data"], (pairs.between_counts, pairs.within_counts), strict=True):
            assert trace["text"] == [str(count) for count in counts]
            assert sum(trace["y"]) == pytest.approx(100)
    ridge = lines["data"][4]["y"]
    assert max(ridge) > 1.5 * ridge[-1]  # the third model's ridge is there to be seen


def test_single_surfaces_and_the_direction_are_pictures(written: Written) -> None:
    for folder, result in zip(written.folders, written.results, strict=True):
        label = result.subject.label
        direction = load_tensors(folder / "jacobian.safetensors")[0]["direction"]
        shown = pixels(written.seen.pictures[f"Top direction of the stacked Jacobian of {label}"])
        np.testing.assert_array_equal(shown, signed(direction, float(direction.abs().max()))[0].numpy())
        one = pixels(written.seen.pictures[f"Loss around test image 1 for {label}"])
        lightness = one.sum(2)
        assert lightness.shape == (17, 17)
        grid = torch.tensor(result.jacobian.surface.singles[0]).T.flip(0)
        assert lightness.argmin() == int(grid.argmax())
        assert lightness.argmax() == int(grid.argmin())


def test_colours_of_a_ramp() -> None:
    black_to_white = painted(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), ("#000000", "#808080", "#ffffff"))
    assert black_to_white.shape == (3, 2, 2)
    assert black_to_white[0].flatten().tolist() == [0, 64, 128, 255]
    assert painted(torch.ones(2, 2), ("#102030", "#ffffff"))[:, 0, 0].tolist() == [16, 32, 48]


def test_audits_without_jacobian_or_other_attacks_leave_the_sections_out(tmp_path: Path) -> None:
    write_audit(tmp_path / "a", with_jacobian=False)
    html = report.write([tmp_path / "a"], tmp_path / "page.html").read_text()
    assert 'id="jacobian"' not in html
    assert "#jacobian" not in html
    assert re.findall('data-chart="(.*?)"', html) == ["chart", "edited"]


def test_the_axis_of_the_loss_shows_every_slope(tmp_path: Path) -> None:
    html = report.write([write_audit(tmp_path / "a") and tmp_path / "a"], tmp_path / "page.html").read_text()
    plot = figure(html, "along")
    losses = [loss for trace in plot["data"] for loss in trace["y"]]
    wanted = "log" if max(losses) > 20 * min(losses) else "linear"
    assert plot["layout"]["yaxis"]["type"] == wanted


def test_a_direction_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_audit(tmp_path / "a")
    save_tensors(tmp_path / "a" / "jacobian.safetensors", {"direction": torch.ones(1, 5, 5)}, {})
    with pytest.raises(UserError, match=r"a direction of shape \(1, 5, 5\): expected \(1, 28, 28\)"):
        report.write([tmp_path / "a"], tmp_path / "page.html")


def test_colour_pages_write_steps_in_255ths(tmp_path: Path) -> None:
    folders, _ = three(tmp_path, colour=True)
    html = report.write(folders, tmp_path / "page.html").read_text()
    assert figure(html, "surface-1")["layout"]["xaxis"]["ticktext"] == ["-12/255", "0", "12/255"]
