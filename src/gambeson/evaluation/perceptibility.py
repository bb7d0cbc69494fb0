"""How visible a perturbation is: its norms, its structural similarity, and how much of its target scene it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gambeson.attacks import UniversalPerturbation
from gambeson.base import Config, UserError
from gambeson.evaluation.universal import scorable
from gambeson.victim import auto_batch_size

BLUR = 2.0
"""Standard deviation in pixels of the blur over a map's edges, for edges that are a pixel off (ours)."""
_SIDES = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])


class Visibility(Config):
    """How much images change under a perturbation, as means over images; clipping to [0, 1] is part of the change."""

    largest: float
    """Mean of the largest change of a value, in pixel units: eps, unless clipping takes some of it."""
    rms: float
    """Mean of the root of the mean squared change, in pixel units."""
    ssim: float | None
    """Mean structural similarity (Wang et al. 2004): 1 for equal images, lower where structure is lost; None
    without the package torchmetrics."""
    lpips: float | None
    """Mean learned perceptual distance (Zhang et al. 2018, AlexNet), 0 for equal images; None unless asked for."""
    n: int
    """Images."""


class EdgeCorrelation(Config):
    """How much of a target scene a perturbation shows, against maps that it was not crafted for."""

    value: float
    """Pearson correlation of the perturbation's local energy with the edges of its target map, in [-1, 1]."""
    others: tuple[float, ...]
    """The same with each of the other maps."""

    @property
    def excess(self) -> float:
        """The correlation above the mean of the other maps: 0 for a perturbation that knows nothing of its target."""
        return self.value - sum(self.others) / len(self.others)

    @property
    def p(self) -> float:
        """Permutation p-value: how often a map is matched as well as the target, which is counted among them."""
        return (1 + sum(other >= self.value for other in self.others)) / (1 + len(self.others))


def visibility(uap: UniversalPerturbation, data: object, *, lpips: bool = False) -> Visibility:
    """Measure how visible a universal perturbation is on images.

    Args:
        uap: the perturbation.
        data: a split, an (images, labels) pair, or a data set, of which the test split is used.
        lpips: measure the learned distance too; its backbone's weights are downloaded by torchvision, once.

    Raises:
        UserError: images of another size or that it was crafted on; or ``lpips`` without torchmetrics or its weights.
    """
    split = scorable(data, uap)
    measures, sums = _measures(lpips), dict[str, float]()
    for images, _ in split.batches(auto_batch_size(split.shape, 64)):
        moved = uap.apply(images)
        change = (moved - images).flatten(1)
        found = {"largest": change.abs().amax(1).sum(), "rms": change.square().mean(1).sqrt().sum()}
        found |= {name: measure(moved, images) for name, measure in measures.items()}
        for name, total in found.items():
            sums[name] = sums.get(name, 0.0) + float(total)
    means = {name: total / len(split) for name, total in sums.items()}
    return Visibility(**({"ssim": None, "lpips": None} | means), n=len(split))


def _measures(lpips: bool) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return what is measured of perturbed and clean images, as sums over images, by name."""
    try:
        from torchmetrics.functional import image as metrics
    except ImportError:
        if lpips:
            raise UserError("lpips needs torchmetrics: pip install 'gambeson[perceptual]'") from None
        return {}

    def learned(moved: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        first, second = (side.expand(-1, 3, -1, -1) for side in (moved, images))
        try:
            return metrics.learned_perceptual_image_patch_similarity(
                first, second, net_type="alex", reduction="sum", normalize=True
            )
        except (OSError, RuntimeError) as error:  # no network, or a damaged file
            raise UserError(f"the weights of lpips' AlexNet could not be loaded ({error}): leave lpips out") from None

    def ssim(moved: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(
            metrics.structural_similarity_index_measure(moved, images, data_range=1.0, reduction="sum")
        )

    return {"ssim": ssim, "lpips": learned} if lpips else {"ssim": ssim}


def local_energy(delta: torch.Tensor) -> torch.Tensor:
    """Return how much a perturbation changes around each pixel: its Sobel magnitude, the mean over channels.

    Args:
        delta: (1, C, H, W) or (C, H, W).

    Returns:
        (H, W), at least 0.
    """
    planes = delta.reshape(-1, 1, *delta.shape[-2:]).float()
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    sides = torch.stack([_SIDES, _SIDES.T])[:, None].to(planes)
    return F.conv2d(padded, sides).square().sum(1).sqrt().mean(0)


def edges(label_map: torch.Tensor, blur: float = BLUR) -> torch.Tensor:
    """Return the edges of a label map (H, W): 1 where a pixel's label differs from that of the next, then blurred."""
    from torchvision.transforms.v2.functional import gaussian_blur  # half a second

    found = torch.zeros_like(label_map, dtype=torch.float32)
    for axis in (0, 1):
        size = label_map.shape[axis] - 1
        first, second = label_map.narrow(axis, 0, size), label_map.narrow(axis, 1, size)
        found.narrow(axis, 0, size)[first != second] = 1
        found.narrow(axis, 1, size)[first != second] = 1
    if not blur:
        return found
    width = min(2 * round(3 * blur) + 1, 2 * min(label_map.shape) - 1)
    return gaussian_blur(found[None], [width, width], [blur, blur])[0]


def edge_correlation(
    delta: torch.Tensor, target: torch.Tensor, others: torch.Tensor, *, blur: float = BLUR
) -> EdgeCorrelation:
    """Measure how much of its target scene a perturbation shows.

    The finding of Shared Adversarial Training (Mummadi et al. 2019) that what still fools a hardened segmentation net
    "shows" the target scene, as a number: the Pearson correlation of the perturbation's :func:`local_energy` with the
    blurred :func:`edges` of its target map, against the same with maps of other scenes. The measure is ours; the paper
    shows pictures.

    Args:
        delta: (1, C, H, W) or (C, H, W), of the tiled size.
        target: (H, W), the map it was crafted to reach.
        others: (M, H, W), maps of other scenes, made as the target was: predicted ones, as by default in attacks, or
            else true ones, whose borders without a label are edges too.
        blur: standard deviation of the blur in pixels; 0 for none.

    Raises:
        UserError: maps of another size than the perturbation, or none to compare with.
    """
    maps = torch.cat([target[None], others]) if others.ndim == 3 and len(others) else target[None]
    if len(maps) < 2 or maps.shape[1:] != delta.shape[-2:]:
        raise UserError(
            f"a perturbation of {tuple(delta.shape[-2:])} pixels came with a target of {tuple(target.shape)} and other "
            f"maps of {tuple(others.shape)}: expected one size, and one other map or more"
        )
    energy = local_energy(delta.detach().cpu()).flatten()
    values = [_correlation(energy, edges(one.cpu(), blur).flatten()) for one in maps]
    return EdgeCorrelation(value=values[0], others=tuple(values[1:]))


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson correlation in float64; 0 where either is constant."""
    first, second = (side.double() - side.double().mean() for side in (first, second))
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size > 1e-12 else 0.0
