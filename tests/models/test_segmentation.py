"""Segmentation models: one row of logits per pixel, at every size, from every source."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gambeson as gb
from gambeson import models
from gambeson.attacks import PGD
from gambeson.base import UserError
from gambeson.defenses import Standard
from gambeson.models.black_box.local import FunctionModel
from gambeson.models.export import export
from gambeson.models.outputs import at_image_size
from gambeson.models.program import load_program
from gambeson.victim import FastPath, Victim
from tests.conftest import full

# name, channels, size
CASES = [
    ("unet-small", 3, (64, 64)),
    ("unet-small", 1, (19, 35)),
    ("unet-smallx0.5", 3, (16, 16)),
    ("fcn8sx0.02", 3, (33, 64)),
    ("fcn8s-bnx0.02", 1, (64, 50)),
    ("torchvision:lraspp_mobilenet_v3_large", 3, (33, 64)),
    ("torchvision:deeplabv3_mobilenet_v3_large", 1, (32, 32)),
]
MAPS = torch.arange(2 * 64 * 64).view(2, 64, 64) // 5 % 7


@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_logits_of_every_pixel_gradients_and_independence_of_the_batch(name, channels, size):
    model = models.create(name, in_channels=channels, classes=7, image_size=size, mean=0.4, std=0.3, seed=0)
    drawn(model)
    pixels = torch.rand(2, channels, *size)
    logits = model(pixels)
    assert logits.shape == (2, 7, *size)
    F.cross_entropy(logits, MAPS[:, : size[0], : size[1]]).backward()
    silent = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []
    model.eval()
    with torch.no_grad():
        together = model(pixels)
        alone = torch.cat([model(pixels[:1]), model(pixels[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3 * float(together.abs().max()))
    assert not torch.equal(together[0], together[1])


def drawn(model):
    """Draw what starts at zero, so that every weight has a gradient at once."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def test_a_u_net_s_weights_by_hand_and_its_smallest_size():
    widths, channels, classes = [8, 16, 32, 64, 128], 3, 7
    total = 0
    for before, after in zip([channels, *widths], widths, strict=False):
        total += 9 * (before + after) * after + 4 * after
    for below, after in zip(widths[1:], widths, strict=False):
        total += below * after + after + 9 * 3 * after * after + 4 * after
    assert models.count_parameters(models.create("unet-small", in_channels=3, classes=7, image_size=16)) == (
        total + widths[0] * classes + classes
    )
    with pytest.raises(UserError, match=r"unet-small cannot take 15x64 images: the smallest it takes are 16x16"):
        models.create("unet-small", in_channels=3, classes=7, image_size=(15, 64))


def test_fcn_8s_starts_as_the_sum_of_bilinearly_upsampled_scores():
    net = models.create("fcn8sx0.1", in_channels=3, classes=2, image_size=192, seed=0).body.eval()
    x, inner = torch.rand(1, 3, 192, 192), slice(64, -64)  # at borders transposed convolutions lack neighbours
    with torch.no_grad():
        assert not net(x).any()
        pools, value = [], x
        for stage in net.stages:
            value = stage(value)
            pools.append(value)
        whole = 0
        for doublings, source in enumerate((pools[2], pools[3], net.head(value))):
            net.scores[doublings].weight[0, 0] = 1.0
            for factor in (*[2.0] * doublings, 8.0):
                source = F.interpolate(source[:, :1], scale_factor=factor, mode="bilinear", align_corners=False)
            assert source[..., inner, inner].any()
            whole = whole + source
            torch.testing.assert_close(net(x)[:, :1, inner, inner], whole[..., inner, inner])
        assert not net(x)[:, 1].any()


def test_the_paper_s_network_has_134_million_weights():
    with torch.device("meta"):
        body = gb.models.fcn.FCN8s(3, 21, (512, 512))
    convolutions = sum((9 * a + 1) * b for a, b in PAIRS)
    head = 49 * 512 * 4096 + 4096 + 4096 * 4096 + 4096
    scores = 21 * (256 + 512 + 4096 + 3)
    assert sum(value.numel() for value in body.parameters()) == convolutions + head + scores + 2 * 21 * 21 * 16


