"""Tiny random models of many architectures, built from their configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "qwen3_moe": _MOE,
    "gemma2": {"num_hidden_layers": 4, "sliding_window": 24, "layer_types": _WINDOWED, "query_pre_attn_scalar": 16},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window": 24, "layer_types": _WINDOWED},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2},
    "glm4": {},
    "gpt_oss": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "layer_types": _WINDOWED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "cohere2": {"logit_scale": 1.0, "num_hidden_layers": 4, "sliding_window": 24, "layer_types": _WINDOWED},
    "starcoder2": {"sliding_window": None},
    "gpt_neox": {},
}
ARCHITECTURES = tuple(_SPECIFIC)
SOFTCAPPED_OR_SINKS = ("gemma2", "gpt_oss")
"""Models whose stock attention must be the eager one to be exact."""


def tiny_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model in evaluation mode, the same for the same seed."""
    options = _COMMON | _SPECIFIC.get(architecture, {}) | changes
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(seed)
    implementation = "eager" if architecture in SOFTCAPPED_OR_SINKS else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Biases, norms and sinks start as constants, which would hide that they are left out.
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def prompt(num_tokens: int, *, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, num_tokens), none of them the pad 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, num_tokens), generator=generator)
