"""Caches filled with random entries, as they stand after a long prompt; no prompt has to be read."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from defensivekv.cache import PrefixView, RaggedPrefix
from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.transformers import EvictingCache
from defensivekv.integrations.transformers.model import plan_layers, text_config

_DRAWN = 2**20


def ragged_lengths(heads: int, tokens: int, budget: float, generator: torch.Generator) -> list[int]:
    """Entries of each head: `floor(tokens * budget * heads)` in all, split unevenly.

    The shares are exponentially distributed over a floor of 32 entries: the longest of eight heads is then
    typically ten times the shortest or more. No head holds more than `tokens`.
    """
    total = int(tokens * budget * heads)
    floor = min(32, total // heads)
    weights = torch.empty(heads).exponential_(generator=generator)
    lengths = [floor + int(share) for share in weights / weights.sum() * (total - floor * heads)]
    lengths = [min(length, tokens) for length in lengths]
    while (missing := total - sum(lengths)) > 0:
        open_heads = [head for head in range(heads) if lengths[head] < tokens]
        for head in open_heads:
            added = min(tokens - lengths[head], -(-missing // len(open_heads)), total - sum(lengths))
            lengths[head] += added
    return lengths


def ragged_prefix(
    lengths: list[int],
    tokens: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    rows: int = 1,
) -> RaggedPrefix:
    """A prefix with random keys, values and positions below `tokens`. lengths: of all heads, row by row."""
    heads = len(lengths) // rows
    positions = [
        torch.randperm(tokens, generator=generator)[:length].sort().values.to(torch.int32) for length in lengths
    ]
    return RaggedPrefix(
        random_entries((sum(lengths), head_size), dtype, device, generator),
        random_entries((sum(lengths), head_size), dtype, device, generator),
        torch.cat(positions).to(device),
        tuple(tuple(lengths[start : start + heads]) for start in range(0, len(lengths), heads)),
    )


def dense_entries(
    heads: int,
    tokens: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    batch: int = 1,
) -> tuple[Tensor, Tensor]:
    """Random keys and values (batch, heads, tokens, head_size)."""
    shape = (batch, heads, tokens, head_size)
    return random_entries(shape, dtype, device, generator), random_entries(shape, dtype, device, generator)


def filled_stock(model: PreTrainedModel, tokens: int, generator: torch.Generator, batch: int = 1) -> DynamicCache:
    """The stock cache, holding `tokens` tokens of each of `batch` sequences."""
    cache = DynamicCache(config=model.config)
    _fill(cache, model, tokens, generator, batch)
    return cache


def filled_static(
    model: PreTrainedModel, tokens: int, room: int, generator: torch.Generator, batch: int = 1
) -> StaticCache:
    """The static cache, holding `tokens` tokens and allocated for `room` more."""
    cache = StaticCache(config=model.config, max_cache_len=tokens + room)
    _fill(cache, model, tokens, generator, batch)
    return cache


def _fill(
    cache: DynamicCache | StaticCache, model: PreTrainedModel, tokens: int, generator: torch.Generator, batch: int
) -> None:
    config = full_attention_config(model)
    heads, size = key_value_heads(config), head_size(config)
    for layer in range(config.num_hidden_layers):
        cache.update(*dense_entries(heads, tokens, size, model.dtype, model.device, generator, batch), layer)


def filled_evicting(
    model: PreTrainedModel,
    tokens: int,
    budget: float,
    seen: int,
    generator: torch.Generator,
    batch: int = 1,
    *,
    static_tokens: int | None = None,
) -> EvictingCache:
    """Our cache after prompts of `seen` tokens, holding `budget` of `tokens` tokens' entries of each.

    The heads of every layer hold different numbers of entries; every layer, and every row, the same number in all.
    """
    config = full_attention_config(model)
    cache = EvictingCache(model, "layer-defensivekv", budget, static_tokens=static_tokens)
    for index in cache.evicted_layers:
        layer = cache.layers[index]
        heads = key_value_heads(config)
        lengths = [length for _ in range(batch) for length in ragged_lengths(heads, tokens, budget, generator)]
        prefix = ragged_prefix(lengths, seen, head_size(config), model.dtype, model.device, generator, batch)
        layer.store.start_from(PrefixView(prefix, tuple(range(batch))), seen)
        layer.refresh_reads()
        layer.awaits_prompt = False
        layer.is_initialized = True
    return cache


def full_attention_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the model's text decoder. Raises UnsupportedModelError where a layer is not of full
    attention: its cache cannot be filled by hand.
    """
    config = text_config(model)
    others = sorted({plan.kind for plan in plan_layers(config) if not plan.evicted})
    if others:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of {', '.join(others)}, whose caches cannot be filled without reading "
            "a prompt: measure its prefill and memory alone (--what prefill,memory)"
        )
    return config


def head_size(config: PreTrainedConfig) -> int:
    """Elements of a key."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_value_heads(config: PreTrainedConfig) -> int:
    """Heads of keys in a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def random_entries(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Normal numbers. Up to a million are drawn, and repeated: drawing a gigabyte would take longer than a run."""
    count = 1
    for size in shape:
        count *= size
    drawn = torch.randn(min(count, _DRAWN), generator=generator).to(dtype)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(shape).contiguous().to(device)
