"""The obfuscated models, each obfuscated in one documented way around a LeNet-5."""

from gambeson.testbed.entry import Entry
from gambeson.testbed.obfuscations.context import CONTEXT
from gambeson.testbed.obfuscations.features import FEATURES
from gambeson.testbed.obfuscations.held_out import HELD_OUT
from gambeson.testbed.obfuscations.logits import LOGITS
from gambeson.testbed.obfuscations.preprocessing import PREPROCESSING
from gambeson.testbed.obfuscations.randomness import RANDOMNESS
from gambeson.testbed.obfuscations.second import SECOND
from gambeson.testbed.obfuscations.third import THIRD

OBFUSCATED: tuple[Entry, ...] = (*LOGITS, *PREPROCESSING, *FEATURES, *RANDOMNESS, *CONTEXT, *HELD_OUT, *SECOND, *THIRD)
"""Every obfuscated model."""
