"""Deliberately deceptive models, by which the audit is tested: each must be distrusted or broken.

Every one is poisoned in one documented way; the network underneath is a plain LeNet-5. Beside them stand honest
networks, which must be trusted.
"""

from tests.auditing.poisoned.batches import BATCHES
from tests.auditing.poisoned.features import FEATURES
from tests.auditing.poisoned.held_out import HELD_OUT
from tests.auditing.poisoned.inputs import INPUTS
from tests.auditing.poisoned.nets import HONEST, RECIPES, nets
from tests.auditing.poisoned.noise import NOISE
from tests.auditing.poisoned.outputs import OUTPUTS
from tests.auditing.poisoned.poison import Nets, Poison, broken, worst
from tests.auditing.poisoned.stateful import STATEFUL

_ALL = (*OUTPUTS, *INPUTS, *FEATURES, *NOISE, *STATEFUL, *BATCHES, *HELD_OUT)
POISONED: dict[str, Poison] = {poison.name: poison for poison in _ALL}
"""Every poisoned model by its name."""

__all__ = ["HELD_OUT", "HONEST", "POISONED", "RECIPES", "Nets", "Poison", "broken", "nets", "worst"]
