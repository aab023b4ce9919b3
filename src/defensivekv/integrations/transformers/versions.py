"""What differs between the releases of transformers that this package runs on."""

import inspect

from transformers import GenerationMixin

_PARAMETERS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE_ARGUMENT = "cache" if "cache" in _PARAMETERS else "past_key_values"
"""The keyword by which models and `generate()` take a cache: `model.generate(..., **{CACHE_ARGUMENT: cache})`.

Newer releases call it `cache` and warn of the older name.
"""
