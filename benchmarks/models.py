"""A model of Llama-3.2-1B's shape with random weights."""

from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.settings import Settings, dtype_of
from defensivekv.bench.shapes import shape_config
from defensivekv.bench.workers import random_model as random


def random_model(
    settings: Settings, device: torch.device, seed: int = 0, *, dtype: str = "", **changes: Any
) -> LlamaForCausalLM:
    """The model in evaluation mode; its stock attention is SDPA.

    dtype: that of the settings if empty. changes: to the configuration.
    """
    config = shape_config("llama-3.2-1b", **dict(settings.model) | changes)
    made: LlamaForCausalLM = random.random_model(config, dtype_of(dtype or settings.model_dtype), device, seed)
    return made
