"""Whatever object comes in the place of another is refused in one sentence, before any work."""

# mypy: disable-error-code="arg-type, list-item"

import math

import pytest
import torch

import gambeson as gb
from gambeson.attacks import PGD, StochasticPGD
from gambeson.evaluation import eps_adv, eps_uni, run_suite
from gambeson.evaluation.transfer import perturbed
from gambeson.models import create

UAP = StochasticPGD(eps=0.1, steps=2)
TRIED = {
    "model to audit": (lambda net, data: gb.audit(None, data, "glance"), "the model is a NoneType: expected a torch"),
    "model to harden": (lambda net, data: gb.harden("net", data), "the model is a str: expected a torch"),
    "suite": (lambda net, data: gb.audit(net, data, 3), "unknown suite 3: choose one of full, glance"),
    "suite as a mapping": (lambda net, data: gb.audit(net, data, {}), "unknown suite {}: choose"),
    "folder of an audit": (lambda net, data: gb.audit(net, data, "glance", 3), "3 is no name or path"),
    "folder of a hardening": (lambda net, data: gb.harden(net, data, out=3), "3 is no name or path"),
    "attacks": (lambda net, data: gb.audit(net, data, "glance", attacks=PGD(eps=0.1)), "attacks is a PGD: give a list"),
    "name of a testbed model": (lambda net, data: gb.testbed.load(None), "unknown model of the testbed on digits None"),
    "auditor": (lambda net, data: gb.testbed.score(3), "the auditor is a int: expected a function"),
    "attack of eps_uni": (lambda net, data: eps_uni(net, data, PGD(eps=0.1)), "takes a universal attack .* got PGD"),
    "known": (lambda net, data: eps_uni(net, data, UAP, known=["a"]), "a known perturbation is a str: expected"),
    "measure": (lambda net, data: eps_uni(net, data, UAP, measure=[1]), r"unknown measure \[1\]: choose one of"),
    "delta": (lambda net, data: eps_uni(net, data, UAP, delta=math.nan), "delta = nan: nan is not a finite number"),
    "tolerance": (lambda net, data: eps_adv(net, data, PGD(eps=0.1), tolerance=-1), "tolerance = -1: expected greater"),
    "start": (lambda net, data: UAP.craft(net, data, start="x"), "start are a str: expected a torch tensor"),
    "attacks of a suite": (lambda net, data: run_suite(net, data.test, [1]), "attacks is a list: give attacks by"),
    "no images": (
        lambda net, data: perturbed(net, data.test.subset(torch.arange(0)), PGD(eps=0.1), 0), "holds no images: give"
    ),
    "norm": (lambda net, data: run_suite(net, data.test, {}, norm="zz"), "norm = 'zz'"),
    "name of an architecture": (lambda net, data: create(3, data), "3 is no name or path"),
}  # fmt: skip


@pytest.mark.parametrize("what", TRIED)
def test_a_wrong_object_is_refused_in_one_sentence(what, trained, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work, said = TRIED[what]
    with pytest.raises(gb.UserError, match=said) as caught:
        work(trained, digits)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
