"""Tiny random models of many architectures, built from their configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

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

_ALTERNATING = ["sliding_attention", "full_attention"] * 3
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_SHARED = {
    "num_hidden_layers": 6,
    "sliding_window": 24,
    "layer_types": _ALTERNATING,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_UNUSUAL: dict[str, dict[str, Any]] = {
    "qwen3_next": _MOE
    | {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "attention_chunk_size": 64,
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0, 1, 0],
    },
    "gemma4_text": _SHARED | {"global_head_dim": 16},
    "gemma3n_text": _SHARED | {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 1024},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "falcon": {"head_dim": None, "alibi": True},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
}
WITHOUT_SDPA = ("bloom", "mpt")
SOFTCAPPED_OR_SINKS = ("gemma2", "gpt_oss")
"""Models whose stock attention must be the eager one to be exact."""


def tiny_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model in evaluation mode, the same for the same seed."""
    options = _COMMON | _SPECIFIC.get(architecture, {}) | _UNUSUAL.get(architecture, {}) | changes
    options = {name: value for name, value in options.items() if value is not None or name.endswith(("_id", "window"))}
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(seed)
    implementation = "eager" if architecture in (*SOFTCAPPED_OR_SINKS, *WITHOUT_SDPA) else "sdpa"
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


def feed(model: PreTrainedModel, cache: object, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits of a forward pass through the cache, without gradients."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}, **inputs).logits
    return logits


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: object = None, **options: Any) -> torch.Tensor:
    """Four tokens unless the options say otherwise, with no pads; the cache is left to `generate()` if not given."""
    given = {} if cache is None else {CACHE_ARGUMENT: cache}
    defaults = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    output: torch.Tensor = model.generate(ids, **given, **(defaults | options))
    return output
