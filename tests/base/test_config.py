"""Settings: closed, also when they are copied."""

import pytest

import gambeson as gb


def test_a_copy_with_an_unknown_field_is_refused():
    attack = gb.attacks.PGD(eps=0.1)
    assert attack.model_copy(update={"steps": 3}).steps == 3
    with pytest.raises(gb.UserError, match=r"PGD has no setting 'step': did you mean steps\?"):
        attack.model_copy(update={"step": 0.5})