PAIRS = [
    *((3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)),
    *((256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)),
]


@pytest.mark.parametrize(
    ("grid", "size", "up"),
    [
        ((16, 16), (64, 64), True),
        ((17, 9), (65, 33), True),  # rounded up
        ((16, 8), (65, 33), True),  # rounded down
        ((1, 2), (32, 64), True),
        ((60, 60), (64, 64), False),  # what unpadded convolutions leave
        ((16, 32), (64, 64), False),
        ((128, 128), (64, 64), False),
        ((1, 1), (64, 64), False),
        ((64, 64), (64, 64), False),
    ],
)
def test_only_coarser_grids_are_upsampled(grid, size, up):
    logits, images = torch.randn(2, 3, *grid), torch.rand(2, 1, *size)
    found = at_image_size(logits, images)
    if not up:
        assert found is logits
        return
    assert torch.equal(found, F.interpolate(logits, size, mode="bilinear", align_corners=False))
    assert at_image_size(logits.bfloat16(), images).dtype == torch.float32


def test_logits_of_pixels_between_two_grid_points_by_hand():
    """A step from 0 to 1 between two cells of four pixels: the pixel centres lie at 1/8, 3/8, ... of the way."""
    row = at_image_size(torch.tensor([[[[0.0, 1.0]]]]), torch.rand(1, 3, 4, 8))[0, 0, 2]
    assert row.tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


class Coarse(nn.Module):
    """A linear net of a quarter of the resolution; its answer as a tensor or in a mapping."""

    def __init__(self, key=None, stride=4):
        super().__init__()
        self.conv, self.key = nn.Conv2d(1, 3, stride, stride=stride), key

    def forward(self, x):
        return self.conv(x) if self.key is None else {self.key: self.conv(x), "aux": x}


