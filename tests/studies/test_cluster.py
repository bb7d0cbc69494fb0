"""Studies on a local Ray cluster, where Ray is installed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from test_study import numbers, tiny

from gambeson.base import UserError
from gambeson.studies import run_study


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gambeson\[ray\]'"):
        run_study(tiny(), tmp_path, ray="local")


def test_a_local_cluster_gives_the_numbers_of_one_process(tmp_path):
    pytest.importorskip("ray")
    small = {"seeds": 1, "defenses": {"standard": "standard"}}
    here = run_study(tiny(**small), tmp_path / "here")
    there = run_study(tiny(**small), tmp_path / "there", ray="local")
    assert there.done == there.cells
    assert numbers(there) == numbers(here)
