"""A model of Llama-3.2-1B's shape with random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.settings import Settings, dtype_of


def random_model(
    settings: Settings, device: torch.device, seed: int = 0, *, dtype: str = "", **changes: Any
) -> LlamaForCausalLM:
    """The model in evaluation mode; its stock attention is SDPA.

    dtype: that of the settings if empty. changes: to the configuration.
    """
    shape = (
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        }
        | dict(settings.model)
        | changes
    )
    config = LlamaConfig(**shape, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(dtype or settings.model_dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()
