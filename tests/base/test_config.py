"""Settings: closed, also when they are copied."""

import pytest
import torch

import gambeson as gb
from gambeson.base import eps_text
from gambeson.base.config import parse_number


def test_a_copy_with_an_unknown_field_is_refused():
    attack = gb.attacks.PGD(eps=0.1)
    assert attack.model_copy(update={"steps": 3}).steps == 3
    with pytest.raises(gb.UserError, match=r"PGD has no setting 'step': did you mean steps\?"):
        attack.model_copy(update={"step": 0.5})


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_with_other_values_computes_anew_what_the_original_has_kept(deep):
    ball, pattern = gb.threat.Ball(eps=0.25), torch.ones(1, 1, 2, 2)
    assert float(ball.fill(pattern).max()) == 0.25
    larger = ball.model_copy(update={"eps": 0.5}, deep=deep)
    assert float(larger.fill(pattern).max()) == float(larger.project(pattern).max()) == 0.5
    assert larger == gb.threat.Ball(eps=0.5)
    assert "_radius" in ball.model_copy().__dict__  # nothing has changed: it is still right


@pytest.mark.parametrize(
    ("eps", "said"),
    [
        (8 / 255, "8/255"),
        (0.1, "0.1"),
        (0.15, "0.15"),
        (51 / 255, "0.2"),
        (1.0, "1"),
        (0.0, "0"),
        (0.031373, "8/255"),
        (0.12345, "0.1235"),
        (128 / 255, "128/255"),
        (2.5, "2.5"),
    ],
)
def test_a_radius_is_written_as_it_is_given(eps, said):
    assert eps_text(eps) == said
    assert parse_number(said) == pytest.approx(eps, rel=1e-3)
