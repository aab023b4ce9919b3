"""The kept rows of a dense layer, one after the other, by a mask; nothing waits for the device.

    kept            1 0 0 1|1 1 0 1|0 0 1 0| …         each (batch row, head) in blocks of tokens
    counts          2       3       1                  first launch: of each block
    starts          0       2       5                  an exclusive scan of all blocks' counts
    keys, values    a d|e f h|k| …                     second launch: each block writes its rows from its start on,
    positions       0 3 4 5 7 10                       a scan within the block numbers them

Rows that go are not read. Offsets are 64-bit. Source: stream compaction (Blelloch, 1990).
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK_T = 64
_MOST_CHANNELS = 128
_COUNTED = 1024


class Compacted(NamedTuple):
    """Rows that stayed, by batch row, head and token.

    keys: (total, d).  values: (total, v).  positions: (total,) int32, each row's token.
    lengths, offsets: (b, h) int64, rows of each head, and where they begin.
    """

    keys: Float[Tensor, "total d"]
    values: Float[Tensor, "total v"]
    positions: Int[Tensor, " total"]
    lengths: Int[Tensor, "b h"]
    offsets: Int[Tensor, "b h"]


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _count_kept(  # type: ignore[no-untyped-def]
    kept,  # (b, h, t) bytes
    counts,  # (b, h, blocks) int32
    num_heads,
    num_tokens,
    num_blocks,
    kept_batch,  # strides, in elements
    kept_head,
    kept_token,
    BLOCK_T: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """How many rows stay of each block of tokens; a program counts several blocks."""
    pair = tl.program_id(1).to(tl.int64)
    places: tl.constexpr = COUNTED // BLOCK_T
    blocks = tl.program_id(0) * places + tl.arange(0, places)
    tokens = blocks[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    line = kept + pair // num_heads * kept_batch + pair % num_heads * kept_head
    stays = tl.load(line + tokens.to(tl.int64) * kept_token, mask=tokens < num_tokens, other=0)
    tl.store(counts + pair * num_blocks + blocks, tl.sum((stays != 0).to(tl.int32), 1), mask=blocks < num_blocks)


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    source,  # (t, size) of one head
    target,  # (total, size)
    tokens,
    places,
    stays,
    source_token,
    source_channel,
    SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    for start in tl.static_range(0, SIZE, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        shown = stays[:, None] & (channels < SIZE)[None, :]
        rows = tl.load(source + tokens[:, None] * source_token + channels[None, :] * source_channel, mask=shown)
        tl.store(target + places[:, None] * SIZE + channels[None, :], rows, mask=shown)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "total"])
def _gather_rows(  # type: ignore[no-untyped-def]
    keys,  # (b, h, t, d)
    values,  # (b, h, t, v)
    kept,  # (b, h, t) bytes
    starts,  # (b, h, blocks) int64
    kept_keys,  # (total, d)
    kept_values,  # (total, v)
    positions,  # (total,) int32
    num_heads,
    num_tokens,
    num_blocks,
    total,
    key_batch,  # strides, in elements
    key_head,
    key_token,
    key_channel,
    value_batch,
    value_head,
    value_token,
    value_channel,
    kept_batch,
    kept_head,
    kept_token,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of tokens of one head: its kept rows to where the rows before it end."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // num_heads, pair % num_heads
    tokens = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    line = kept + batch * kept_batch + head * kept_head
    stays = tl.load(line + tokens * kept_token, mask=tokens < num_tokens, other=0) != 0
    places = tl.load(starts + pair * num_blocks + block) + tl.cumsum(stays.to(tl.int32), 0) - 1
    stays = stays & (places < total)
    tl.store(positions + places, tokens.to(tl.int32), mask=stays)
    key = keys + batch * key_batch + head * key_head
    _copy_rows(key, kept_keys, tokens, places, stays, key_token, key_channel, KEY_SIZE, KEY_CHANNELS)
    value = values + batch * value_batch + head * value_head
    _copy_rows(value, kept_values, tokens, places, stays, value_token, value_channel, VALUE_SIZE, VALUE_CHANNELS)


def compact(
    keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t v"], kept: Bool[Tensor, "b h t"], total: int
) -> Compacted:
    """The rows that are kept, copied. All of any strides and any dtype.

    total: rows that are kept, which the caller knows, as no one here asks the device. Of a mask that holds more, the
    first `total` are copied, and lengths are of what was. Of one that holds less, the rows after the last head's are
    left as they were allocated: nothing refers to them.
    """
    b, h, t, d = keys.shape
    v, device = values.shape[3], keys.device
    blocks, pairs = triton.cdiv(t, _BLOCK_T), b * h
    result = (keys.new_empty(total, d), values.new_empty(total, v), kept.new_empty(total, dtype=torch.int32))
    if pairs * blocks == 0:
        lengths = torch.zeros(b, h, dtype=torch.long, device=device)
        return Compacted(*result, lengths, lengths.clone())
    bytes_kept = kept.view(torch.uint8)
    counts = torch.empty(b, h, blocks, dtype=torch.int32, device=device)
    # Triton launches on the current device, which need not be that of the layer.
    with torch.cuda.device_of(keys):
        _count_kept[(triton.cdiv(t, _COUNTED), pairs)](
            bytes_kept, counts, h, t, blocks, *kept.stride(), BLOCK_T=_BLOCK_T, COUNTED=_COUNTED
        )
        ends = counts.flatten().cumsum(0).view(counts.shape)
        starts = ends - counts
        _gather_rows[(blocks, pairs)](
            keys, values, bytes_kept, starts, *result, h, t, blocks, total,
            *keys.stride(), *values.stride(), *kept.stride(),
            KEY_SIZE=d, VALUE_SIZE=v, KEY_CHANNELS=_channels(d), VALUE_CHANNELS=_channels(v), BLOCK_T=_BLOCK_T,
        )  # fmt: skip
    offsets = starts[..., 0].clamp_max(total)
    return Compacted(*result, ends[..., -1].clamp_max(total) - offsets, offsets)


def _channels(size: int) -> int:
    return min(1 << (size - 1).bit_length(), _MOST_CHANNELS)
