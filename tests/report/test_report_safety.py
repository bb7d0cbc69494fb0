"""The page is closed: nothing from a file becomes markup, nothing is fetched, pictures are true."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_audits import three, write_audit
from report_reader import Reader, Written

from gambeson import report
from gambeson.base import load_tensors
from gambeson.report.pictures import reach, signed

HOSTILE = "<script>alert(1)</script>&<img src=x onerror=alert(2)>"


def pixels(source: str) -> np.ndarray:
    assert source.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))


def test_nothing_outside_is_named(written: Written) -> None:
    assert written.seen.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in written.seen.addresses)
    style = re.findall(r"<style>(.*?)</style>", written.html, re.S)
    assert len(style) == 1
    assert not re.search(r"@import|url\(|https?:", style[0])
    assert "default-src 'none'" in written.html


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    classes = [f"{HOSTILE}{k}" for k in range(10)]
    write_audit(tmp_path / "a", label=HOSTILE, classes=classes)
    html = report.write([tmp_path / "a"], tmp_path / "page.html", title=HOSTILE).read_text()
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "\\u003cscript" not in html  # plotly reads names as HTML, so they are escaped before they are JSON
    assert HOSTILE in Reader(html).text


@pytest.mark.parametrize("colour", [False, True])
def test_pictures_are_the_signed_scaled_delta(tmp_path: Path, colour: bool) -> None:
    folders, results = three(tmp_path, colour=colour)
    seen = Reader(report.write(folders, tmp_path / "page.html").read_text())
    for folder, result in zip(folders, results, strict=True):
        for point in result.universal:
            delta = load_tensors(folder / point.file)[0]["delta"][0].numpy()
            wanted = np.rint((0.5 + delta / (2 * point.eps)) * 255).clip(0, 255).astype(np.uint8)
            size = f"{round(255 * point.eps)}/255" if colour else f"{point.eps:.4g}"
            scale = f"{'each channel: ' if colour else ''}black -{size}, grey 0, white +{size}"
            alt = f"Universal perturbation for {result.subject.label} at eps {size}, {scale}"
            found = pixels(seen.pictures[alt])
            np.testing.assert_array_equal(found, wanted.transpose(1, 2, 0) if colour else wanted[0])
            assert scale in seen.text


def test_scale_of_a_picture() -> None:
    delta = torch.tensor([-0.2, 0.0, 0.1, 0.2]).view(1, 2, 2)
    assert signed(delta, reach(delta, 0.2, "inf")).flatten().tolist() == [0, 128, 191, 255]
    assert reach(delta, 3.0, "2") == pytest.approx(0.2)
    assert signed(torch.zeros(1, 2, 2), 0.0).unique().tolist() == [128]


def test_examples_show_the_stored_images_and_answers(written: Written) -> None:
    tensors = load_tensors(written.folders[2] / "examples.safetensors")[0]
    strip = written.html.split('<div class="strip">')[3].split("</section>")[0]
    sources = re.findall(r'src="(data:[^"]+)"', strip)
    wanted = [image for pair in zip(tensors["images"], tensors["perturbed"], strict=True) for image in pair]
    assert len(sources) == len(wanted)
    for source, image in zip(sources, wanted, strict=True):
        np.testing.assert_array_equal(pixels(source), image[0].numpy())
    answers = torch.stack([tensors["predictions"], tensors["perturbed_predictions"]], 1).flatten().tolist()
    truths = tensors["labels"].repeat_interleave(2).tolist()
    said = re.findall(r'class="said (right|wrong)">.*?aria-hidden="true">(.)</span> (.*?)</span>', strip)
    marks = [("right", "✓") if a == t else ("wrong", "✗") for a, t in zip(answers, truths, strict=True)]
    assert said == [(*mark, f"digit {a}") for mark, a in zip(marks, answers, strict=True)]
