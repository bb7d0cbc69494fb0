"""Models of the Hugging Face hub: folders in its layout, and a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gambeson as gb
from gambeson.base import UserError, write_json
from gambeson.models import zoo
from gambeson.models.loading import load_model

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def colours(classes):
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    whole = gb.data.as_dataset((images, torch.arange(40) % classes))
    object.__setattr__(whole, "name", "colours")
    return whole


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.fixture
def timm_folder(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"mean": MEAN, "std": STD, "input_size": [3, 32, 32], "num_classes": 4}
    config = {"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


@pytest.fixture
def vit_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_channels=3, num_labels=4, **sizes)
    model = transformers.ViTForImageClassification(config).eval()
    folder = tmp_path / "vit"
    model.save_pretrained(folder)
    prepared = {"image_mean": MEAN, "image_std": STD, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder, lambda pixels: model(pixels).logits


@pytest.mark.parametrize("kind", ["timm_folder", "vit_folder"])
@pytest.mark.parametrize("spelling", ["{}", "hf://{}"])
def test_a_folder_in_the_hubs_layout_is_a_model(kind, spelling, request, tmp_path, monkeypatch):
    folder, own = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    data = colours(4)
    loaded = load_model(spelling.replace("{}", folder.name), "colours", "cpu", data)
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixels), own(normalised(pixels)))
    assert loaded.model.card.name == f"hf://{folder}"
    assert not loaded.black_box
    with pytest.raises(UserError, match="knows 4 classes, but colours has 5: choose data that fit the model"):
        load_model(str(folder), "colours", "cpu", colours(5))
    gb.models.save(loaded.model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(gb.models.load(tmp_path / "m.safetensors")(pixels), loaded.model(pixels))


def test_a_folder_that_is_no_model_is_one_sentence(timm_folder, tmp_path):
    folder, _ = timm_folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "resnett10t"}))
    with pytest.raises(UserError, match="unknown timm model 'resnett10t': did you mean resnet10t"):
        gb.models.create(str(folder))
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 4}))
    with pytest.raises(UserError, match="has no mean and no std and no input_size, so its input is not known"):
        gb.models.create(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither an `architecture`, as timm writes, nor a `model_type`"):
        gb.models.create(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be|cannot be"):
        gb.models.create(str(folder))
    with pytest.raises(UserError, match="has no config.json: name a folder or a model"):
        gb.models.create(f"hf://{tmp_path}")


class Hub:
    """Answers what a client of the hub asks about one repository, ``own/net``, and records it."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"evil.py": b"", "weights.bin": b"x"}
        commit, outer = "c0ffee" * 6 + "abcd", self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                outer.asked.append(f"{self.command} {self.path}")
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/own/net/tree/"):
                    listed = [
                        {"type": "file", "path": name, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
                        for name, value in files.items()
                    ]
                    self.send(200, json.dumps(listed).encode())
                elif path.startswith("/api/models/own/net"):
                    about = {"id": "own/net", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                    self.send(200, json.dumps(about).encode())
                elif path.startswith("/own/net/resolve/") and path.rpartition("/")[2] in files:
                    self.send(200, files[path.rpartition("/")[2]])
                else:
                    self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            do_GET = do_HEAD  # noqa: N815

            def send(self, status, content, more=None):
                self.send_response(status)
                headers = {"Content-Length": str(len(content)), "X-Repo-Commit": commit}
                headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **(more or {})}
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def in_a_process(source, home, endpoint, **more):
    """What a fresh process makes of a name: the mean and sum of its logits, or its sentence."""
    code = f"""
import torch, gambeson as gb
try:
    model = gb.models.create({source!r}).eval()
    print("LOGITS", model(torch.full((2, 3, 32, 32), 0.25)).tolist(), model.card.mean)
except gb.UserError as error:
    print("SAID", error)
"""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **more}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]


def test_large_entries_of_the_zoo_come_from_the_hub(digits, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    model = gb.models.create("lenet5", digits, seed=3)
    name, served, package = "digits/lenet5/large", tmp_path / "served", tmp_path / "site" / zoo.PACKAGE
    gb.models.save(model, served / zoo.WEIGHTS)
    (served / zoo.RUN).write_text("{kind: train, data: digits, model: lenet5, defense: {name: standard}}")
    digests = {file: hashlib.sha256((served / file).read_bytes()).hexdigest() for file in (zoo.WEIGHTS, zoo.RUN)}
    rate = gb.evaluation.Rate.of(1, 2)
    entry = zoo.Entry(
        **dict.fromkeys(("name", "summary", "data", "model", "defense", "attack", "verdict", "test"), "x"),
        **dict.fromkeys(("clean", "uer", "suite"), rate),
        **{"parameters": 1, "eps": 0.1, "norm": "inf", "trusted": True},
        at="hf://own/net@v1/lenet5",
        files=digests,
    ).plain()
    del entry["name"]
    write_json(package / zoo.MANIFEST, {"form": 1, "entries": {name: entry}})
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    server = Hub(served)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    try:
        assert gb.models.fingerprint(gb.zoo.load(name)) == gb.models.fingerprint(model)
        assert load_model(f"zoo:{name}").trained["model"] == "lenet5"
        assert {one.split()[1] for one in server.asked if one.startswith("GET") and "resolve" in one} == {
            f"/own/net/resolve/v1/lenet5/{file}" for file in digests
        }
        zoo.path(name, zoo.WEIGHTS).resolve().write_bytes(b"other")
        with pytest.raises(UserError, match="is damaged: .* delete it, and it is fetched again"):
            gb.zoo.load(name)
        (served / zoo.CARD).write_text("x")
        stored = json.loads((package / zoo.MANIFEST).read_text())
        stored["entries"][name]["files"][zoo.CARD] = "0"
        write_json(package / zoo.MANIFEST, stored)
        with pytest.raises(UserError, match=f"card.md of {name} could not be fetched from hf://own/net@v1/lenet5"):
            gb.zoo.card(name)
    finally:
        server.server.shutdown()
        server.server.server_close()


@pytest.mark.full
def test_a_model_of_the_hub_is_fetched_once_and_stays(timm_folder, tmp_path):
    pytest.importorskip("huggingface_hub")
    folder, own = timm_folder
    hub = Hub(folder)
    try:
        with torch.no_grad():
            right = own(normalised(torch.full((2, 3, 32, 32), 0.25)))
        first = in_a_process("hf://own/net", tmp_path / "home", hub.url)
        assert first.startswith("LOGITS"), first
        found = torch.tensor(json.loads(first.removeprefix("LOGITS ").rpartition(" (")[0]))
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
        assert "(0.1, 0.2, 0.3)" in first
        assert not any("evil.py" in one or "weights.bin" in one for one in hub.asked if "/resolve/" in one)
        assert in_a_process("hf://own/other", tmp_path / "home", hub.url).startswith(
            "SAID hf://own/other could not be fetched (RepositoryNotFoundError"
        )
    finally:
        hub.server.shutdown()
        hub.server.server_close()
    assert in_a_process("hf://own/net", tmp_path / "home", hub.url) == first  # the server is gone
    assert in_a_process("hf://own/net", tmp_path / "home", hub.url, HF_HUB_OFFLINE="1") == first
    said = in_a_process("hf://own/net", tmp_path / "empty", hub.url, HF_HUB_OFFLINE="1")
    assert said.startswith("SAID hf://own/net could not be fetched (")
    assert said.endswith("or name a folder with its config.json and model.safetensors")
