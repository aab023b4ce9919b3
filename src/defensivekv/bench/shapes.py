"""Shapes of well-known models, to be measured with random weights: what they take does not depend on the weights."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from defensivekv.errors import InvalidInputError

_CONFIGS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
TINY = "tiny"
"""The shape of quick runs, which show that everything runs and measure nothing."""

#                    kind      hidden inner  layers q  kv size words  positions tied
_SHAPES: dict[str, tuple[Any, ...]] = {
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, True),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, False),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, 131072, False),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 131072, False),
    "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, 131072, False),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, False),
    TINY: ("llama", 64, 128, 2, 4, 2, 16, 256, 4096, True),
}

SHAPES = tuple(_SHAPES)


def shape_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of that shape, without special tokens. Raises InvalidInputError for an unknown name.

    changes: of the configuration's fields.
    """
    if name not in _SHAPES:
        raise InvalidInputError(f"unknown shape {name!r}: known are {', '.join(SHAPES)}; or name a model's folder")
    kind, *sizes, is_tied = _SHAPES[name]
    fields = dict(zip(_FIELDS, sizes, strict=True)) | {"tie_word_embeddings": is_tied}
    if kind == "mistral":
        fields["sliding_window"] = None
    return _CONFIGS[kind](**fields | changes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
