"""What the README says must be what is stored and what runs."""

import copy
import re
from pathlib import Path

import torch

import gambeson as gb
from gambeson.auditing import AuditResult

ROOT = Path(__file__).parent.parent
MODELS = ("standard", "pgd-adversarial", "shared-adversarial")


def test_the_stored_runs_are_convincing():
    plain, _, shared = (AuditResult.load(ROOT / "results" / "quickstart" / model) for model in MODELS)
    assert plain.middle.uer.low > 3 * max(control.worst.high for control in plain.middle.controls)
    assert shared.middle.uer.high < plain.middle.uer.low / 2
    assert abs(shared.clean.value - plain.clean.value) < 0.03
    assert all(found.verdict.trusted for found in (plain, shared))


def test_the_python_example_runs_on_small_data(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code = code.replace('"fashion-mnist"', '"digits"').replace('"lenet"', '"lenet5"').replace("epochs=10", "epochs=1")
    small = {
        "surrogate_epochs": 1,
        "transfer_images": 50,
        "sample": 50,
        "test_images": 100,
        "jacobian_backwards": 300,
        "universal_queries": 300,
    }
    small |= {"eps": (0.1,), "universal_steps": 20, "universal_probe_starts": 0, "pgd_steps": 5, "queries": 20}
    small |= {"eps_uni_runs": 1, "eps_adv": False, "rescoring": False, "edits": ()}
    quick = gb.auditing.SUITES["quick"].model_copy(update=small)
    monkeypatch.setitem(gb.auditing.SUITES, "quick", quick)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README", "exec"), scope)
    assert isinstance(scope["audit"], gb.auditing.Audit)
    assert (tmp_path / "runs" / "shared" / "model.safetensors").is_file()


def test_the_defence_of_the_readme_trains(tmp_path, trained, digits):
    _, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "squeezing.py").write_text(code)
    logits = {}
    for weight in (0.0, 1.0):
        defense = gb.defenses.create(f"{tmp_path / 'squeezing.py'}:LogitSqueezing", weight=weight)
        model = copy.deepcopy(trained)
        gb.train(model, digits, defense, epochs=1, seed=0)
        logits[weight] = model(digits.test.take(slice(0, 100))[0]).square().mean().item()
    assert logits[1.0] < 0.5 * logits[0.0]


def test_the_attack_and_the_diagnostic_of_contributing_run_in_an_audit(tmp_path, trained, digits):
    attack, universal, _, _, diagnostic = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    (tmp_path / "mine.py").write_text(attack + diagnostic)
    small = gb.auditing.SUITES["quick"].model_copy(
        update={
            "eps": (0.1,),
            "attacks": (f"{tmp_path}/mine.py:OneStep",),
            "diagnostics": (f"{tmp_path}/mine.py:bright",),
            "universal_steps": 5,
            "rescoring": False,
            "edits": (),
            "test_images": 100,
            "sample": 40,
            "surrogate": "none",
            "eps_uni_runs": 0,
            "eps_adv": False,
            "queries": 0,
            "jacobian_backwards": 0,
            "universal_queries": 300,
        }
    )
    found = gb.audit(trained, digits, small).results
    pgd, _, step = found.per_image
    assert step.attack == "OneStep"
    assert pgd.accuracy.value <= step.accuracy.value < found.clean.value - 0.1
    check = found.checks[-1]
    assert check.name == "bright images no easier"
    assert f"{100 * check.numbers['bright']:.1f} % on the brighter half" in check.detail
    assert 0.5 < check.numbers["dark"] <= 1

    (tmp_path / "coarse.py").write_text(universal)
    uap = gb.attacks.create(f"{tmp_path}/coarse.py:Coarse", eps=0.3).craft(trained, digits)
    assert torch.equal(uap.delta[..., ::2, ::2], uap.delta[..., 1::2, 1::2])  # constant over its blocks
    harm = gb.evaluation.universal_evasion(trained, digits, uap).value
    assert harm > 1.1 * max(one.worst.value for one in gb.evaluation.rates_beside(trained, digits.test, uap))
