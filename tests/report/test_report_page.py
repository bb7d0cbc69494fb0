"""What stands in the page: every number of the results, once more and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from report_audits import COLOUR, three, write_audit
from report_reader import Reader, Written

from gambeson import UserError, report
from gambeson.auditing import Check
from gambeson.auditing.display import worst_of
from gambeson.auditing.results import NOT_RUN
from gambeson.auditing.verdict import judge
from gambeson.base import write_yaml
from gambeson.evaluation import Rate
from gambeson.evaluation.rates import strongest_control
from gambeson.studies.audits import of_audit
from gambeson.studies.measures import Value


def show(value: float) -> str:
    return f"{100 * value:.1f} %"


def ends(rate: Rate) -> str:
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def figure(html: str, name: str = "chart") -> dict[str, object]:
    found = re.search(rf'<script type="application/json" data-chart="{name}">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_every_rate_stands_in_its_cell(written: Written) -> None:
    start = next(k for k, row in enumerate(written.seen.rows) if row[0] == "Pattern")
    head = written.seen.rows[start]
    assert head[1:] == [f"eps {point.eps:.4g}" for point in written.results[0].universal]
    for k, result in enumerate(written.results):
        title, crafted, random, board = written.seen.rows[start + 1 + 4 * k : start + 5 + 4 * k]
        assert title == [result.subject.label]
        assert [crafted[0][:7], random[0][:11], board[0][:10]] == ["crafted", "random sign", "chessboard"]
        for column, point in enumerate(result.universal, start=1):
            assert crafted[column] == f"{show(point.uer.value)} {ends(point.uer)}"
            draws, fixed = point.controls
            assert random[column] == f"{show(draws.mean)} worst {show(draws.worst.value)} {ends(draws.worst)}"
            assert board[column] == f"{show(fixed.worst.value)} {ends(fixed.worst)}"


def test_glance_has_clean_middle_worst_per_image_and_eps_uni(written: Written) -> None:
    for row, result in zip(written.seen.rows[1:4], written.results, strict=True):
        pgd, worst = result.per_image
        found = result.eps_uni
        assert worst.accuracy.value < pgd.accuracy.value
        assert row[0] == f"{result.subject.label} lenet"
        assert row[1] == f"{show(result.clean.value)} {ends(result.clean)}"
        assert row[2] == f"{show(result.middle.uer.value)} {ends(result.middle.uer)}"
        where = f"the attack suite, eps {worst.eps:.4g} on 200 images"
        lowest = worst.accuracy.among(3)  # chosen between the two and what was transferred
        assert row[3] == f"{show(lowest.value)} {ends(lowest)} {where}"
        assert row[4].startswith(f"> {found.value:.3g}" if found.censored else f"≤ {found.value:.3g}")


def hundred(value: float) -> str:
    return f"{100 * value:.0f}"


def test_headline_names_the_weakest_and_the_strongest(written: Written) -> None:
    weakest, strongest = written.results[0].middle.uer, written.results[1].middle.uer
    clean = hundred(written.results[0].clean.complement.value)
    text = f"At eps 0.15 one pattern makes “standard” wrong on {hundred(weakest.value)} of 100 test images; "
    assert f"{text}without it, on {clean}." in written.seen.text
    best = "“shared-adversarial” stands best of those whose measurement is trusted: the pattern made for it makes it "
    assert f"{best}wrong on {hundred(strongest.value)}." in written.seen.text
    for result in written.results:
        assert result.verdict.summary in written.seen.text


@pytest.mark.parametrize(
    ("wrong", "clean", "failed", "words"),
    [
        (683, 987, False, ["✗ broken", "✓ measurement checked", "wrong on 68 of 100 images; without it, on 1."]),
        (683, 987, True, ["✗ broken", "! not trusted", "wrong on at least 68 of 100 images"]),
        (
            117,
            979,
            False,
            ["✓ withstands eps 0.15", "✓ measurement checked", "wrong on 12 of 100 images; without it, on 2."],
        ),
        (117, 979, True, ["? undecided", "! not trusted", "wrong on at least 12 of 100 images"]),
        (505, 987, False, ["≈ on the edge", "✓ measurement checked"]),
        (900, 400, False, ["✗ wrong without a pattern", "on 90 of 100 images; without it, on 60."]),
    ],
)
def test_the_answer_is_one_sentence_two_badges_and_100_squares(
    tmp_path: Path, wrong: int, clean: int, failed: bool, words: list[str]
) -> None:
    write_audit(tmp_path / "a", wrong=(100, 110, wrong, 905, 910), clean=clean, failed=failed)
    html = report.write([tmp_path / "a"], tmp_path / "page.html").read_text()
    card = html.split("<article")[1].split("</article>")[0]
    said = Reader(card).text
    for word in words:
        assert word in said.replace(" , ", ", ").replace(" .", ".").replace(" ;", ";"), said
    assert said.count("trusted") + said.count("measurement checked") >= 1
    assert card.count("<rect") == 100
    anyway = round((1000 - clean) / 10)
    drawn = card.split("</svg>")[0]
    assert [drawn.count('class="clean"'), drawn.count('class="flipped"')] == [anyway, round(wrong / 10) - anyway]


def words_of(page: Path) -> str:
    """The page without the marks that keep a line from breaking inside a word of a command."""
    return re.sub("</?span>", "", page.read_text())


def test_next_steps_are_commands_for_this_model(tmp_path: Path) -> None:
    write_audit(tmp_path / "a")
    page = report.write([tmp_path / "a"], tmp_path / "page.html")
    train = "gambeson train --data digits --model lenet --defense shared-adversarial --eps 0.15 --init runs/model"
    assert f"<code>{train} --out runs/model-hardened\ngambeson audit runs/model-hardened --eps 0.15</code>" in words_of(
        page
    )
    write_audit(tmp_path / "b", wrong=(21, 30, 45, 81, 403), failed=True)
    doubted = words_of(report.write([tmp_path / "b"], tmp_path / "page.html"))
    assert "<code>gambeson attack --model runs/model --data digits --attack square --eps 0.15" in doubted
    run = tmp_path / "own run"
    run.mkdir()
    write_yaml(run / "run.yaml", {"kind": "train", "data": "mask-folder:/data/my roads?size=64"})
    quoted = "&#39;mask-folder:/data/my roads?size=64&#39;"
    for given, name in (({}, quoted), ({"data": "voc:/data/voc"}, "voc:/data/voc")):
        write_yaml(tmp_path / "b" / "run.yaml", {"kind": "audit", "model": str(run), **given})
        assert f"--data {name} --attack square" in words_of(report.write([tmp_path / "b"], tmp_path / "page.html"))
    found = write_audit(tmp_path / "own")
    found.model_copy(update={"subject": found.subject.model_copy(update={"epochs": None})}).save(tmp_path / "own")
    for name, told in (
        ("torchvision:resnet18@/w/my net.pth", "torchvision:resnet18 {} --init &#39;/w/my net.pth&#39;"),
        ("nets.py:net@net.PT", "nets.py:net {} --init net.PT"),
        ("torchvision:resnet18@DEFAULT", "torchvision:resnet18@DEFAULT {}"),
    ):
        write_yaml(tmp_path / "own" / "run.yaml", {"kind": "audit", "model": name, "data": "digits"})
        page = words_of(report.write([tmp_path / "own"], tmp_path / "page.html"))
        told, _, weights = told.partition(" {}")
        assert f"--model {told} --defense shared-adversarial --eps 0.15{weights} --out" in page
    held = write_audit(tmp_path / "c", wrong=(21, 30, 45, 81, 403))
    hours = " (it may take hours; with --plan it says how many):"
    for most, more in ((500, " and on more images"), (5000, ""), (None, "")):
        words = f"attack longer{more}{hours}"
        held.model_copy(update={"settings": held.settings | {"test_images": most}}).save(tmp_path / "c")
        assert words in words_of(report.write([tmp_path / "c"], tmp_path / "page.html"))
    assert "test images are few" not in words_of(tmp_path / "page.html")
    wide = held.universal[2].model_copy(update={"uer": Rate.of(9, 18)})
    points = [*held.universal[:2], wide, *held.universal[3:]]
    held.model_copy(update={"universal": points}).save(tmp_path / "c")
    assert "test images are few: more of them decide best." in words_of(
        report.write([tmp_path / "c"], tmp_path / "page.html")
    )
    (tmp_path / "a" / "run.yaml").unlink()
    python = words_of(report.write([tmp_path / "a"], tmp_path / "page.html"))
    assert "gb.train(model, data, gb.defenses.create(&#34;shared-adversarial&#34;, eps=0.15)" in python


def test_next_steps_of_a_hardening_name_its_models(tmp_path: Path) -> None:
    write_yaml(tmp_path / "run.yaml", {"kind": "harden", "model": "zoo:digits/lenet5/standard", "data": None})
    for name, weights in (("original", "zoo:digits/lenet5/standard"), ("hardened", f"{tmp_path}/model.safetensors")):
        found = write_audit(tmp_path / name)
        found.model_copy(update={"subject": found.subject.model_copy(update={"epochs": None})}).save(tmp_path / name)
        (tmp_path / name / "run.yaml").unlink()
        page = words_of(report.write([tmp_path / name], tmp_path / "page.html"))
        assert (
            f"train --data digits --model lenet --defense shared-adversarial --eps 0.15 --init {weights} --out" in page
        )


def test_a_low_curve_fills_its_axis(tmp_path: Path) -> None:
    for wrong, top in (((3, 4, 5, 6, 7), 5), ((121, 150, 160, 170, 178), 50), ((121, 397, 683, 811, 903), 100)):
        write_audit(tmp_path / f"{top}", wrong=wrong, clean=999 if top == 5 else 980)
        axis = figure(report.write([tmp_path / f"{top}"], tmp_path / "page.html").read_text())["layout"]["yaxis"]
        assert axis["range"] == [0, pytest.approx(1.02 * top)]
        assert axis["tickvals"][-1] == top


def test_what_the_audit_left_out_is_said(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "a")
    result.model_copy(update={"notes": ["A black box: attacks that need gradients were left out."]}).save(
        tmp_path / "a"
    )
    text = Reader(report.write([tmp_path / "a"], tmp_path / "page.html").read_text()).text
    assert "Limits of this audit 1 A black box: attacks that need gradients were left out." in text


def test_an_untrusted_model_is_never_called_best(tmp_path: Path) -> None:
    folders = [tmp_path / "weak", tmp_path / "fake"]
    write_audit(folders[0], label="weak")
    write_audit(folders[1], label="fake", wrong=(1, 2, 3, 4, 5), clean=999, failed=True)
    html = report.write(folders, tmp_path / "page.html").read_text()
    assert "“fake” stands best" not in html
    assert "It is the only one whose measurement is trusted." in Reader(html).text
    best = [row for row in re.findall(r"<tr.*?</tr>", html, re.S) if 'class="best"' in row]
    assert best
    assert not any("fake" in row or "0.1 %" in row for row in best)


def test_overlapping_intervals_are_said_to_be_a_tie(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    write_audit(folders[0], label="a")
    write_audit(folders[1], label="b", wrong=(120, 396, 680, 810, 902))
    html = report.write(folders, tmp_path / "page.html").read_text()
    assert "Their 95 % intervals overlap" in html.replace("\N{NO-BREAK SPACE}", " ")
    assert html.count('class="best">') == 2 * 9  # of the glance and of the curve


def test_checks_and_reasons_are_written_out(written: Written, tmp_path: Path) -> None:
    failed = written.results[2]
    assert failed.verdict.reasons
    for reason in failed.verdict.reasons:
        assert f"Why the measurement is not trusted: {reason}" in written.seen.text
    found = write_audit(tmp_path / "a", failed=True)
    passed = [check for check in found.checks if check.passed is not False]
    found.model_copy(update={"checks": passed}).save(tmp_path / "a")
    text = Reader(report.write([tmp_path / "a"], tmp_path / "page.html").read_text()).text
    assert f"What was not checked {found.verdict.reasons[0]}" in text
    assert "Why the measurement" not in text
    states = {True: "✓ passed", False: "✗ failed", None: "– does not apply"}
    for result in written.results:
        for check in result.checks:
            assert f"{states[check.passed]} {check.name} : {check.detail}" in written.seen.text
            assert {check.condition, check.explanation, check.remedy} - {""} <= words(written.seen.text, check)
    assert "jacobian 2 passed, 1 failed, 1 does not apply" in written.seen.text
    assert "standard 3 passed, 1 does not apply" in written.seen.text
    less = write_audit(tmp_path)
    checks = [
        check.model_copy(update={"passed": None, "detail": NOT_RUN[k % 2]}) for k, check in enumerate(less.checks)
    ]
    less.model_copy(update={"checks": [*checks[:2], *less.checks[2:]]}).save(tmp_path)
    page = report.write([tmp_path], tmp_path / "page.html").read_text()
    assert ", 2 not run" in page
    assert page.count("not run</span> <span>") == 2
    bad = written.html.split('<section id="checks">')[1].split("</section>")[0]
    assert bad.count("<details open>") == 1  # what failed stands open, the rest on demand
    assert bad.index("no vanishing gradients") < bad.index("no noise-off gap")


def words(text: str, check: Check) -> set[str]:
    return {part for part in (check.condition, check.explanation, check.remedy) if part and part in text}


def test_settings_cost_and_versions_are_there(written: Written) -> None:
    text = written.seen.text
    for folder, result in zip(written.folders, written.results, strict=True):
        assert f"gambeson audit --config {folder.name}/run.yaml --out NEW" in text
        assert result.subject.fingerprint in text
        for point in result.universal:
            assert f"fooling rate {point.fooling}" in text
    for part in (
        "term.sharedness 64",
        "258,000 forward, 248,000 backward",
        "13,840 forward, 9,696 backward",
        "pgd from surrogate (lenet5), eps 0.15 7,000 forward, 6,001 backward",
        "square.queries 5000",
        "1 min 16 s",
        "torch 2.11.0",
        "4,000 images",
        "431,080",
    ):
        assert part in text


def test_chart_holds_the_numbers_and_starts_at_the_clean_error(written: Written) -> None:
    plot = figure(written.html)
    go.Figure(plot)  # plotly refuses what it does not know
    for k, result in enumerate(written.results):
        own = [trace for trace in plot["data"] if trace["legendgroup"] == str(k)]
        rates = [result.clean.complement, *(point.uer for point in result.universal)]
        line, band = (next(t for t in own if t["meta"] == kind) for kind in ("line", "band"))
        assert line["x"] == [0, *(point.eps for point in result.universal)]
        assert line["y"] == [100 * rate.value for rate in rates]
        assert band["y"] == [100 * r.high for r in rates] + [100 * r.low for r in reversed(rates)]
        assert all(f"UER {rate}<br>n = 1,000" in text for rate, text in zip(rates, line["text"], strict=True))
        controls = [t for t in own if t["meta"] == "control"]
        for j, trace in enumerate(controls):
            assert trace["y"] == [100 * rates[0].value, *(100 * p.controls[j].mean for p in result.universal)]


def test_colour_data_shows_eps_in_255ths_beside_decimals(tmp_path: Path) -> None:
    folders, _ = three(tmp_path, colour=True)
    html = report.write(folders, tmp_path / "page.html").read_text()
    seen = Reader(html)
    head = next(row for row in seen.rows if row[0] == "Pattern")
    assert head[1:] == [f"eps {round(255 * eps)}/255 {eps:.4g}" for eps in COLOUR]
    assert figure(html)["layout"]["xaxis"]["ticktext"] == ["0", "4", "8", "12", "16", "26"]
    assert "eps 8/255 (0.03137)" in figure(html)["data"][3]["text"][2]


def test_one_audit_is_enough_and_its_summary_is_the_headline(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "only", censored=True)
    (tmp_path / "only" / "timing.json").unlink()
    (tmp_path / "only" / "run.yaml").unlink()
    html = report.write([tmp_path / "only"], tmp_path / "page.html").read_text()
    seen = Reader(html)
    assert seen.text.count(result.verdict.summary) == 1
    assert "> 1 no success up to there" in seen.text
    assert 'class="best"' not in html
    assert "left no run.yaml" in seen.text


def test_equal_labels_are_told_apart_by_folder(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_audit(tmp_path / name)
    html = report.write([tmp_path / "first", tmp_path / "second"], tmp_path / "page.html").read_text()
    assert {"standard (first)", "standard (second)"} <= {row[0] for row in Reader(html).rows}


def test_title_is_taken_and_equal_folders_give_equal_bytes(written: Written, tmp_path: Path) -> None:
    again = report.write(written.folders, tmp_path / "again.html")
    assert again.read_bytes() == written.path.read_bytes()
    named = report.write(written.folders[:1], tmp_path / "named.html", title="Digits & <more>").read_text()
    assert "<h1>Digits &amp; &lt;more&gt;</h1>" in named


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"classes": [str(k) for k in range(9)]},
            r"digits \(9 classes.*expected the same data.*report each",
        ),
        ({"colour": True}, r"3 x 32 x 32.*but .* is on digits \(10 classes, 1 x 28 x 28"),
        ({"norm": "2"}, r"in the 2-norm, but .* in the inf-norm: expected one norm"),
    ],
)
def test_audits_that_cannot_stand_side_by_side_are_refused(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    write_audit(tmp_path / "one")
    write_audit(tmp_path / "two", **change)
    with pytest.raises(UserError, match=words):
        report.write([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_results_of_an_earlier_form_are_refused(tmp_path: Path) -> None:
    write_audit(tmp_path / "old")
    path = tmp_path / "old" / "result.json"
    path.write_text(path.read_text().replace("gambeson/audit-4", "gambeson/audit-1"))
    with pytest.raises(UserError, match=r"is of gambeson/audit-1, expected gambeson/audit-4: run the audit again$"):
        report.write([tmp_path / "old"], tmp_path / "page.html")
    path.write_text("[]")
    with pytest.raises(UserError, match="is of another kind, expected gambeson/audit-4"):
        report.write([tmp_path / "old"], tmp_path / "page.html")


def test_missing_files_and_empty_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audit was given: expected one or more folders"):
        report.write([], tmp_path / "page.html")
    with pytest.raises(UserError, match=r"result\.json does not exist: name a file or folder"):
        report.write([tmp_path / "nothing"], tmp_path / "page.html")
    write_audit(tmp_path / "cut")
    (tmp_path / "cut" / "uap-0.15.safetensors").unlink()
    with pytest.raises(UserError, match=r"uap-0\.15\.safetensors does not exist"):
        report.write([tmp_path / "cut"], tmp_path / "page.html")


def test_one_rate_has_one_interval_in_table_verdict_and_notebook(tmp_path: Path) -> None:
    """A black box without Square: what is known of single images comes from the surrogate alone."""
    result = write_audit(tmp_path / "box")
    moved = next(one for one in result.transfer if not one.universal)
    for per_image in ([], result.per_image):
        changed = result.model_copy(update={"per_image": per_image})
        worst = worst_of(changed)
        assert worst is not None
        among = len(per_image) + 1
        expected = min([moved.error.complement, *(one.accuracy for one in per_image)], key=lambda rate: rate.value)
        assert worst.accuracy.value == expected.value
        assert worst.accuracy.candidates == among
        said = judge(
            changed.clean, changed.universal, changed.eps_uni, [], per_image=per_image, transfer=changed.transfer
        ).summary
        fewer = "" if worst.accuracy.n == changed.middle.uer.n else f" of {worst.accuracy.n} of these images"
        assert f"{worst.accuracy}{fewer} stay right" in said
        control = strongest_control(changed.middle.controls)
        assert control is not None
        rival = control.worst
        assert rival.candidates == sum(one.worst.candidates for one in changed.middle.controls) > 1
        assert of_audit(changed).metrics["attacked"] == Value.of(worst.accuracy)  # as a study has it
        assert f"{rival} under the strongest control" in said
        assert str(worst.accuracy) in repr(changed)
        assert str(rival) in repr(changed)
        changed.model_copy(update={"verdict": changed.verdict}).save(tmp_path / "box")
        cells = Reader(report.write([tmp_path / "box"], tmp_path / "page.html").read_text()).rows
        assert any(f"{show(worst.accuracy.value)} {ends(worst.accuracy)}" in cell for row in cells for cell in row)
        assert not any("not measured" in cell for row in cells for cell in row)


def test_a_single_eps_is_a_point_and_no_line_to_zero(tmp_path: Path) -> None:
    result = write_audit(tmp_path / "one")
    single = result.model_copy(update={"universal": [result.middle]})
    single.save(tmp_path / "one")
    drawn = figure(report.write([tmp_path / "one"], tmp_path / "page.html").read_text())
    assert {trace["mode"] for trace in drawn["data"]} == {"markers"}
    (line,) = [trace for trace in drawn["data"] if trace["meta"] == "line"]
    assert line["y"][1] + line["error_y"]["array"][1] == pytest.approx(100 * result.middle.uer.high)
    assert line["y"][1] - line["error_y"]["arrayminus"][1] == pytest.approx(100 * result.middle.uer.low)
