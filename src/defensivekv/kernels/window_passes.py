"""The three launches of window scores: each makes a tile of attention weights anew, and reduces it. See there.

rows      (h, g * w)   a head's queries, query head by query head, the window's positions innermost
columns   (h, t)       its keys, of any strides
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import triton
import triton.language as tl

from defensivekv.kernels.tanh import tanh


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    queries,  # (rows, d) of one head
    keys,  # (t, d) of one head
    rows,
    columns,
    is_row,
    is_column,
    key_token,
    key_channel,
    softcap,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """A tile of logits in float32, rounded as the model's dtype rounds its products."""
    logits = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    line, place = queries + rows[:, None] * SIZE, keys + columns.to(tl.int64)[None, :] * key_token
    for start in range(0, SIZE, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        query = tl.load(line + inner[None, :], mask=is_row[:, None] & (inner < SIZE)[None, :], other=0.0)
        shown = is_column[None, :] & (inner < SIZE)[:, None]
        key = tl.load(place + inner[:, None] * key_channel, mask=shown, other=0.0)
        logits = tl.dot(query, key, logits, input_precision="ieee")
    logits = logits.to(keys.dtype.element_ty).to(tl.float32)
    if IS_CAPPED:
        logits = tanh(logits / softcap) * softcap
    return logits


@triton.jit(do_not_specialize=["num_tokens"])
def softmax_parts(  # type: ignore[no-untyped-def]
    queries,  # (h, rows, d)
    keys,  # (h, t, d)
    tops,  # (splits, h, rows) float32
    totals,  # (splits, h, rows) float32
    num_tokens,
    num_rows,
    window,
    key_head,
    key_token,
    key_channel,
    softcap,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """The highest logit of each row in a split of the columns, and Σ exp(logit - highest)."""
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    own = num_tokens - window + rows % window
    queries += head * num_rows * SIZE
    keys += head * key_head
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, num_tokens), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        is_column = columns < num_tokens
        logits = _logits(
            queries, keys, rows, columns, is_row, is_column, key_token, key_channel, softcap,
            SIZE, CHUNK, BLOCK_R, BLOCK_C, IS_CAPPED,
        )  # fmt: skip
        logits = tl.where(columns[None, :] <= own[:, None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        top = higher
    line = (split * tl.num_programs(1) + head) * num_rows + rows
    tl.store(tops + line, top, mask=is_row)
    tl.store(totals + line, total, mask=is_row)


@triton.jit
def _weights(logits, top, total, is_inside, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Attention weights in float32, rounded to the model's dtype; zero outside."""
    weights = tl.exp(logits - top[:, None]) * (1.0 / total)[:, None]
    return tl.where(is_inside, weights.to(dtype).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["num_scored"])
def row_sums(  # type: ignore[no-untyped-def]
    queries,  # (h, rows, d)
    keys,  # (h, t, d)
    tops,  # (h, rows) float32
    totals,  # (h, rows) float32
    before,  # (splits, h, rows) float32
    after,  # (splits, h, rows) float32
    num_scored,
    num_rows,
    key_head,
    key_token,
    key_channel,
    softcap,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLIT: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """Each row's sum in a split of the scored columns, before and after the filter."""
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = rows < num_rows
    queries += head * num_rows * SIZE
    keys += head * key_head
    top = tl.load(tops + head * num_rows + rows, mask=is_row, other=0.0)
    total = tl.load(totals + head * num_rows + rows, mask=is_row, other=1.0)
    plain = tl.zeros((BLOCK_R,), tl.float32)
    smoothed = tl.zeros((BLOCK_R,), tl.float32)
    reach: tl.constexpr = KERNEL_SIZE // 2
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, num_scored), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        is_column = columns < num_scored
        logits = _logits(
            queries, keys, rows, columns, is_row, is_column, key_token, key_channel, softcap,
            SIZE, CHUNK, BLOCK_R, BLOCK_C, IS_CAPPED,
        )  # fmt: skip
        inside = is_row[:, None] & is_column[None, :]
        weights = _weights(logits, top, total, inside, keys.dtype.element_ty)
        plain += tl.sum(weights, 1)
        times = tl.minimum(columns, reach) + tl.minimum(num_scored - 1 - columns, reach) + 1
        smoothed += tl.sum(weights * (times.to(tl.float32) / KERNEL_SIZE)[None, :], 1)
    line = (split * tl.num_programs(1) + head) * num_rows + rows
    tl.store(before + line, plain, mask=is_row)
    tl.store(after + line, smoothed, mask=is_row)


@triton.jit(do_not_specialize=["num_scored"])
def column_maxima(  # type: ignore[no-untyped-def]
    queries,  # (h, rows, d)
    keys,  # (h, t, d)
    tops,  # (h, rows) float32
    totals,  # (h, rows) float32
    scales,  # (h, rows) float32
    reduced,  # (h, n) float32
    sums,  # (h, n) float32
    num_scored,
    num_rows,
    key_head,
    key_token,
    key_channel,
    softcap,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_CAPPED: tl.constexpr,
):
    """A tile of columns over all rows: the maximum of smoothed, rescaled weights, and the sum of weights.

    columns   · · c c c c c c · ·     BLOCK_C; the halo of `reach` on either side is smoothed from, and not written
    """
    reach: tl.constexpr = KERNEL_SIZE // 2
    dtype = keys.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK_C)
    columns = tl.program_id(0) * (BLOCK_C - 2 * reach) - reach + places
    is_column = (columns >= 0) & (columns < num_scored)
    band = (tl.abs(places[:, None] - places[None, :]) <= reach).to(dtype)
    queries += head * num_rows * SIZE
    keys += head * key_head
    highest = tl.zeros((BLOCK_C,), tl.float32)
    summed = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        is_row = rows < num_rows
        top = tl.load(tops + head * num_rows + rows, mask=is_row, other=0.0)
        total = tl.load(totals + head * num_rows + rows, mask=is_row, other=1.0)
        scale = tl.load(scales + head * num_rows + rows, mask=is_row, other=0.0)
        logits = _logits(
            queries, keys, rows, columns, is_row, is_column, key_token, key_channel, softcap,
            SIZE, CHUNK, BLOCK_R, BLOCK_C, IS_CAPPED,
        )  # fmt: skip
        inside = is_row[:, None] & is_column[None, :]
        weights = _weights(logits, top, total, inside, dtype)
        summed += tl.sum(weights, 0)
        if KERNEL_SIZE > 1:
            weights = tl.dot(weights.to(dtype), band, input_precision=PRECISION) / KERNEL_SIZE
        highest = tl.maximum(highest, tl.max(weights * scale[:, None], 0))
    # A maximum passes over NaN, which must not be lost.
    highest = tl.where(summed == summed, highest, summed)
    written = is_column & (places >= reach) & (places < BLOCK_C - reach)
    tl.store(reduced + head * num_scored + columns, highest, mask=written)
    tl.store(sums + head * num_scored + columns, summed, mask=written)
