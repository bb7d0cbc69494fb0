"""Uses one of everything that a third party adds, by every door; ``test_third_party.py`` runs it in its own process.

Arguments: a JSON object with the names of the attack, the universal attack, the defence, the data set, the model,
the diagnostic and the task. Prints what was found as JSON. It runs in an empty folder.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

import gambeson as gb
from gambeson.base import load_tensors
from gambeson.cli.app import run

AUDIT = {
    "eps": "[0.3]",
    "universal_steps": 5,
    "universal_batch": 16,
    "universal_probe_starts": 0,
    "pgd_steps": 2,
    "test_images": 40,
    "validation_images": 40,
    "sample": 20,
    "queries": 0,
    "eps_uni_runs": 0,
    "jacobian_backwards": 0,
    "universal_queries": 300,
    "pgd_restarts": 1,
    "suite_images": 0,
    "patterns": 2,
    "eps_adv": False,
    "auto_pgd": False,
    "targeted": False,
    "rescoring": False,
    "edits": "[]",
}


def command(*arguments: str) -> tuple[int, str, str]:
    """Run one command; return its code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(list(map(str, arguments)))
    return code, out.getvalue(), " ".join(err.getvalue().split())


def done(*arguments: str) -> dict:
    """Run one command that has to work, and return the JSON that it prints."""
    code, out, err = command(*arguments, "--json")
    assert code == 0, (arguments, err)
    return json.loads(out)


