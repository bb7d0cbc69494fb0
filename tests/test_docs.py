from pathlib import Path

import pytest

from gambeson import attacks

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("kind", ["image", "universal"])
def test_every_attack_is_in_the_table(kind):
    text = (DOCS / "attacks.md").read_text()
    for name in attacks.names(kind):
        assert f"`{name}`" in text, name


def test_costs_in_the_table_are_what_is_counted(trained, digits):
    from gambeson.victim import Victim

    x, y = digits.test.take(slice(0, 10))
    for name, forwards, backwards in [
        ("fgsm", 1, 1),
        ("r-fgsm", 1, 1),
        ("i-fgsm", 10, 10),
        ("step-ll", 2, 1),
        ("mi-fgsm", 10, 10),
        ("si-ni-fgsm", 50, 50),
    ]:
        with Victim(trained) as victim:
            attacks.create(name, eps=0.01)(victim, x, y)
        assert (victim.forwards, victim.backwards) == (10 * forwards, 10 * backwards), name
