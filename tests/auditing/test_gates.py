"""Gates: what they read, when they hold, and that what an audit lacks never passes in silence."""

import sys
from pathlib import Path

import pytest

from gambeson import UserError
from gambeson.auditing.gates import METRICS, describe, judge_gates, parse_gates, refuse_unmeasured
from gambeson.evaluation.rates import EpsAdv

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # synthetic audits with numbers that all differ

from report_audits import write_audit


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return write_audit(tmp_path_factory.mktemp("gates"), failed=True, with_jacobian=False)


NUMBERS = {
    "clean": 0.987,
    "uer": 0.683,
    "uer@0.05": 0.121,
    "uer@0.2": 0.811,
    "fooling": 0.69,
    "fooling@0.1": 0.404,
    "per_image": 0.0,
    "per_image:pgd": 0.017,
    "per-image:pgd": 0.017,
    "PER_IMAGE:pgd": 0.017,
    "transfer": 0.41,
    "corruption": 0.032,
    "eps_uni": 0.1207,
}


@pytest.mark.parametrize(("name", "value"), NUMBERS.items())
def test_a_gate_compares_the_number_of_its_name(result, name, value):
    for gate, held in {
        f"{name}<={value + 0.0004}": True,
        f"{name}<={value - 0.0004 if value else 0}": not value,
        f"{name}>={max(0, value - 0.0004)}": True,
        f"{name}>={value + 0.0004}": False,
        f"{name} > {value!r}": False,
        f"{name} >= {value!r}": True,
        f"{name} < {value!r}": False,
        f"{name} <= {value!r}": True,
    }.items():
        found = result.gate(gate).gates[0]
        assert (found.held, found.gate) == (held, gate)
        assert found.value == pytest.approx(value)
        assert found.reason == ""


def test_an_end_of_the_interval_is_compared_where_it_is_named(result):
    rate = result.middle.uer
    assert rate.low < 0.66 < rate.value < 0.70 < rate.high
    report = result.gate("uer<=0.70, uer.high<=0.70, uer.low>=0.66, uer@0.15.high<=72 %, uer@0.15.low>=0.65")
    assert [gate.held for gate in report.gates] == [True, False, False, True, True]
    assert report.gates[1].required == "high <= 0.7"
    assert (report.gates[1].low, report.gates[1].high) == (rate.low, rate.high)
    assert result.gate("per_image:pgd.high<=0.05").held


def test_words_hold_or_do_not(result, tmp_path):
    report = result.gate("trusted, check:deterministic, check:no vanishing gradients, check:no-noise-off-gap, check:x")
    assert [gate.held for gate in report.gates] == [False, True, False, False, False]
    reasons = [gate.reason for gate in report.gates]
    assert reasons[0] == "failed: no vanishing gradients"
    assert reasons[2].startswith("it failed: 150 of 200")
    assert reasons[3] == "it does not apply: the model is not random"  # evidence of nothing does not pass
    assert reasons[4].startswith("unknown check 'x'")
    assert write_audit(tmp_path, with_jacobian=False).gate("trusted, check:no vanishing gradients").held


def test_what_an_audit_lacks_is_missed_with_the_reason(result):
    for gate, reason in {
        "eps_adv>=0": "the audit has no eps_adv",
        "uer@0.25>=0": "the audit has no eps 0.25: its curve is at 0.05, 0.1, 0.15, 0.2, 0.3",
        "mean_iou>=0": "labels are no maps",
        "clean_iou>=0": "labels are no maps",
        "per_image:square>=0": "no per-image attack square: it has pgd, standard",
        "eps_uni.high>=0": "its interval has no such end",
    }.items():
        (found,) = result.gate(gate).gates
        assert not found.held, gate
        assert reason in found.reason
        assert reason in describe(found)
    nothing = {"transfer": [], "corruption": [], "per_image": []}
    bare = result.model_copy(update=nothing)
    assert not any(bare.gate(f"{name}>=0, {name}<=1").held for name in nothing)
    assert [gate.value for gate in bare.gate("transfer<=1, uer<=1").gates] == [None, pytest.approx(0.683)]


