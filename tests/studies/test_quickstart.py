"""The quickstart with everything tiny, in this process: what comes first, what is shared, what resumes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gambeson import report
from gambeson.base import load_tensors, read_json
from gambeson.evaluation import universal_evasion
from gambeson.models import load
from gambeson.studies import quickstart as study
from gambeson.training import Recipe

TINY = {
    "eps": (0.25,),
    "universal_steps": 5,
    "universal_probe_starts": 0,
    "pgd_steps": 2,
    "suite_images": 0,
    "sample": 20,
    "queries": 2,
    "surrogate_epochs": 1,
    "transfer_images": 20,
    "test_images": 60,
    "validation_images": 60,
    "jacobian_backwards": 0,
    "universal_queries": 300,
    "eps_uni_runs": 0,
    "eps_adv": False,
}


@pytest.fixture
def tiny(monkeypatch):
    module = __import__("sys").modules["gambeson.studies.quickstart"]
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(module, "TRAIN", Recipe(epochs=2, lr=0.05, warmup=0))
    monkeypatch.setattr(module, "HARDEN", Recipe(epochs=1, lr=0.05, warmup=0))
    monkeypatch.setattr(module, "SUITE", module.SUITE.model_copy(update=TINY))
    monkeypatch.setattr(module, "LOOK", module.LOOK.model_copy(update={"steps": 20, "probe_starts": 0}))
    return module


def test_the_first_look_shows_what_it_says(tiny, tmp_path: Path) -> None:
    tiny._train(tmp_path, tiny.BASELINE, 0, "cpu")
    first = tiny._first_look(tmp_path, 0, "cpu")
    assert universal_evasion(load(tmp_path / "standard"), tiny._data().test, first.uap) == first.under
    assert first.under.low > first.clean.high  # even a short attack shows
    page = report.write_first(
        first.examples, first.uap, (first.under, first.clean), first.classes, tmp_path / "page.html", title="A look"
    )
    html = page.read_text()
    assert f"<b>{100 * first.under.value:.0f} of 100</b>" in html
    assert 'http-equiv="refresh"' in html
    tensors, _ = load_tensors(first.examples)
    wrong = int((tensors["perturbed_predictions"] != tensors["labels"]).sum())
    assert abs(wrong - 10 * first.under.value) < 1


@pytest.mark.full
def test_the_first_look_comes_before_any_audit_and_audits_share_a_surrogate(tiny, tmp_path: Path) -> None:
    seen = []

    def started(first):
        seen.append(first)
        assert not list(tmp_path.glob("*-audit"))
        assert not (tmp_path / "pgd-adversarial").exists()

    audits = [audit.results for audit in study(tmp_path, started=started)]
    assert [found.subject.label for found in audits] == list(tiny.DEFENSES)
    assert {found.surrogate.name for found in audits if found.surrogate} == {str(tmp_path / "surrogate.safetensors")}
    times = read_json(tmp_path / "standard-audit" / "timing.json")
    assert [audit.results for audit in study(tmp_path, started=started)] == audits
    assert len(seen) == 1  # a finished quickstart is only read
    assert read_json(tmp_path / "standard-audit" / "timing.json") == times
