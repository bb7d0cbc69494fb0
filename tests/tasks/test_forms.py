"""Every function that takes images or labels takes the same forms of them, gives the same result, or refuses."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from operator import methodcaller
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

import gambeson as gb
from gambeson import UserError
from gambeson.attacks.registry import ATTACKS
from gambeson.auditing import Suite
from gambeson.base import Config
from gambeson.base.errors import DataWarning
from gambeson.tasks import Classification, Segmentation, as_pair

COUNT, CLASSES, SHAPE = 24, 3, (3, 8, 8)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = draws(COUNT, *SHAPE)
LABELS = torch.arange(COUNT) % CLASSES
MAPS = (draws(COUNT, 8, 8, seed=1) * CLASSES).long()


@functools.cache
def net(maps: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head: list[nn.Module] = [nn.Conv2d(4, CLASSES, 1)] if maps else [nn.Flatten(), nn.Linear(4 * 64, CLASSES)]
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *head).eval()


CHEAP: dict[str, Any] = {
    "steps": 2, "queries": 9, "searches": 1, "restarts": 1, "patterns": 2, "images": 8, "finalists": 1, "passes": 1,
    "probe_starts": 0, "inner_steps": 2, "iterations": 2, "batch_size": 8, "pairs": 2, "population": 4,
    "generations": 1, "rounds": 1, "search": "random", "targets": None, "probe_steps": None,
}  # fmt: skip


def cheap(name: str) -> Any:
    known = ATTACKS.get(name).settings
    wanted = {key: value for key, value in CHEAP.items() if key in known and known[key].type != "1"}
    if name == "auto-pgd-targeted":
        wanted |= {"targets": 2}
    if name in ("gabor", "perlin"):
        wanted |= {"patterns": 4}
    if "generations" in known:
        wanted |= {"queries": 20}
    return gb.attacks.create(name, **wanted, **({"eps": 0.1} if "eps" in known else {}))


def pair(call: Callable[[nn.Module, tuple[Any, Any]], Any]) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda model, x, y: call(model, (x, y))


@functools.cache
def uap() -> gb.attacks.UniversalPerturbation:
    data = (draws(40, *SHAPE, seed=5), torch.arange(40) % CLASSES)
    return cheap("stochastic-pgd").craft(net(), data)


def trained(model: nn.Module, data: tuple[Any, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
        return gb.train(fresh, data, gb.defenses.Standard(), epochs=1, batch_size=4)


SUITE = Suite(
    eps=(0.1,), universal_steps=2, universal_restarts=1, universal_batch=4, pgd_steps=1, pgd_restarts=1, suite_images=0,
    sample=4, queries=0, surrogate="none", jacobian_backwards=0, universal_queries=300, eps_uni_runs=0,
    eps_adv=False, rescoring=False, edits=(),
)  # fmt: skip

Function = Callable[[nn.Module, Any, Any], Any]


def attack(name: str) -> Function:
    return lambda model, x, y: cheap(name)(model, x, y)


def craft(name: str) -> Function:
    return lambda model, x, y: cheap(name).craft(model, (x, y))


attack_functions: dict[str, Function] = {name: attack(name) for name in gb.attacks.names("image")} | {
    "subspace": lambda model, x, y: gb.analysis.adversarial_subspace(model, x, y, eps=0.1, permutations=1),
    "loss surface": lambda model, x, y: gb.analysis.loss_surface(model, x, y, points=3),
}
data_functions: dict[str, Function] = {name: craft(name) for name in gb.attacks.names("universal")} | {
    "accuracy": pair(gb.evaluation.accuracy),
    "universal evasion": pair(lambda model, data: gb.evaluation.universal_evasion(model, data, uap())),
    "fooling rate": pair(lambda model, data: gb.evaluation.fooling_rate(model, data, uap())),
    "accuracy under": pair(lambda model, data: gb.evaluation.accuracy_under(model, data, cheap("pgd"), 0)),
    "suite": pair(lambda model, data: gb.evaluation.run_suite(model, data, {"pgd": cheap("pgd")}).images),
    "under": pair(lambda model, data: gb.evaluation.outcome_under(model, data, uap().delta)),
    "controls": pair(lambda model, data: gb.evaluation.control_rates(model, data, uap().ball, 0)),
    "strongest": pair(lambda model, data: gb.evaluation.strongest(model, data, uap())[1]),
    "eps_adv": pair(lambda model, data: gb.evaluation.eps_adv(model, data, cheap("pgd"), tolerance=0.5)),
    "eps_uni": pair(
        lambda model, data: gb.evaluation.eps_uni(model, data, cheap("stochastic-pgd"), tolerance=0.5, controls=())
    ),
    "train": pair(trained),
    "audit": pair(lambda model, data: gb.audit(model, data, suite=SUITE).results.clean),
    "jacobian norms": pair(gb.analysis.jacobian_norms),
    "pair sharing": pair(lambda model, data: gb.analysis.pair_sharing(model, data, pairs=4)),
    "sharing factor": pair(gb.analysis.sharing_factor),
    "gradient sharing": pair(gb.analysis.gradient_sharing),
    "gradient statistics": pair(gb.analysis.gradient_statistics),
    "stacked gram": pair(gb.analysis.stacked_gram),
    "stacked norm": pair(lambda model, data: gb.analysis.stacked_norm(model, data, steps=2)),
    "stacked spectrum": pair(gb.analysis.stacked_spectrum),
    "alignment": pair(lambda model, data: gb.analysis.universal_alignment([model], data)),
    "bound table": pair(lambda model, data: gb.analysis.bound_table(model, data, [uap().delta])),
    "linearise": pair(lambda model, data: gb.analysis.linearise(model, data, uap().delta)),
}
bare_functions: dict[str, Function] = {
    "load": pair(lambda _, data: gb.data.load(data).train),
    "split": lambda _, x, y: gb.data.Split("x", x, y),
    "as_split": pair(lambda _, data: gb.data.as_split(data)),
}
image_functions: dict[str, Function] = {
    "apply": lambda _, x, __: uap().apply(x),
    "jacobian": lambda model, x, _: gb.analysis.batch_jacobian(model, x),
    "frobenius": lambda model, x, _: gb.analysis.estimate_frobenius(model, x, projections=2),
    "diversity": lambda model, x, _: gb.analysis.diversity_gain([model, model], x),
}
WITH_MODEL = attack_functions | data_functions
EVERY = WITH_MODEL | bare_functions | image_functions
SLOW = {"audit", "eps_adv", "eps_uni", "train"}
MAP_FUNCTIONS = ("pgd", "auto-pgd", "fgsm", "stochastic-pgd", "accuracy", "fooling rate", "load", "split")


def plain(found: Any) -> Any:
    """A result as lists and numbers, to compare."""
    if isinstance(found, torch.Tensor):
        return found.tolist()
    if isinstance(found, gb.data.Split):
        return [found.take(slice(None))[0].tolist(), found.labels.tolist(), found.classes, found.ignore_index]
    if isinstance(found, gb.attacks.UniversalPerturbation):
        return (found.pattern if isinstance(found, gb.attacks.AdversarialPatch) else found.delta).tolist()
    if isinstance(found, Config):
        return {key: value for key, value in found.plain().items() if key != "seconds"}
    if is_dataclass(found) and not isinstance(found, type):
        return plain(asdict(found))
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    return [plain(one) for one in found] if isinstance(found, list | tuple) else found


@functools.cache
def usual(name: str, maps: bool = False) -> Any:
    return plain(EVERY[name](net(maps), IMAGES.clone(), MAPS if maps else LABELS))


def big_endian(values: torch.Tensor) -> np.ndarray:
    return values.numpy().astype(values.numpy().dtype.newbyteorder(">"))


def strided(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values, values], -1)[..., 0]


SAME_LABELS: dict[str, Callable[[torch.Tensor], Any]] = {
    **{str(kind): methodcaller("to", kind) for kind in (torch.uint8, torch.int8, torch.int16, torch.int32)},
    **{str(kind): methodcaller("to", kind) for kind in (torch.float16, torch.float32, torch.float64)},
    "uint16": lambda y: y.numpy().astype(np.uint16),
    "torch uint32": lambda y: y.to(torch.uint32),
    "big-endian": big_endian,
    "list": torch.Tensor.tolist,
    "list of tensors": lambda y: list(y.unbind()),
    "backwards": lambda y: y.numpy()[::-1].copy()[::-1],
    "strided": strided,
    "column": lambda y: y[:, None],
    "float column": lambda y: y[:, None].double().numpy(),
    "one-hot": lambda y: nn.functional.one_hot(y, CLASSES).movedim(-1, 1),
    "one-hot, floats": lambda y: nn.functional.one_hot(y, CLASSES).movedim(-1, 1).float(),
    "one-hot, booleans": lambda y: nn.functional.one_hot(y, CLASSES).movedim(-1, 1).bool().numpy(),
    "one-hot of more classes": lambda y: nn.functional.one_hot(y, 7).movedim(-1, 1),
}
SAME_MAPS = SAME_LABELS | {
    "channels last": lambda y: y[..., None],
    "one-hot last": lambda y: nn.functional.one_hot(y, CLASSES).numpy(),
}
SAME_IMAGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": torch.Tensor.numpy,
    "list of tensors": lambda x: list(x.unbind()),
    "list of arrays": lambda x: [one.numpy() for one in x],
    "strided": strided,
    "channels last in memory": lambda x: x.contiguous(memory_format=torch.channels_last),
    "backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "big-endian": big_endian,
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "with a graph": lambda x: x.requires_grad_() * 1.0,
    "out by rounding": lambda x: x.where(x < x.max(), x.max()),
}
WRONG_LABELS: dict[str, Callable[[torch.Tensor], Any]] = {
    "too few": lambda y: y[:-1],
    "too many": lambda y: torch.cat([y, y[:1]]),
    "none": lambda y: y[:0],
    "one number": lambda y: y.flatten()[0],
    "None": lambda y: None,
    "text": lambda y: [f"class {k}" for k in range(len(y))],
    "objects": lambda y: [{} for _ in y],
    "ragged": lambda y: [[0], *[[0, 1]] * (len(y) - 1)],
    "row": lambda y: y[None],
    "halves": lambda y: y + 0.5,
    "NaN": lambda y: torch.where(y == 0, torch.nan, y.double()),
    "infinite": lambda y: torch.where(y == 0, torch.inf, y.double()),
    "complex": lambda y: y + 0j,
    "probabilities": lambda y: torch.full((len(y), CLASSES, *y.shape[1:]), 1 / CLASSES),
    "several classes": lambda y: torch.ones(len(y), CLASSES, *y.shape[1:], dtype=torch.long),
    "no class": lambda y: torch.zeros(len(y), CLASSES, *y.shape[1:], dtype=torch.long),
    "negative": lambda y: y - 1,
    "lowest integer": lambda y: torch.full_like(y, torch.iinfo(torch.int64).min),
    "five axes": lambda y: y.reshape(len(y), *[1] * (4 - y.ndim + 1), *y.shape[1:]),
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda y: y.to("meta"),
    "maps of another size": lambda y: torch.zeros(len(y), 5, 8, dtype=torch.long),
}
BEYOND: dict[str, Callable[[torch.Tensor], Any]] = {
    "from 1": lambda y: y + 1,
    "one beyond": lambda y: torch.where(y.flatten().cumsum(0).view_as(y) == 1, CLASSES, y),
    "one-hot beyond": lambda y: nn.functional.one_hot(y + 5, 10).movedim(-1, 1),
    "huge": lambda y: y * 10**9,
    "unlabelled": lambda y: torch.where(y == 0, 255, y),
}
WRONG_IMAGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "too few": lambda x: x[:-1],
    "none": lambda x: x[:0],
    "NaN": lambda x: x.where(x < x.max(), torch.nan),
    "infinite": lambda x: x.where(x < x.max(), torch.inf),
    "up to 255": lambda x: x * 255,
    "normalised": lambda x: x * 2 - 1,
    "integers": lambda x: (x * 255).long(),
    "booleans": lambda x: x > 0.5,
    "complex": lambda x: x + 0j,
    "one image": lambda x: x[0],
    "five axes": lambda x: x[None],
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "no channel": lambda x: x[:, :0],
    "no pixel": lambda x: x[:, :, :0],
    "None": lambda x: None,
    "path": lambda x: "cats.png",
    "ragged": lambda x: [x[0], x[1, :, :4], *x[2:]],
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda x: x.to("meta"),
    "float8": lambda x: x.to(torch.float8_e5m2),
}


def told(call: Callable[[], Any]) -> str:
    """The sentence that a call is refused with; anything but a refusal is a failure."""
    with pytest.raises(UserError) as found:
        call()
    sentence = str(found.value)
    assert "\n" not in sentence
    assert ":" in sentence
    return sentence


def forms(kinds: dict[str, Any], name: str) -> Any:
    """Some forms for each function, others for the next, since one door reads them all."""
    step = 9 if name in SLOW else 1 if name in ("pgd", "split") else 5
    return sorted(kinds)[list(EVERY).index(name) % min(step, len(kinds)) :: step]


@pytest.mark.parametrize("name", [*WITH_MODEL, *bare_functions])
def test_labels_of_every_usual_form_give_the_same_result(name):
    for form in forms(SAME_LABELS, name):
        assert plain(EVERY[name](net(), IMAGES.clone(), SAME_LABELS[form](LABELS))) == usual(name), form


@pytest.mark.parametrize("name", MAP_FUNCTIONS)
def test_label_maps_of_every_usual_form_give_the_same_result(name):
    for form, made in SAME_MAPS.items():
        assert plain(EVERY[name](net(maps=True), IMAGES.clone(), made(MAPS))) == usual(name, maps=True), form


@pytest.mark.parametrize("name", EVERY)
def test_images_of_every_usual_form_give_the_same_result(name):
    for form in forms(SAME_IMAGES, name):
        assert plain(EVERY[name](net(), SAME_IMAGES[form](IMAGES.clone()), LABELS)) == usual(name), form


@pytest.mark.parametrize("name", [*WITH_MODEL, *bare_functions])
def test_labels_that_are_none_are_refused(name):
    for form in forms(WRONG_LABELS, name):
        told(lambda form=form: EVERY[name](net(), IMAGES, WRONG_LABELS[form](LABELS)))


@pytest.mark.parametrize("name", MAP_FUNCTIONS)
def test_label_maps_that_are_none_are_refused(name):
    for form in sorted(WRONG_LABELS.keys() - {"negative"}):  # -1 is a usual mark of unlabelled pixels
        told(lambda form=form: EVERY[name](net(maps=True), IMAGES, WRONG_LABELS[form](MAPS)))


@pytest.mark.parametrize("name", WITH_MODEL)
def test_labels_beyond_the_classes_of_the_model_are_refused(name):
    for form in forms(BEYOND, name):
        sentence = told(lambda form=form: EVERY[name](net(), IMAGES, BEYOND[form](LABELS)))
        assert "class" in sentence
        assert ("start at 1" in sentence) == (form == "from 1")


@pytest.mark.parametrize("name", EVERY)
def test_images_that_are_none_are_refused(name):
    for form in forms(WRONG_IMAGES, name):
        if not (name in image_functions and form in ("too few", "none")):
            told(lambda form=form: EVERY[name](net(), WRONG_IMAGES[form](IMAGES.clone()), LABELS))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*attack_functions, *image_functions])
def test_images_of_every_float_type_are_served(name, kind):
    found = EVERY[name](net(), IMAGES.to(kind), LABELS)
    if name in gb.attacks.names("image"):
        assert (found.dtype, found.shape) == (kind, IMAGES.shape)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


SMALL = st.integers(0, 4)
ARRAYS = arrays.arrays(
    st.one_of(
        arrays.boolean_dtypes(), arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.floating_dtypes(),
        arrays.complex_number_dtypes(), arrays.datetime64_dtypes(), arrays.unicode_string_dtypes(),
    ),
    st.lists(SMALL, max_size=5).map(tuple),
)  # fmt: skip


@given(images=ARRAYS, labels=ARRAYS, task=st.sampled_from([None, Classification(), Segmentation(ignore_index=2)]))
def test_any_arrays_are_read_or_refused(images, labels, task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x, y, found = as_pair(images, labels, task)
        except UserError:
            return
    assert x.ndim == 4
    assert x.dtype == torch.uint8 or bool(((x >= 0) & (x <= 1)).all())
    assert y.dtype == torch.int64
    assert len(x) == len(y)
    assert (tuple(y.shape[1:]) == ()) if found.per_image_label else (y.shape[1:] == x.shape[2:])


@example(labels=np.zeros(0, bool), name="subspace")
@given(labels=ARRAYS, name=st.sampled_from(sorted(WITH_MODEL.keys() - SLOW)))
def test_any_labels_of_images_are_read_or_refused(labels, name):
    count = len(labels) if labels.ndim else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(UserError):
            EVERY[name](net(), IMAGES[:count], labels)


def test_classes_of_0_and_255_are_two_and_levels_of_grey_are_said():
    images = torch.rand(40, 1, 4, 4)
    with pytest.warns(DataWarning, match="labels are 0 and 255 only: 255 is read as class 1"):
        split = gb.data.Split("s", images, torch.arange(40) % 2 * 255)
    assert split.classes == ("0", "1")
    assert split.labels.tolist() == [0, 1] * 20
    with pytest.warns(DataWarning, match=r"multiples of 85: they make 256 classes, of which 4 have images.*// 85"):
        gb.data.Split("s", images, torch.arange(40) % 4 * 85)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gb.data.Split("s", images, torch.arange(40) % 4 * 3)
