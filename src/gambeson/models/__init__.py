"""Models: architectures, ensembles, noise, loading, export and black boxes. Pixels in, logits out.

>>> import gambeson as gb
>>> model = gb.models.create("resnet20x4", in_channels=3, classes=10, image_size=32)
>>> gb.models.count_parameters(model)
4286026
"""

from gambeson.models.factory import add_noise, create, ensemble
from gambeson.models.members import Members
from gambeson.models.memory import count_parameters, fingerprint
from gambeson.models.noise import FeatureNoise, Noise, NoiseInjection, NoiseModule, inject_noise, injections, noise_off
from gambeson.models.noisy_weights import FixedNoise, ParametricNoise, PassAverage
from gambeson.models.outputs import as_logits, at_image_size, fixed_batch
from gambeson.models.pixel_model import ModelCard, Normalize, PixelModel
from gambeson.models.registry import names, register
from gambeson.models.storage import load, load_weights, save
from gambeson.models.thresholded import Thresholded

__all__ = [
    "FeatureNoise",
    "FixedNoise",
    "Members",
    "ModelCard",
    "Noise",
    "NoiseInjection",
    "NoiseModule",
    "Normalize",
    "ParametricNoise",
    "PassAverage",
    "PixelModel",
    "Thresholded",
    "add_noise",
    "as_logits",
    "at_image_size",
    "count_parameters",
    "create",
    "ensemble",
    "fingerprint",
    "fixed_batch",
    "inject_noise",
    "injections",
    "load",
    "load_weights",
    "names",
    "noise_off",
    "register",
    "save",
]
