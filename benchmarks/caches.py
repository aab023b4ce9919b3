"""Caches filled with random entries, as they stand after a long prompt; no prompt has to be read."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from defensivekv import EvictingCache
from defensivekv.cache import PrefixView, RaggedPrefix


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
) -> RaggedPrefix:
    """A prefix of one row with random keys, values and positions below `tokens`."""
    stored = sum(lengths)
    positions = [
        torch.randperm(tokens, generator=generator)[:length].sort().values.to(torch.int32) for length in lengths
    ]
    return RaggedPrefix(
        _random((stored, head_size), dtype, device, generator),
        _random((stored, head_size), dtype, device, generator),
        torch.cat(positions).to(device),
        (tuple(lengths),),
    )


def dense_entries(
    heads: int, tokens: int, head_size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random keys and values (1, heads, tokens, head_size)."""
    shape = (1, heads, tokens, head_size)
    return _random(shape, dtype, device, generator), _random(shape, dtype, device, generator)


def filled_stock(model: PreTrainedModel, tokens: int, generator: torch.Generator) -> DynamicCache:
    """The stock cache, holding `tokens` tokens."""
    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        entries = dense_entries(
            config.num_key_value_heads, tokens, config.head_dim, model.dtype, model.device, generator
        )
        cache.update(*entries, layer)
    return cache


def filled_evicting(
    model: PreTrainedModel, tokens: int, budget: float, seen: int, generator: torch.Generator
) -> EvictingCache:
    """Our cache after a prompt of `seen` tokens, holding `budget` of `tokens` tokens' entries.

    The heads of every layer hold different numbers of entries; every layer the same number in all.
    """
    config = model.config
    cache = EvictingCache(model, "layer-defensivekv", budget)
    for index in cache.evicted_layers:
        layer = cache.layers[index]
        lengths = ragged_lengths(config.num_key_value_heads, tokens, budget, generator)
        prefix = ragged_prefix(lengths, seen, config.head_dim, model.dtype, model.device, generator)
        layer.store.start_from(PrefixView(prefix, (0,)), seen)
        layer.awaits_prompt = False
        layer.is_initialized = True
    return cache


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    # One head's worth of numbers, repeated: drawing a gigabyte would take longer than what is measured.
    count = 1
    for size in shape:
        count *= size
    drawn = torch.randn(min(count, 2**20), generator=generator).to(dtype)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(shape).contiguous().to(device)
