"""Radii as text."""

import pytest

from gambeson.base import eps_text
from gambeson.base.config import parse_number


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
