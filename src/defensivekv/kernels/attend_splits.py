"""The first launch of ragged attention: every program reads one chunk, of a prefix's segment or of a tail."""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import triton
import triton.language as tl

from defensivekv.kernels.merge_splits import LOG2_E
from defensivekv.kernels.tanh import tanh

_COUNTS = ["used", "num_items", "tiles", "prefix_splits", "tail_chunks", "tail_chunk", "heads"]
_MASK_STRIDES = ["visible_batch", "visible_head", "visible_position"]


@triton.jit(do_not_specialize=[*_COUNTS, *_MASK_STRIDES])
def attend_splits(  # type: ignore[no-untyped-def]
    queries,  # (b, q, x, d)
    prefix_keys,  # (s, d)
    prefix_values,  # (s, v)
    items,  # (n, 6), as in Work
    readers,  # (b,)
    first_split,  # (b * h + 1,)
    tail_keys,  # (b, h, c, d)
    tail_values,  # (b, h, c, v)
    used,  # tokens in the tail, or where they are stored
    visible,  # (b, q, x, c) bytes
    outputs,  # (splits, r, v) float32
    log_sums,  # (splits, r) float32, base 2
    scaling,
    softcap,
    num_items,
    tiles,  # of each item
    tail_tiles,  # of each chunk of a tail
    prefix_splits,  # before those of the tail
    tail_chunks,  # of each batch row and head
    tail_chunk,  # entries
    heads,
    group,
    num_queries,
    query_batch,  # strides, in elements; the innermost are 1
    query_head,
    query_position,
    prefix_key,
    prefix_value,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    visible_batch,
    visible_head,
    visible_position,
    visible_token,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    """Packed query rows over one chunk of one segment, or of one tail: its softmax and the log of its sum.

        out = Σ softmax(logits)_n · v_n,    l = log2 Σ 2^logits,    logits = softcap(q · k · scaling) · log2 e

        programs   [ item 0: tile 0, tile 1 | item 1: … ][ batch row 0, head 0: chunk 0, chunk 1, … | head 1 … ]
                     prefix, longest items first           tail; chunks beyond `used` read nothing
        rows       prefix: reader 0: r rows | reader 1: r rows | …    r = group * x, in tiles of BLOCK_M
                   tail:   r rows of the batch row itself

    The lengths of heads do not matter: no program reads more than a chunk, whatever head it belongs to. Both kinds of
    program go one way through the code, which differs in where they read.
    Source: flash-decoding (Dao et al., 2023); FlashInfer's plan of work (arXiv 2501.01005); online softmax as in
    FlashAttention-2 (arXiv 2307.08691).
    """
    program = tl.program_id(0)
    rows = group * num_queries
    held = tl.load(used).to(tl.int32) if IS_COUNTED else used

    # As a program of the tail; for one of the prefix, all of this is replaced below.
    tail_program = tl.maximum(program - num_items * tiles, 0)
    tile, tail_split = tail_program % tail_tiles, tail_program // tail_tiles
    chunk, pair = tail_split % tail_chunks, tail_split // tail_chunks
    batch, head = pair // heads, pair % heads
    first = chunk * tail_chunk
    count = tl.minimum(held - first, tail_chunk)
    num_rows = rows
    wide_batch, wide_head, wide_first = batch.to(tl.int64), head.to(tl.int64), first.to(tl.int64)
    keys = tail_keys + wide_batch * key_batch + wide_head * key_head + wide_first * key_token
    values = tail_values + wide_batch * value_batch + wide_head * value_head + wide_first * value_token
    key_stride, value_stride = key_token, value_token
    is_tail = program >= num_items * tiles
    if HAS_PREFIX:
        item = items + program // tiles * 6
        start = tl.load(item, mask=not is_tail, other=0).to(tl.int64)
        entries = tl.load(item + 1, mask=not is_tail, other=0)
        item_head = tl.load(item + 2, mask=not is_tail, other=0)
        item_chunk = tl.load(item + 3, mask=not is_tail, other=0)
        first_reader = tl.load(item + 4, mask=not is_tail, other=0)
        num_readers = tl.load(item + 5, mask=not is_tail, other=0)
        tile = tl.where(is_tail, tile, program % tiles)
        count = tl.where(is_tail, count, entries)
        head = tl.where(is_tail, head, item_head)
        chunk = tl.where(is_tail, chunk, item_chunk)
        num_rows = tl.where(is_tail, rows, num_readers * rows)
        keys = tl.where(is_tail, keys, prefix_keys + start * prefix_key)
        values = tl.where(is_tail, values, prefix_values + start * prefix_value)
        key_stride = tl.where(is_tail, key_token, prefix_key)
        value_stride = tl.where(is_tail, value_token, prefix_value)
    count = tl.where(tile * BLOCK_M < num_rows, count, 0)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    packed = row % rows
    line = prefix_splits + tail_split.to(tl.int64) + tl.full((BLOCK_M,), 0, tl.int64)
    reader = batch + tl.full((BLOCK_M,), 0, tl.int32)
    if HAS_PREFIX:
        is_read = is_row & (not is_tail)
        reader = tl.where(is_tail, batch, tl.load(readers + first_reader + row // rows, mask=is_read, other=0))
        split = tl.load(first_split + reader * heads + head, mask=is_read, other=0) + chunk
        line = tl.where(is_tail, line, split.to(tl.int64))
    line = line * rows + packed
    position = packed % num_queries
    wide_reader = reader.to(tl.int64)
    queried = head * group + packed // num_queries

    inner, columns, places = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    where = wide_reader * query_batch + queried * query_head + position * query_position
    query_shown = is_row[:, None] & (inner < KEY_SIZE)[None, :]
    query = tl.load(queries + where[:, None] + inner[None, :], mask=query_shown, other=0.0)
    # Entries of the chunk that a row may read: all of a prefix; of a tail, those up to the row's own token.
    limit = count + tl.full((BLOCK_M,), 0, tl.int32)
    if HAS_MASK:
        shown_line = visible + wide_reader * visible_batch
        shown_line += queried.to(tl.int64) * visible_head + position.to(tl.int64) * visible_position
    else:
        limit = tl.where(is_tail, tl.minimum(held - num_queries + position + 1 - first, count), limit)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0, tl.float32)
    summed = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    for begin in range(0, count, BLOCK_N):
        place = begin + places
        there = place < count
        key_shown = there[None, :] & (inner < KEY_SIZE)[:, None]
        key = tl.load(keys + place[None, :] * key_stride + inner[:, None], mask=key_shown, other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            logits = tanh(logits / softcap) * softcap
        seen = place[None, :] < limit[:, None]
        if HAS_MASK:
            tokens = (first + place)[None, :]
            masked = is_tail & is_row[:, None] & there[None, :]
            seen &= tl.load(shown_line[:, None] + tokens * visible_token, mask=masked, other=1) != 0
        logits = tl.where(seen, logits * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(highest - finite)
        weights = tl.exp2(logits - finite[:, None])
        total = total * kept + tl.sum(weights, 1)
        value_shown = there[:, None] & (columns < VALUE_SIZE)[None, :]
        value = tl.load(values + place[:, None] * value_stride + columns[None, :], mask=value_shown, other=0.0)
        summed = tl.dot(weights.to(value.dtype), value, summed * kept[:, None], input_precision="ieee")
        highest = higher

    is_written = is_row & (count > 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    written = is_written[:, None] & (columns < VALUE_SIZE)[None, :]
    tl.store(outputs + line[:, None] * VALUE_SIZE + columns[None, :], summed / divisor[:, None], mask=written)
    tl.store(log_sums + line, highest + tl.log2(divisor), mask=is_written)
