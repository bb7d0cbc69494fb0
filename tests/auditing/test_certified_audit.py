"""The certified stage of an audit: sound beside its attacks, refused where there are no bounds, and counted."""

import pytest
import torch
from torch import nn

import gambeson as gb
from gambeson import UserError, report
from gambeson.auditing import Suite
from gambeson.auditing.cost import plan
from gambeson.models.black_box.local import FunctionModel
from gambeson.report.formatting import percent
from tests.attacks.test_universal import linear_data
from tests.conftest import LinearNet, binary

SHAPE = (1, 4, 6)
ALONE = Suite(
    eps=(0.005, 0.02, 0.3), universal_steps=20, universal_restarts=1, universal_batch=16, universal_probe_starts=0,
    pgd_steps=5, pgd_restarts=1, sample=20, suite_images=0, queries=0, jacobian_backwards=0,
    universal_queries=300, surrogate="none",
    eps_uni_runs=0, noise_sizes=(), edits=(), eps_adv=False, auto_pgd=False, rescoring=False, checks=(), certified=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    model, _ = binary(SHAPE)
    out = tmp_path_factory.mktemp("certified")
    return gb.audit(model, linear_data(model, SHAPE), ALONE, out), out


def test_attacks_never_leave_less_than_is_certified(found):
    result = found[0].results
    assert [one.bounds.eps for one in result.certified] == list(ALONE.eps)
    for one in result.certified:
        assert one.bounds.per_image.value <= one.bounds.universal <= one.attacked.value
        assert one.attacked.n == len(linear_data(binary(SHAPE)[0], SHAPE).test)
    (each,) = result.per_image
    assert result.certified[1].bounds.per_image.value == each.accuracy.value  # of a linear model both are exact
    shares = [one.bounds.universal for one in result.certified]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.8  # a bound that says nothing would be sound too
    assert result.certified[0].attacked.value > result.certified[1].attacked.value + 0.2


def test_bounds_stand_beside_attacks_in_words_in_the_report_and_in_rows(found):
    audit, out = found
    middle = audit.results.certified[1]
    low, high = 100 * middle.bounds.universal, 100 * middle.attacked.value
    assert f"eps 0.02 lies between {low:.1f} % (certified) and {high:.1f} % (attacked)." in audit.verdict.summary
    page = report.write([out], out / "report.html").read_text()
    assert f"{percent(low / 100)} to {percent(high / 100)}" in page.replace("\N{NO-BREAK SPACE}", " ")
    frame = audit.to_frame()
    assert list(frame[frame["what"] == "certified accuracy per image"]["eps"]) == list(ALONE.eps)


def test_what_has_no_bounds_is_refused_before_any_work():
    model, _ = binary(SHAPE)
    data = linear_data(model, SHAPE)

    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = LinearNet(model.weight.detach())

        def forward(self, x):
            return self.net(x).tanh()

    with pytest.raises(UserError, match=r"no accuracy can be certified, as the model has a part that is not affine"):
        gb.audit(Curved(), data, ALONE)

    class Noisy(Curved):
        def forward(self, x):
            return self.net(x + 0.1 * torch.randn_like(x))

    with pytest.raises(UserError, match="the model is random, and certified bounds"):
        gb.audit(Noisy(), data, ALONE)
    with pytest.raises(UserError, match="bounds are for the norm inf, and the audit's is 2"):
        gb.audit(model, data, ALONE.model_copy(update={"norm": "2"}))
    with pytest.raises(UserError, match="radii below 0.5, and eps = 0.6"):
        gb.audit(model, data, ALONE.model_copy(update={"eps": (0.1, 0.6)}))
    with pytest.raises(UserError, match="need the model's weights, and .* is a black box"):
        gb.audit(FunctionModel(model), data, ALONE)


def test_bounds_have_their_cost_in_the_plan():
    model, _ = binary(SHAPE)
    data = linear_data(model, SHAPE)
    part = {one.name: one for one in plan(model, data, ALONE).parts}["certified"]
    assert part.bounds == 3 * 80
    assert plan(model, data, ALONE).speed.bound > 0
    assert {one.name: one for one in plan(model, data, Suite(eps=(0.1,))).parts}["certified"].bounds == 0