def test_a_smallest_eps_that_was_not_found_is_never_called_small(tmp_path):
    result = write_audit(tmp_path, censored=True, with_jacobian=False)  # no success up to 1
    report = result.gate("eps_uni>=0.3, eps_uni>0.99, eps_uni<=1, eps_uni<2, eps_uni>=1.5")
    assert [gate.held for gate in report.gates] == [True, True, False, False, False]
    assert "more than 1, by an unknown amount" in report.gates[3].reason
    assert "the search ended at 1, and it may be more" in report.gates[4].reason
    found = result.eps_uni.model_dump() | {"value": 8 / 255, "censored": False, "low": 0.02, "high": 0.04, "images": 9}
    each = result.model_copy(update={"eps_adv": EpsAdv(**found)})
    assert [gate.held for gate in each.gate("eps_adv>=8/255, eps_adv.low>=0.021, eps_adv.high<0.05").gates] == [
        *(True, False, True),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("uer<=0.2,", "is empty"),
        ("uer<=0.2,,trusted", "is empty"),
        ("uer", "expected a comparison with a number, such as uer<=0.2"),
        ("uer<=", "expected METRIC<=NUMBER"),
        ("uer=0.2", "expected METRIC<=NUMBER"),
        ("uer==0.2", "expected METRIC<=NUMBER"),
        ("0.2>=uer", "expected METRIC<=NUMBER"),
        ("uer<=0.2<=0.3", "expected METRIC<=NUMBER"),
        ("uer.mid<=0.2", "expected METRIC<=NUMBER"),
        ("uer@x<=0.2", "expected METRIC<=NUMBER"),
        ("robust>=0.2", "unknown metric 'robust': choose among clean, uer[@EPS], "),
        ("uer<=20", "20 is no number from 0 to 1; 20 % is 0.2"),
        ("uer<=120 %", "120 % is no number from 0 to 1"),
        ("uer<=-0.1", "-0.1 is no number from 0 to 1"),
        ("uer<=nan", "nan is no number from 0 to 1"),
        ("eps_uni>=inf", "inf is no number from 0"),
        ("uer<=many", "'many' is not a number"),
        ("uer<=8/0", "divides by zero"),
        ("uer@8/0<=0.1", "divides by zero"),
        ("eps_uni>=20 %", "an eps has no per cent"),
        ("clean@0.1>=0.2", "clean has no @EPS or :NAME of this kind"),
        ("uer:pgd<=0.1", "uer has no @EPS or :NAME of this kind"),
        ("trusted>=1", "trusted holds or does not"),
        ("trusted.low", "trusted holds or does not"),
        ("check", "expected check:NAME"),
    ],
)
def test_a_malformed_gate_is_one_sentence(text, words):
    with pytest.raises(UserError) as error:
        parse_gates(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_of_two_eps_that_lie_close_the_nearest_is_meant(result):
    near = [point.model_copy(update={"eps": eps}) for point, eps in zip(result.universal, (0.1, 0.1004), strict=False)]
    close = result.model_copy(update={"universal": near})
    for text, point in (("0.1", near[0]), ("0.1004", near[1]), ("0.1001", near[0]), ("0.1006", near[1])):
        (judged,) = judge_gates(parse_gates(f"uer@{text}<=1"), close).gates
        assert judged.value == point.uer.value


def test_a_gate_that_is_given_twice_is_one():
    assert len(parse_gates(["uer<=0.2, trusted, uer<=0.2", "uer<=0.2"])) == 2


def test_spellings_of_one_number_are_one_gate():
    gates = parse_gates(["uer<=0.2, uer <= 20 %", "uer<= 20%,uer<=1/5,uer<=2e-1"])
    assert {(gate.metric, gate.sign, gate.number) for gate in gates} == {("uer", "<=", 0.2)}
    assert parse_gates("uer@8/255 <= 0.2")[0].of == "8/255"


def test_what_will_not_be_measured_is_refused_before(result):
    eps, checks = (8 / 255, 16 / 255), ["stateless", "no EOT gap"]

    def refuse(text, **missing):
        refuse_unmeasured(parse_gates(text), eps, checks, missing)

    refuse("uer@8/255<=0.2, uer@0.063<=0.2, uer<=0.1, check:no-eot-gap, mean_iou>=0, eps_adv>=0, trusted")
    for text, words in {
        "trusted, uer@0.1<=0.2": "gate 'uer@0.1<=0.2': the audit has no eps 0.1: its curve is at 8/255, 16/255",
        "check:statless": "did you mean stateless?",
        "eps_adv>=0.1": "none for a black box",
        "clean_iou>=0.1": "no maps here",
        "mean_iou@8/255>=0.1": "no maps here",
    }.items():
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            refuse(text, eps_adv="none for a black box", maps="no maps here")


def test_a_report_says_what_was_missed(result):
    report = result.gate("clean>=0.9, uer<=0.2, trusted")
    assert not report.held
    text = repr(report)
    assert "2 of 3 gates missed" in text
    assert "MISSED: 0.683 [0.6535, 0.7111], required <= 0.2" in text
    assert "held: 0.987" in text
    assert "<table>" in report._repr_html_()
    assert list(report.to_frame()["held"]) == [True, False, False]
    assert judge_gates(parse_gates("clean>=0.9"), result).held
    assert all(metric.meaning for metric in METRICS.values())