@pytest.mark.parametrize("key", [None, "out", "logits"])
def test_attacks_scores_training_and_exports_see_the_same_logits(key, tmp_path):
    torch.manual_seed(0)
    bare = Coarse(key)
    wrapped = models.as_logits(bare, key or "logits")
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40 * 64).view(40, 8, 8) // 3 % 3
    right = F.interpolate(bare.conv(x), (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(wrapped(x), right)
    with Victim(bare) as victim:
        assert victim.inspect(x).shape == (8, 3, 8, 8)
        assert torch.equal(victim(x), right)
        assert torch.equal(victim.forward_original(x), right)
    for model in (bare, wrapped):
        adv = PGD(eps=0.1, steps=2)(model, x[:4], y[:4])
        with torch.no_grad():
            clean, hit = (F.cross_entropy(wrapped(z), y[:4]) for z in (x[:4], adv))
        assert float(hit) > float(clean) + 1e-3
        assert gb.evaluation.accuracy(model, (x, y)).value == pytest.approx(
            float((right.argmax(1) == y).float().mean())
        )
    data = gb.data.Dataset.of((x, y)) if hasattr(gb.data.Dataset, "of") else (x, y)
    with pytest.raises(UserError, match=r"coarser grid.*gb\.models\.as_logits\(model, KEY\)"):
        gb.train(bare, data, gb.defenses.create("standard"), epochs=1)
    gb.train(wrapped, data, gb.defenses.create("standard"), epochs=1, batch_size=8, seed=0)
    export(wrapped, tmp_path / "m.pt2", "torch-export", example=x[:1])
    program = load_program(tmp_path / "m.pt2", 1, 3, (8, 8), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(program(x[:5]), wrapped(x[:5]))


def test_bad_outputs_are_refused_by_name(tmp_path):
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    with pytest.raises(UserError, match=r"returned dict with the keys maps, aux: expected.*`logits` or `out`"):
        PGD(eps=0.1)(Coarse("maps"), x, y)
    with pytest.raises(UserError, match=r"shape \(3, 7, 7\) per image, but the labels have shape \(4, 8, 8\)"):
        PGD(eps=0.1)(nn.Conv2d(1, 3, 2), x, y)
    with pytest.raises(UserError, match="label maps of 4x4 pixels came with images of 8x8"):
        PGD(eps=0.1)(Coarse(), x, y[:, ::2, ::2])
    file = tmp_path / "nets.py"
    file.write_text(
        "import torch\n\n\nclass Net(torch.nn.Conv2d):\n"
        "    key = None\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) if self.key is None else {self.key: super().forward(x)}\n\n\n"
        "def coarse():\n    return Net(1, 3, 4, stride=4)\n\n\n"
        "def maps():\n    net = coarse()\n    net.key = 'maps'\n    return net\n"
    )
    made = models.create(f"{file}:coarse", in_channels=1, classes=3, image_size=8)
    assert made(x).shape == (4, 3, 8, 8)
    with pytest.raises(UserError, match="returned dict with the keys maps"):
        models.create(f"{file}:maps", in_channels=1, classes=3, image_size=8)


def test_a_coarse_net_that_ends_with_a_sigmoid_is_told():
    model = nn.Sequential(nn.Conv2d(1, 3, 4, stride=4), nn.Sigmoid(), nn.Upsample(scale_factor=4, mode="bilinear"))
    for net in (model, model[:2]):
        with Victim(net) as victim, pytest.raises(UserError, match="by a sigmoid"):
            victim.inspect(torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize(
    "name", ["unet-small", "fcn8s-bnx0.05", "fcn8sx0.05", "torchvision:deeplabv3_mobilenet_v3_large"]
)
def test_the_fast_copy_equals_the_model_forward_and_backward(name):
    model = models.create(name, in_channels=3, classes=7, image_size=64, seed=0).eval()
    drawn(model)
    statistics(model)
    folded = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x, y = torch.rand(2, 3, 64, 64, requires_grad=True), MAPS
    found = {}
    for fast in (False, True):
        with Victim(model, fast=fast) as victim:
            logits = victim(x)
            loss = F.cross_entropy(logits, y)
            found[fast] = logits.detach(), victim.gradient(loss, x, 2)
            assert not fast or victim.notes == f"a copy with {folded} BatchNorms folded, channels last"
            assert (victim.forwards, victim.backwards) == (2, 2)
    for plain, folded_one in zip(found[False], found[True], strict=True):
        assert float((plain - folded_one).norm()) <= 1e-3 * float(plain.norm())
    with Victim(model, fast=FastPath(precision="bfloat16")) as victim:
        low = victim(x.detach())
    assert low.dtype == torch.float32
    assert float((low - found[False][0]).norm()) <= 0.1 * float(found[False][0].norm())


def statistics(model):
    """Statistics as after training: not those with which folding would change nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)


@pytest.mark.parametrize("name", ["unet-small", "fcn8s-bnx0.02", full("torchvision:lraspp_mobilenet_v3_large")])
def test_saved_loaded_and_exported_the_model_is_the_same(name, tmp_path):
    model = models.create(name, in_channels=3, classes=7, image_size=(48, 64), mean=0.4, std=0.3, seed=0).eval()
    drawn(model)
    x = torch.rand(3, 3, 48, 64)
    models.save(model, tmp_path / "m.safetensors")
    again = models.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(again.eval()(x), logits)
        assert (
            torch.equal(models.create(name, in_channels=3, classes=7, image_size=64, seed=1).eval()(x), logits) is False
        )
    export(model, tmp_path / "m.pt2", "torch-export")
    program = load_program(tmp_path / "m.pt2", 3, 7, (48, 64), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(program(x), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    export(model, tmp_path / "bare.safetensors", "safetensors")
    filled = models.create(name, in_channels=3, classes=7, image_size=(48, 64), mean=0.4, std=0.3, seed=1).eval()
    with torch.no_grad():
        assert not torch.allclose(filled(x), logits)
    models.load_weights(filled, tmp_path / "bare.safetensors")
    with torch.no_grad():
        assert torch.equal(filled(x), logits)


def test_torchvision_s_own_network_and_its_file_with_an_auxiliary_head(tmp_path):
    from torchvision.models import get_model

    own = get_model("fcn_resnet50", weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    model = models.create("torchvision:fcn_resnet50", in_channels=3, classes=5, image_size=32, seed=0).eval()
    assert not any("aux" in key for key in model.state_dict())
    torch.save(own.state_dict(), tmp_path / "fcn.pth")
    with pytest.warns(UserWarning, match=r"left out, as the model has no such part: aux_classifier\.0\.weight"):
        models.load_weights(model, tmp_path / "fcn.pth")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), own(x)["out"])
    export(model, tmp_path / "bare.safetensors", "safetensors")
    names = {key for key in own.state_dict() if not key.startswith("aux_classifier")}
    assert set(gb.base.load_tensors(tmp_path / "bare.safetensors")[0]) == names


def blobs(count):
    """Images of 16x16 whose left or right half is bright, and label maps that say where: 1 if left, 2 if right."""
    draw = torch.Generator().manual_seed(0)
    sides = torch.randint(0, 2, (count,), generator=draw)
    bright = (torch.arange(16).expand(count, 16, 16) // 8) == sides.view(-1, 1, 1)
    images = torch.rand(count, 3, 16, 16, generator=draw) * 0.4 + 0.5 * bright.unsqueeze(1)
    return images, bright * (1 + sides.view(-1, 1, 1))


def test_a_cut_training_resumes_and_its_folder_is_loaded(tmp_path, stand_in):

    class Stop(Standard):
        def terms(self):
            weight, term = super().terms()["clean"]

            def stopping(model, batch):
                if batch.epoch == 2:
                    raise KeyboardInterrupt
                return term(model, batch)

            return {"clean": (weight, stopping)}

    data, option = blobs(120), {"channels_last": True, "precision": "bfloat16"}

    def train(defense, out):
        model = models.create("unet-smallx0.5", in_channels=3, classes=3, image_size=16, seed=0)
        gb.train(model, data, defense, epochs=10, batch_size=12, lr=0.05, seed=4, out=tmp_path / out, **option)
        return model

    whole = train(Standard(), "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Stop(), "cut")
    resumed = train(Standard(), "cut")
    assert models.fingerprint(resumed) == models.fingerprint(whole)
    loaded = models.load(tmp_path / "cut")
    assert models.fingerprint(loaded) == models.fingerprint(whole)
    untrained = models.create("unet-smallx0.5", in_channels=3, classes=3, image_size=16, seed=0)
    assert gb.evaluation.accuracy(loaded, blobs(40)).value > 0.8 > 0.6 > gb.evaluation.accuracy(untrained, data).value


class Counted(nn.Module):
    """Counts the images that are sent forward, and whose gradient is taken, in it and in all copies of it."""

    forwards: ClassVar[int] = 0
    backwards: ClassVar[int] = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        Counted.forwards += len(x)
        logits = self.conv(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, gradient):
        Counted.backwards += len(gradient)


@pytest.mark.parametrize("target", [None, "class:1", "static:0", "hide:2"])
def test_a_step_of_a_universal_attack_costs_one_forward_and_backward_per_image(target):
    torch.manual_seed(0)
    model, images = Counted(), torch.rand(40, 3, 8, 8)
    labels = torch.arange(40 * 64).view(40, 8, 8) // 3 % 3
    costs = []
    for steps in (1, 3, 3 + 4):  # the first call also looks at the model, and copies it
        attack = gb.attacks.StochasticPGD(eps=0.1, probe_starts=0, steps=steps, batch_size=5, target=target)
        Counted.forwards = Counted.backwards = 0
        about = attack.craft(model, (images, labels)).about
        costs.append((Counted.forwards, Counted.backwards, about.forwards, about.backwards))
    assert [more - less for less, more in zip(*costs[1:], strict=True)] == [20, 20, 20, 20]


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def hub_folder(folder, model):
    model.save_pretrained(folder)
    prepared = {"image_mean": MEAN, "image_std": STD, "image_processor_type": "SegformerImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return models.create(f"transformers:{folder}", image_size=64).eval()


def test_segformer_of_transformers_is_upsampled(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    own = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(num_labels=5, decoder_hidden_size=8, **sizes)
    ).eval()
    model, x = hub_folder(tmp_path / "segformer", own), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        grid = own((x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)).logits
        assert grid.shape == (2, 5, 16, 16)
        torch.testing.assert_close(model(x), F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False))
    models.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "m.safetensors").eval()(x), model(x))


def test_mask2former_of_transformers_answers_per_pixel(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    stages = [f"stage{k}" for k in (1, 2, 3, 4)]
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages
    )
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_queries=6, num_labels=5, **widths, **layers)
    own = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    model, x = hub_folder(tmp_path / "mask2former", own), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        answer = own((x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1))
        masks = F.interpolate(answer.masks_queries_logits, (64, 64), mode="bilinear", align_corners=False).sigmoid()
        scores = sum(
            p[:, :-1, None, None] * mask[:, None]
            for p, mask in zip(answer.class_queries_logits.softmax(-1).unbind(1), masks.unbind(1), strict=True)
        )
        torch.testing.assert_close(model(x).exp(), scores)
        torch.testing.assert_close(model(x).softmax(1), scores / scores.sum(1, keepdim=True))
    pixels = x.clone().requires_grad_()
    assert torch.autograd.grad(model(pixels)[:, 0].sum(), pixels)[0].abs().sum() > 0


def test_architectures_and_encoders_of_segmentation_models_pytorch(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = models.create("smp:Unet/resnet18", in_channels=3, classes=4, image_size=64, seed=0).eval()
    own = smp.create_model("unet", "resnet18", encoder_weights=None, in_channels=3, classes=4).eval()
    own.load_state_dict(model.body.state_dict())
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(getattr(model.card, key)).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), own((x - mean) / std))
    models.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path / "m.safetensors").eval()(x), model(x))
    for name, words in (
        ("smp:Unot/resnet18", "'Unot': did you mean Unet"),
        ("smp:Unet", "names no encoder"),
        ("smp:Unet/resnet999", "encoder of segmentation_models_pytorch 'resnet999'"),
    ):
        with pytest.raises(UserError, match=words):
            models.create(name, in_channels=3, classes=4, image_size=64)


def test_a_black_box_answers_per_pixel():
    model, x = (
        models.create("unet-smallx0.5", in_channels=3, classes=4, image_size=16, seed=0).eval(),
        torch.rand(3, 3, 16, 16),
    )
    with torch.no_grad():
        box = FunctionModel(lambda images: model(images).softmax(1).numpy(), title="maps")
        torch.testing.assert_close(box(x).softmax(1), model(x).softmax(1))
        box = FunctionModel(lambda images: model(images)[:, :, 0], title="rows")
        with pytest.raises(UserError, match=r"3 images and returned shape \(3, 4, 16\): expected scores"):
            box(x)


def test_a_missing_package_is_named_with_its_extra():
    if find_spec("segmentation_models_pytorch") is not None:
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=r"segmentation_models_pytorch, which is not installed: pip.*gambeson\[smp\]"):
        models.create("smp:Unet/resnet18", in_channels=3, classes=4, image_size=64)


def test_an_onnx_file_answers_per_pixel(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from gambeson.models.black_box.local import OnnxModel

    model = models.create("unet-smallx0.5", in_channels=3, classes=4, image_size=(20, 33), seed=0).eval()
    export(model, tmp_path / "m.onnx", "onnx")
    x = torch.rand(3, 3, 20, 33)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(tmp_path / "m.onnx", classes=4)(x), model(x), rtol=1e-3, atol=1e-4)