def main(names: dict[str, str]) -> dict:
    """Return what each door gave."""
    attack, universal, defense = names["attack"], names["universal"], names["defense"]
    found: dict = {}

    # Python
    data = gb.data.load(names["data"])
    assert data.num_classes == 4
    found["data name"] = [data.name, data.test.name]
    x, y = data.test.take(slice(0, 20))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gb.models.create(names["model"], data)
    moved = gb.attacks.create(attack, eps="1/4", share=0.5)(model, x, y)
    found["moved"] = float((moved - x).abs().max())
    found["widest"] = gb.attacks.create(universal, eps=0.3, widest=1).widest
    chosen: Any = gb.defenses.create(defense, weight="0.02")
    found["weight"] = chosen.weight
    inner: Any = gb.defenses.create("ensemble", members=2, inner={"name": defense, "weight": 0.5})
    found["inner"] = [type(inner.inner).__name__, inner.inner.weight]

    # train, from flags and from YAML
    flags = ["--data", names["data"], "--model", names["model"], "--epochs", "5", "--batch-size", "32", "--lr", "0.2"]
    trained = done("train", *flags, "--defense", defense, "--set", "defense.weight=0.02", "--out", "a")
    found["losses"] = sorted(trained["metrics"][-1])
    found["run.yaml"] = yaml.safe_load(Path("a/run.yaml").read_text())
    done("train", "--config", "a/run.yaml", "--out", "b")
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    done("train", *flags, "--seed", "1", "--out", "c")
    by_hand = {"kind": "train", "data": names["data"], "model": names["model"], "recipe": {"epochs": 1, "lr": 0.2}}
    by_hand["defense"] = {"name": "combination", "risk": {"name": defense, "weight": 0.1}}
    Path("by-hand.yaml").write_text(yaml.safe_dump(by_hand))
    done("train", "--config", "by-hand.yaml", "--out", "d")
    found["risk"] = yaml.safe_load(Path("d/run.yaml").read_text())["defense"]["risk"]

    # attack
    result = done("attack", "--model", "a", "--attack", attack, "--eps", "0.9", "--images", "60", "--out", "attack")
    assert result["robust"]["value"] < 0.4 < 0.7 < result["clean"]["value"], result  # eps 0.9 leaves little to see
    found["attack"] = [result["rounds"][0]["attack"], result["largest"]]
    done("attack", "--config", "attack/run.yaml", "--out", "attack-again")
    assert Path("attack/result.json").read_bytes() == Path("attack-again/result.json").read_bytes()

    # a task, in Python, on labels that name the other class of each kind: it decides what is right
    trained_model = gb.models.loading.load_model("a", names["data"], "cpu").model
    y = y ^ 1
    paired = gb.data.Split("kinds", x, y, data.classes, task=gb.tasks.create(names["task"]))
    pgd = gb.attacks.PGD(eps=0.5, steps=5)
    with gb.victim.Victim(trained_model) as victim:
        found["clean"] = float((victim(x).argmax(1) == y).float().mean())
        under = gb.evaluation.accuracy_under(victim, paired, pgd, 0)
        found["kinds"] = [gb.evaluation.accuracy(trained_model, paired).value, under.value]
        seed = gb.base.derive(0, "batch", 0)
        both = (x, pgd(victim, x, y, seed=seed, task=paired.task))
        found["kinds by hand"] = [float((victim(z).argmax(1) // 2 == y // 2).double().mean()) for z in both]

    # transfer
    table = done("transfer", "a", "c", "--attacks", f"{attack},fgsm", "--eps", "0.9", "--images", "60", "--out", "t")
    found["tables"] = [one["attack"] for one in table["tables"]]
    assert table["tables"][0]["errors"][0][0]["value"] > table["clean"][0]["value"]
    again = done("transfer", "--config", "t/run.yaml", "--out", "t-again")
    assert again["tables"] == table["tables"]
    found["labels"] = table["labels"]

    # uap
    about = done(
        "uap", "craft", "--model", "a", "--attack", universal, "--eps", "0.3", "--set", "widest=2", "--out", "u"
    )
    delta = load_tensors(Path("u"))[0]["delta"]
    assert delta.shape == (1, 1, 8, 8)
    assert torch.allclose(delta.abs(), torch.full_like(delta, 0.3))
    assert torch.equal(delta[:, :, :1].expand_as(delta), delta)  # stripes
    found["uap"] = [about["attack"], about["settings"], len(about["restarts"])]
    gb.attacks.create(about["attack"], **about["settings"])  # provenance is enough to make it again
    assert 0 <= done("uap", "score", "u", "--model", "a")["uer"]["value"] <= 1

    # audit, with the diagnostic; the model by its name, with weights from a file, too
    small = [part for key, value in AUDIT.items() for part in ("--set", f"suite.{key}={value}")]
    small += [
        "--suite",
        "quick",
        "--surrogate",
        "none",
        "--set",
        f"suite.diagnostics=[{json.dumps(names['diagnostic'])}]",
    ]
    source = f"{names['model']}@a/model.safetensors"
    audited = done("audit", source, "--data", names["data"], *small, "--out", "audit")
    (check,) = (one for one in audited["checks"] if one["name"] in ("finite logits", "never trusted"))
    found["check"] = [check["passed"], any(check["name"] in reason for reason in audited["verdict"]["reasons"])]
    again = done("audit", "--config", "audit/run.yaml", "--out", "audit-again")
    assert again["checks"] == audited["checks"]

    # list
    kinds = dict(zip(names, ("attacks", "attacks", "defenses", "data", "models", "diagnostics", "tasks"), strict=True))
    found["listed"] = {}
    for key, kind in kinds.items():
        (entry,) = done("list", kind, names[key])
        found["listed"][key] = [entry["package"], entry["summary"], sorted(entry["settings"])]
        if ".py:" not in names[key]:
            assert entry in done("list", kind)
            assert names[key] in command("list", kind)[1]

    # mistakes
    wrong = {"no setting": ["--set", "settings.shares=1"], "other kind": ["--attack", universal]}
    attacking = ["attack", "--model", "a", "--attack", attack, "--eps", "0.9", "--out", "wrong"]
    found["wrong"] = {title: command(*attacking, *more)[::2] for title, more in wrong.items()}
    found["wrong"]["no defence"] = command("train", *flags, "--defense", attack, "--out", "wrong")[::2]
    assert not Path("wrong").exists()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
