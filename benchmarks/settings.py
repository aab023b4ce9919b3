"""The settings of a run: the ones that the targets were set for, and small ones that only show that it runs."""

from dataclasses import dataclass
from typing import Any

from defensivekv.bench.dtypes import dtype_of as dtype_of


@dataclass(frozen=True)
class Settings:
    """Sizes and repetitions.

    tokens: stored by the dense caches. attention_layers: caches that a step's attention reads in turn. scored, window:
    tokens whose entries are scored and compacted without a model, and those at their end whose queries are observed.
    hidden: size of the output projection. prompt, prefill_layers: tokens of the prefill, and layers of the model that
    it is timed on. logical_lengths: tokens seen, while the stored entries stay those of `budget` of the shortest.
    short, medium, long: repetitions of calls that take milliseconds, tenths of a second, and seconds. model: changes
    to the model's configuration. endless_tokens, bound: tokens generated, and entries per head that may be held
    meanwhile. memory_lengths, memory_ways, chunk_size: prompts whose peak is measured, how they are read, and tokens
    read at a time. thin: changes that make the model one of little but a cache. has_targets: whether the figures can
    be held against the targets.
    """

    tokens: int = 32768
    budget: float = 0.2
    heads: int = 8
    groups: int = 4
    head_size: int = 128
    attention_layers: int = 16
    scored: int = 8192
    window: int = 32
    hidden: int = 4096
    attention_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    model_dtype: str = "bfloat16"
    prompt: int = 8192
    prefill_layers: int = 4
    logical_lengths: tuple[int, ...] = (8192, 32768, 131072 - 64)
    copy_bytes: int = 2**29
    short: int = 30
    medium: int = 9
    long: int = 5
    model: tuple[tuple[str, Any], ...] = ()
    endless_tokens: int = 100_000
    bound: int = 1024
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    memory_ways: tuple[str, ...] = ("full", "two passes", "streaming", "per layer", "chunked", "bounded")
    chunk_size: int = 512
    thin: tuple[tuple[str, Any], ...] = (
        ("hidden_size", 256),
        ("intermediate_size", 512),
        ("num_attention_heads", 8),
        ("vocab_size", 1024),
    )
    has_targets: bool = True


FULL = Settings()

QUICK = Settings(
    tokens=512,
    head_size=16,
    attention_layers=2,
    scored=300,
    hidden=64,
    model_dtype="float32",
    prompt=256,
    prefill_layers=2,
    logical_lengths=(256, 1024, 2048),
    copy_bytes=2**20,
    short=3,
    medium=2,
    long=1,
    model=(
        ("hidden_size", 64),
        ("intermediate_size", 128),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
        ("vocab_size", 256),
        ("max_position_embeddings", 4096),
    ),
    endless_tokens=200,
    bound=64,
    memory_lengths=(128,),
    memory_ways=("bounded",),
    chunk_size=64,
    thin=(),
    has_targets=False,
)
