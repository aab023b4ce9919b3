"""The second launch of ragged attention: partial results of the splits of each query, merged by log-sum-exp."""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["used", "prefix_splits", "tail_chunks", "tail_chunk", "heads"])
def merge_splits(  # type: ignore[no-untyped-def]
    outputs,  # (splits, r, v) float32
    log_sums,  # (splits, r) float32, base 2
    first_split,  # (b * h + 1,)
    sinks,  # (q,)
    merged,  # (b, q, x, v)
    used,  # tokens in the tail, or where they are stored
    prefix_splits,  # before those of the tail
    tail_chunks,  # of each batch row and head
    tail_chunk,  # entries
    heads,
    group,
    num_queries,
    merged_batch,  # strides, in elements
    merged_head,
    merged_query,
    VALUE_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):
    """One query's output of its splits' outputs; zero where no split saw anything.

        out = Σ out_i · 2^(l_i - m) / Σ 2^(l_i - m),    m = max l_i,    the sink being an l_i without an out_i

        pair p = (batch row, head)    prefix    first_split[p] … first_split[p + 1]
                                      tail      prefix_splits + p * tail_chunks …    those that hold any of `used`

    One program per batch row and query row; `BLOCK_S` splits at a time.
    Source: flash-decoding's second step; Milakov and Gimelshein, arXiv 1805.02867.
    """
    program = tl.program_id(0)
    rows = group * num_queries
    pair, packed = program // rows, program % rows
    batch, head = pair // heads, pair % heads
    query_head = head * group + packed // num_queries

    held = tl.load(used).to(tl.int32) if IS_COUNTED else used
    tail_count = tl.minimum((held + tail_chunk - 1) // tail_chunk, tail_chunks)
    tail_first = prefix_splits + pair * tail_chunks
    prefix_first, prefix_count = 0, 0
    if HAS_PREFIX:
        prefix_first = tl.load(first_split + pair)
        prefix_count = tl.load(first_split + pair + 1) - prefix_first
    count = prefix_count + tail_count

    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + query_head).to(tl.float32) * LOG2_E
        total += 1.0
    columns = tl.arange(0, BLOCK_V)
    summed = tl.full((BLOCK_V,), 0.0, tl.float32)
    for start in range(0, count, BLOCK_S):
        places = start + tl.arange(0, BLOCK_S)
        splits = tl.where(places < prefix_count, prefix_first + places, tail_first + places - prefix_count)
        lines = splits.to(tl.int64) * rows + packed
        there = places < count
        logs = tl.load(log_sums + lines, mask=there, other=float("-inf"))
        shown = there[:, None] & (columns < VALUE_SIZE)[None, :]
        parts = tl.load(outputs + lines[:, None] * VALUE_SIZE + columns[None, :], mask=shown, other=0.0)
        higher = tl.maximum(highest, tl.max(logs, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(highest - finite)
        weights = tl.exp2(logs - finite)
        total = total * kept + tl.sum(weights, 0)
        summed = summed * kept + tl.sum(parts * weights[:, None], 0)
        highest = higher
    result = summed / tl.where(total == 0.0, 1.0, total)
    where = batch.to(tl.int64) * merged_batch + query_head * merged_head + packed % num_queries * merged_query
    tl.store(merged + where + columns, result.to(merged.dtype.element_ty), mask=columns < VALUE_SIZE)
