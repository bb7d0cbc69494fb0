"""``gambeson audit`` of every black box as a user meets it: a real server, a function, nonsense in one sentence."""

import json

import pytest
import yaml

import gambeson as gb
from gambeson.cli.app import run
from tests.cli.test_cli import says
from tests.models.test_black_box import Server

SMALL = [
    *("--data", "digits", "--suite", "quick", "--eps", "0.1,0.3", "--surrogate", "none"),
    *("--set", "suite.patterns=4", "--set", "suite.pattern_images=40", "--set", "suite.queries=20"),
    *("--set", "suite.sample=20", "--set", "suite.test_images=60", "--set", "suite.eps_uni_runs=1"),
]


@pytest.fixture
def server(trained):
    made = Server(trained)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.full
def test_an_endpoint_is_audited_within_its_budget_through_failures(server, tmp_path, capsys, digits):
    server.plan = [(None, 500, None, (503, {"Retry-After": "0.01"}), None, "drop")[k % 6] for k in range(48)]
    command = ["audit", server.url, *SMALL, "--budget", "12000", "--out", str(tmp_path / "a")]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["subject"]["black_box"]
    assert result["settings"]["budget"] == 12000
    assert result["clean"]["value"] > 0.9
    assert result["universal"][-1]["uer"]["value"] > result["universal"][0]["uer"]["value"]
    assert result["per_image"][0]["attack"] == "square"
    sent = sum(count for count, _ in server.sizes)
    turned_away = sum(count for count, todo in server.sizes if isinstance(todo, tuple))
    assert turned_away > 0
    assert sum(count for count, todo in server.sizes if todo in (500, "drop")) > 0
    asked = json.loads((tmp_path / "a" / "state" / "queries.json").read_text())["images"]
    assert asked == sent - turned_away <= 12000
    settings = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert (settings["model"], settings["finished"]) == (server.url, True)

    before = server.seen
    assert run(command) == 0  # finished: nobody is asked
    told = capsys.readouterr().err
    assert f"{asked} images queried in total" in " ".join(told.split())
    assert "attacks that need gradients were left out" in " ".join(told.split())
    assert server.seen == before
    assert run(["report", str(tmp_path / "a")]) == 0


def test_another_model_behind_the_same_address_is_noticed(server, tmp_path, capsys, digits):
    folder = tmp_path / "a"
    command = ["audit", server.url, *SMALL, "--eps", "0.3", "--out", str(folder)]
    assert run([*command, "--json"]) == 0
    held = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**held, "finished": False}))
    server.net = gb.models.create("lenet5", digits)
    says(capsys, command, "holds the audit of another model", "answers otherwise than it did", "--out")
    says(capsys, [*command[:1], server.url + "/v2", *command[2:]], "holds another run (it differs in model)")


def test_a_server_that_is_down_leaves_no_folder(tmp_path, capsys, server):
    server.always = (404, {})
    out = ["--out", str(tmp_path / "a")]
    says(capsys, ["audit", server.url, *SMALL, *out], "refused the images with status 404")
    assert not (tmp_path / "a").exists()


def test_a_function_that_names_classes(tmp_path, capsys, trained):
    gb.models.save(trained, tmp_path / "net.safetensors")
    (tmp_path / "box.py").write_text(
        "import gambeson as gb\nfrom pathlib import Path\n"
        "net = gb.models.load(Path(__file__).parent / 'net.safetensors')\n"
        "def classes(images):\n    return net(images).argmax(1).tolist()\n"
    )
    command = ["audit", f"function:{tmp_path}/box.py:classes", *SMALL, "--out", str(tmp_path / "a")]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert any("Only the top class came back" in note for note in result["notes"])
    assert result["clean"]["value"] > 0.9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0"], "budget"),
        (["--budget", "many"], "valid integer"),
        (["--budget", "100"], "the smallest audit of"),
        (["--suite", "fast"], "unknown suite 'fast'"),
        (["--surrogate", "no/where.safetensors"], "no/where.safetensors does not exist"),
        (["--norm", "3"], "norm"),
        (["--set", "suite.patterns=0"], "patterns"),
        (["--set", "suite.paterns=3"], "did you mean patterns?"),
    ],
)
def test_nonsense_is_one_sentence(server, tmp_path, capsys, flags, words):
    rest = [value for value in SMALL if value not in ("--surrogate", "none")] if "--surrogate" in flags else SMALL
    says(capsys, ["audit", server.url, *rest, *flags, "--out", str(tmp_path / "a")], words)


def test_a_budget_for_a_model_with_gradients_is_refused(tmp_path, capsys, trained):
    gb.models.save(trained, tmp_path / "net.safetensors")
    command = [
        "audit",
        str(tmp_path / "net.safetensors"),
        "--data",
        "digits",
        "--budget",
        "9",
        "--out",
        str(tmp_path / "a"),
    ]
    says(capsys, command, "a budget limits the queries to a black box", "leave --budget out")
    assert not (tmp_path / "a").exists()


def test_the_help_names_every_kind_of_model(capsys):
    assert run(["audit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "torchvision:NAME",
        "timm:NAME",
        "transformers:NAME",
        "FILE.pt2",
        "FILE.onnx",
        "function:FILE.py",
        "http://",
    ):
        assert word in text
