import copy
import gzip
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import gambeson as gb
from gambeson import UserError
from gambeson.base import (
    Config,
    check_run,
    close_run,
    derive,
    load_tensors,
    open_run,
    read_json,
    read_settings,
    replaceable,
    save_tensors,
    seeded,
    write_bytes,
    write_json,
)
from gambeson.base.files import KINDS, parse_yaml


def test_tensors_and_their_document_come_back(tmp_path):
    tensors = {"a": torch.rand(3, 2), "b": torch.arange(4)}
    save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"n": 1, "list": [1, 2]})
    back, about = load_tensors(tmp_path / "deep" / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert about == {"n": 1, "list": [1, 2]}


def test_equal_contents_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        save_tensors(tmp_path / name, {"a": torch.ones(2), "b": torch.zeros(3)}, {"x": 1, "y": 2, "z": 3})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04rest", "is a pickle, which can run code when it is opened and is never loaded"),
        (b"\x80\x04\x95rest", "is a pickle"),
        (b"<!DOCTYPE html><html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, .*: run `git lfs pull`"),
        (b"\x89PNG\r\n\x1a\nrest", "starts with .*PNG.*, as no file of weights does: name weights"),
        (b"notes on the model", "as no file of weights does"),
        (b"", r"\(0 bytes\) is not a complete safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "it is truncated or damaged"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_tensors(tmp_path / "x")
    with pytest.raises(UserError, match="does not exist: expected a safetensors file with weights"):
        load_tensors(tmp_path / "none")


def test_a_real_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="is a pickle"):
        load_tensors(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@given(st.integers(1, 300))
def test_any_truncation_is_noticed(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    save_tensors(folder / "x", {"a": torch.rand(40)}, {"k": "v"})
    whole = (folder / "x").read_bytes()
    (folder / "x").write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_tensors(folder / "x")


FULL = """
import resource, sys
from pathlib import Path
import gambeson as gb
from gambeson import UserError
from gambeson.base import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write_bytes(Path(sys.argv[1]), b"x" * 5000)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path):
    target = tmp_path / "file"
    write_bytes(target, b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(target)], capture_output=True, text=True, check=True)
    assert "nothing half-written was left" in done.stdout
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


class Run(Config):
    kind: str = "train"
    data: str = "digits"
    seed: int = 0


class LaterRun(Run):
    """Of a later version, which can do more."""

    speed: int = 1


class NestedRun(Run):
    group: dict[str, Any]


def test_a_folder_belongs_to_one_run(tmp_path):
    run = Run()
    assert not open_run(tmp_path / "run", run, {"torch": "2"})
    with pytest.warns(UserWarning, match="torch 3 after 2"):  # the same run on another machine goes on
        assert not open_run(tmp_path / "run", run, {"torch": "3"})
    close_run(tmp_path / "run")
    assert open_run(tmp_path / "run", run, {})
    assert read_settings(tmp_path / "run" / "run.yaml", "train") == run.plain()
    (tmp_path / "run" / "state").mkdir()  # an empty folder is nothing to lose
    assert check_run(tmp_path / "run", Run(seed=1)) is None
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds another run \(it differs in seed\): choose another --out"):
        open_run(tmp_path / "run", Run(seed=1), {})
    assert open_run(tmp_path / "run", LaterRun(), {})
    with pytest.raises(UserError, match=r"holds another run \(it differs in speed\)"):
        open_run(tmp_path / "run", LaterRun(speed=2), {})
    group = {"eps": 0.1, "steps": 5, "inner": {"seed": 0, "lr": 1}}
    open_run(tmp_path / "nested", NestedRun(group=group), {})
    write_json(tmp_path / "nested" / "result.json", {})
    for more, differs in (
        ({"eps": 0.2, "inner": {"seed": 0, "lr": 2}}, "group.eps, group.inner.lr"),
        (dict.fromkeys("abcdef", 1), "group.a, group.b, group.c, group.d, 2 more"),
    ):
        with pytest.raises(UserError, match=rf"\(it differs in {differs}\)"):
            check_run(tmp_path / "nested", NestedRun(group=group | more))
    with pytest.raises(UserError, match="describes a run of kind 'train': expected 'audit'"):
        read_settings(tmp_path / "run" / "run.yaml", "audit")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.yaml").write_text("kind: train\nepochs: 3\n")  # of another program, alone
    for _ in range(2):
        with pytest.raises(UserError, match=r"run\.yaml was not written by gambeson: choose another --out"):
            open_run(tmp_path / "foreign", run, {})
        (tmp_path / "foreign" / "notes.txt").write_text("mine")
    write_json(tmp_path / "other" / "notes.json", {})
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_run(tmp_path / "other", run, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: {b: 1, c: 2, b: 3}", "b is given twice in line 1"),
        ("- 1", "holds a list: expected settings"),
        ("a: 2023-13-01", "is not valid YAML .*month must be in 1"),
        ("a: 0x_", "is not valid YAML"),
        ("a: " + "[" * 3000, "is not valid YAML .*nested too deeply"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_settings(tmp_path / "x.yaml", "train")
    with pytest.raises(UserError, match="does not exist: name a YAML file"):
        read_settings(Path(tmp_path / "none.yaml"), "train")


def test_draws_are_named_by_seed_and_path_and_leave_the_global_stream_alone():
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(seed, name, k) for seed in range(3) for name in "ab" for k in range(3)}) == 18
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(1, "x"):
        one = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1, "x"):
        assert torch.equal(one, torch.rand(2))


def test_a_safetensors_file_is_never_taken_for_a_pickle(tmp_path):
    """Its first byte is the low byte of a length, which can be any: 0x80 begins a pickle too."""
    firsts = set()
    for length in range(300):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"text": "x" * length})
        firsts.add((tmp_path / "x.safetensors").read_bytes()[0])
        tensors, about = load_tensors(tmp_path / "x.safetensors")
        assert len(about["text"]) == length
        assert tensors["a"] == 1
    assert 0x80 in firsts


def test_yaml_merges_and_refuses_only_what_is_written_twice():
    text = "base: &base {x: 1}\na: {inner: &mid {<<: *base, x: 2}}\ntop: {<<: *mid, y: 3}\nlist: [*base, {x: 1}]"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}
    for twice in ("a: 1\na: 1", "a: [{b: 1, b: 2}]", "a: &x {b: {c: 1, c: 2}}"):
        with pytest.raises(yaml.YAMLError, match="is given twice"):
            parse_yaml(twice)


FOREIGN = {
    "an HTML page": '<!doctype html>\n<html lang="en-GB">\n<title>my blog</title>',
    "SARIF": '{\n  "$schema": "https://example.org/eslint.json",\n  "runs": [\n    {\n      "tool": {}}]}',
    "JUnit XML": "<?xml version='1.0' encoding='utf-8'?>\n<testsuites name=\"pytest\">",
    "a model card": "---\nmodel-index:\n- name: mine\nlicense: mit\n---\n\n## Adversarial robustness\n\nnone\n",
    "the CSV of a study": "data,model,price\n1,2,3\n",
    "the Parquet of a study": "PAR1 of somebody else PAR1",
    "the summary of a study": '{\n  "cells": [],\n  "nbformat": 4\n}\n',
    "the results of a study's cells": gzip.compress(b"a backup"),
}


def test_a_file_of_the_same_format_is_kept(tmp_path):
    assert FOREIGN.keys() == KINDS.keys()
    for kind, content in FOREIGN.items():
        file = tmp_path / "mine"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=f"exists and is not {kind} that gambeson wrote: name another file"):
            replaceable(file, kind)
        file.write_bytes(b"")
        replaceable(file, kind)


@pytest.mark.parametrize("work", ["train", "audit", "harden"])
def test_a_call_writes_into_no_folder_with_other_files(work, tmp_path, digits, trained):
    calls = {
        "train": lambda out: gb.train(copy.deepcopy(trained), digits, gb.defenses.Standard(), epochs=1, out=out),
        "audit": lambda out: gb.audit(trained, digits, "glance", out),
        "harden": lambda out: gb.harden(trained, digits, out=out, suite="glance"),
    }
    kinds = calls.keys() - {work}
    for name in (
        "notes.txt",
        "timing.json",
        "model.safetensors",
        "result.json",
        *(f"run.yaml of {one}" for one in kinds),
    ):
        folder = tmp_path / name
        folder.mkdir()
        file = folder / name.partition(" ")[0]
        file.write_text(yaml.safe_dump({"kind": name.rpartition(" ")[2], "environment": {}, "finished": True}))
        before = file.read_bytes()
        with pytest.raises(UserError, match="is not empty and holds no run of this kind: choose another --out"):
            calls[work](folder)
        assert [path.read_bytes() for path in folder.rglob("*")] == [before]


def test_damaged_documents_are_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON .*nested too deeply"):
        read_json(tmp_path / "a.json")
    (tmp_path / "run.yaml").write_text("kind: {train: 1}\n")
    with pytest.raises(UserError, match=r"describes a run of kind \{'train': 1\}: expected 'train'"):
        read_settings(tmp_path / "run.yaml", "train")
    for document in ("3", "{", "[" * 100_000):
        write_bytes(tmp_path / "m.safetensors", save({"a": torch.ones(2)}, {"gambeson": document}))
        with pytest.raises(UserError, match=r"the document 'gambeson' in .*m\.safetensors .*: expected a JSON object"):
            load_tensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        write_json(tmp_path / "a.json", [])
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    label = "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"
    (tmp_path / "run.yaml").write_text(f"kind: train\nlabel: {label}\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(f'["{label}"]', encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from gambeson.base import read_json, read_settings; "
        "out = Path(sys.argv[1]); print(ascii([read_settings(out / 'run.yaml', 'train'), read_json(out / 'a.json')]))"
    )
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.count(ascii(label)) == 2
    for file in Path(gb.__file__).parent.rglob("*.py"):
        for call in re.findall(r"(?:read_text|\.write_text)\([^()]*\)", file.read_text(encoding="utf-8")):
            assert "utf-8" in call, f"{file}: {call}"
