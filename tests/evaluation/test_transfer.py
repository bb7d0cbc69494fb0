"""Transfer tables: the diagonal is the white box, and what is crafted elsewhere is scored elsewhere."""

import pytest
import torch

import gambeson as gb
from gambeson import UserError
from gambeson.attacks import FGSM
from gambeson.cli.app import run as gambeson
from gambeson.evaluation.transfer import TransferRun, perturbed, run_transfer
from gambeson.report import write_transfer


@pytest.fixture(scope="module")
def files(trained, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    other = gb.models.create("mnist-d", digits)
    gb.train(other, digits, gb.defenses.Standard(), epochs=6, seed=3)
    gb.models.save(trained, folder / "one.safetensors")
    gb.models.save(other, folder / "two.safetensors")
    return [str(folder / "one.safetensors"), str(folder / "two.safetensors")]


def test_errors_are_those_of_the_examples_themselves(files, trained, digits, tmp_path):
    run = TransferRun(models=files, data="digits", attacks=("fgsm",), eps=0.1, images=200)
    result = run_transfer(run, tmp_path / "t")
    assert result.labels == ["one", "two"]
    x, y = digits.test.sample(200).take(slice(None), "cpu")
    moved = FGSM(eps=0.1)(trained, x, y)
    other = gb.models.load(files[1])
    wrong = [float((model(moved).argmax(1) != y).float().mean()) for model in (trained, other)]
    (table,) = result.tables
    assert [rate.value for rate in table.errors[0]] == pytest.approx(wrong, abs=0.006)  # the folded copy crafts
    assert table.errors[0][0].value > result.clean[0].value + 0.2  # the white box
    assert table.worst[1] == table.errors[0][1]
    assert run_transfer(run, tmp_path / "t") == result  # a finished run is only read
    page = write_transfer(result, tmp_path / "t" / "transfer.html").read_text()
    assert f"{100 * table.errors[0][1].value:.1f}" in page
    assert "https://" not in page


def test_command_line(files, tmp_path, capsys):
    out = str(tmp_path / "t")
    command = ["transfer", *files, "--data", "digits", "--attacks", "fgsm,pgd", "--eps", "0.1", "--images", "50"]
    assert gambeson([*command, "--out", out]) == 0
    assert (tmp_path / "t" / "transfer.html").is_file()
    assert gambeson(["transfer", files[0], "--eps", "0.1"]) == 2
    assert "two models or more" in capsys.readouterr().err
    assert gambeson([*command[:-2], "--attacks", "fsgm", "--out", out]) == 2
    assert "did you mean fgsm" in capsys.readouterr().err


def test_a_black_box_is_only_a_target(files, tmp_path):
    script = tmp_path / "box.py"
    script.write_text("def scores(images):\n    return images.flatten(1)[:, :10]\n")
    run = TransferRun(
        models=(files[0], f"function:{script}:scores"), data="digits", attacks=("fgsm",), eps=0.1, images=50
    )
    (table,) = run_transfer(run, tmp_path / "t").tables
    assert table.errors[1] == [None, None]
    assert table.errors[0][1] is not None
    with pytest.raises(UserError, match="models"):
        TransferRun(models=(files[0],), eps=0.1)


def test_an_attack_that_draws_from_torchs_own_generator_repeats(trained, digits):
    class Noise:
        eps, norm = 0.3, "inf"

        def __call__(self, model, x, y, *, seed=0, task=None):
            return (x + self.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)

    some = digits.test.sample(20)
    found = [perturbed(trained, some, Noise(), 0, "noise").images for _ in range(2)]
    assert torch.equal(*found)
    assert not torch.equal(perturbed(trained, some, Noise(), 1, "noise").images, found[0])
