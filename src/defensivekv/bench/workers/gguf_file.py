"""A model of a given shape with random weights as a GGUF file, which llama.cpp reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_DRAWN = 1_000_003
"""Numbers drawn, and repeated. A prime, so that no two rows of a matrix are the same."""


def write_gguf(config_file: Path, path: Path, seed: int) -> None:
    """Writes the file, float16, of the shape in a transformers `config.json`. Raises ValueError for other models."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"only {', '.join(ARCHITECTURES)} models are written as GGUF here, not {kind}")
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, ARCHITECTURES[kind])
    _add_facts(writer, config)
    listed = list(tensors(config))
    for name, shape in listed:
        dtype = np.dtype(np.float16 if len(shape) == 2 else np.float32)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    drawn = (np.random.default_rng(seed).standard_normal(_DRAWN) * 0.02).astype(np.float16)
    start = 0
    for name, shape in listed:
        if len(shape) == 2:
            writer.write_tensor_data(np.resize(np.roll(drawn, -start), shape))
            start = (start + int(np.prod(shape))) % _DRAWN
        else:
            writer.write_tensor_data(np.full(shape, 0 if name.endswith("bias") else 1, np.float32))
    writer.close()
    part.replace(path)


def head_size(config: dict[str, Any]) -> int:
    """Elements of a key."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_facts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, as numpy has them."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * head_size(config)
    keys = config["num_key_value_heads"] * head_size(config)
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "output.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.attn_{name}.weight", (size, hidden)
            if config["model_type"] == "qwen2":
                yield f"{block}.attn_{name}.bias", (size,)
        yield f"{block}.attn_output.weight", (hidden, queries)
        yield f"{block}.ffn_norm.weight", (hidden,)
        yield f"{block}.ffn_gate.weight", (inner, hidden)
        yield f"{block}.ffn_up.weight", (inner, hidden)
        yield f"{block}.ffn_down.weight", (hidden, inner)
