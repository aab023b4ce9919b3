"""Attention over an engine's pages in two launches: programs read chunks of heads where they lie, then the merge.

    a head's entries   [ kept rows, starts[i, h] … starts[i, h + 1] | tokens ]      its chunks  [ 0 | 1 | 2 | 3 ]
    a tile             BLOCK_M of a sequence's rows: position 0: query heads of the group | position 1: …

A program takes one tile through one chunk. A head has at most `splits` chunks, as many as keep all multiprocessors
busy, whatever its length is: that is read on the device, and nothing waits for it. Where lengths are uneven, programs
of long heads go on after those of short ones; several programs for each multiprocessor soften that. With many tiles
there is one chunk, which is the result, and no merge.

Source: flash-decoding (Dao et al., 2023); online softmax as in FlashAttention-2 (arXiv 2307.08691).
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"
# ruff: noqa: D102

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.kernels.merge_splits import LOG2_E

_PROGRAMS_PER_PROCESSOR = 8
_LEAST_CHUNK = tl.constexpr(128)
"""Entries: shorter chunks are not worth their programs."""

_STAGE_BYTES = 2**15
"""Of keys and values, of each step of the loop."""

_MERGED_SPLITS = 16
_COUNTS = ["num_sequences", "num_queries", "splits"]


class Layout(Protocol):
    """Where rows lie in pages: what this needs of `cache.PageLayout`."""

    @property
    def heads(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def block_stride(self) -> int: ...
    @property
    def layer_stride(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def packed_layers(self) -> int: ...
    @property
    def page_rows(self) -> int: ...


class Table(Protocol):
    """The sequences of a step: `cache.PageTable`. Tensors of integers on the queries' device."""

    @property
    def blocks(self) -> Int[Tensor, "r n"]: ...
    @property
    def kept(self) -> Int[Tensor, " r"]: ...
    @property
    def tokens(self) -> Int[Tensor, " r"]: ...
    @property
    def first_query(self) -> Int[Tensor, " r1"]: ...
    @property
    def most_queries(self) -> int: ...


def paged_attention(
    queries: Float[Tensor, "x q d"],
    pages: Float[Tensor, "rows d"],
    layout: Layout,
    layer: int,
    table: Table,
    starts: Int[Tensor, "r h1"],
    *,
    scaling: float,
) -> Float[Tensor, "x q d"]:
    """Attention of every query over its sequence's kept entries and its tokens up to the query's own.

    queries: (x, q, d), of any strides; float16, bfloat16 or float32; d of at most 256, for which there is shared
    memory. pages: (rows, d) contiguous, of the queries' dtype. starts: (r, h + 1), of this layer.
    Gives zeros where there is nothing to read; rows of no sequence's queries are not written.

    Nothing waits for the device, and no shape depends on what is stored there: a captured graph may be replayed with
    other contents of `table`'s and other tensors, as long as no sequence has more than `most_queries`. The first call
    compiles; it precedes a capture.
    """
    x, q, d = queries.shape
    h, r = layout.heads, len(table.blocks)
    output = torch.empty(x, q, d, dtype=queries.dtype, device=queries.device)
    rows = table.most_queries * (q // h)
    if x == 0 or r == 0 or rows == 0:
        return output
    block = _Block.of(rows, d, queries.dtype)
    # A sequence's last tile may be short.
    tiles = r if rows <= block.m else x * (q // h) // block.m + r
    # All kept rows of a sequence may be one head's.
    most_entries = table.blocks.shape[1] * layout.page_rows * layout.packed_layers
    splits = num_splits(tiles * h, most_entries, queries.device)
    parts = output
    if splits > 1:
        parts = torch.empty(splits, x, q, d, dtype=torch.float32, device=queries.device)
    log_sums = torch.empty(splits, x, q, dtype=torch.float32, device=queries.device)
    kept, tokens, first_query = table.kept.contiguous(), table.tokens.contiguous(), table.first_query.contiguous()
    with torch.cuda.device_of(queries):
        _attend_chunks[(tiles, h, splits)](
            queries,
            pages,
            table.blocks,
            kept,
            tokens,
            first_query,
            starts,
            parts,
            log_sums,
            float(scaling),
            r,
            x,
            q // h,
            splits,
            layer,
            layout.first,
            layout.block_stride,
            layout.layer_stride,
            *queries.stride(),
            *table.blocks.stride(),
            *starts.stride(),
            HEADS=h,
            BLOCK_SIZE=layout.block_size,
            PACKED_LAYERS=layout.packed_layers,
            SIZE=d,
            BLOCK_D=block.d,
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            IS_SINGLE=rows <= block.m,
            num_warps=block.warps,
            num_stages=block.stages,
        )
        if splits > 1:
            _merge_chunks[(tiles, h, min(rows, block.m))](
                parts,
                log_sums,
                tokens,
                first_query,
                starts,
                output,
                r,
                x,
                q // h,
                splits,
                *starts.stride(),
                SIZE=d,
                BLOCK_D=block.d,
                BLOCK_M=block.m,
                BLOCK_S=_MERGED_SPLITS,
                IS_SINGLE=rows <= block.m,
                num_warps=4,
            )
    return output


def num_splits(programs: int, most_entries: int, device: torch.device) -> int:
    """How many chunks a head is cut into at most, of what is known on the host.

    programs: as many as read one chunk of every head. most_entries: of a head.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // programs)
    least: int = _LEAST_CHUNK.value
    return max(1, min(wanted, -(-most_entries // least)))


@dataclass(frozen=True)
class _Block:
    """Sizes of a program's tiles, powers of two: query rows, entries, head size; its warps and its stages.

    More rows, or fewer warps for them, would spill registers; so would the products of float32, which no tensor core
    computes exactly. Every second stage is a load of keys and values, since the numbers of their blocks come first:
    of five stages 64 KiB are in flight, which leave room for three programs on a multiprocessor of an H100. Large
    tiles wait less for memory, and need the room.
    """

    m: int
    n: int
    d: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, size: int, dtype: torch.dtype) -> "_Block":
        d = max(16, triton.next_power_of_2(size))
        n = min(max(16, _STAGE_BYTES // (2 * d * dtype.itemsize)), 64)
        if dtype == torch.float32:
            return cls(16, n, d, 8, 5)
        if rows <= 16:
            return cls(16, n, d, 4, 5)
        if rows <= 32 or d > 128:
            return cls(32, n, d, 8, 5)
        return cls(64, n, d, 8, 3)


@triton.jit
def _tile_rows(number, first_query, num_sequences, group, BLOCK_M: tl.constexpr, IS_SINGLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of a tile, and the first of its rows there, which may be beyond the last.

        sequence i has tiles    first_query[i] * group // BLOCK_M + i … first_query[i + 1] * group // BLOCK_M + i + 1

    IS_SINGLE: each has one.
    """
    if IS_SINGLE:
        sequence, first = number, 0
    else:
        sequence, end = tl.full((), 0, tl.int32), num_sequences
        while end - sequence > 1:
            middle = (sequence + end) // 2
            begin = tl.load(first_query + middle).to(tl.int32) * group // BLOCK_M + middle
            sequence, end = tl.where(begin <= number, middle, sequence), tl.where(begin <= number, end, middle)
        tile = number - (tl.load(first_query + sequence).to(tl.int32) * group // BLOCK_M + sequence)
        first = tile * BLOCK_M
    return sequence, first


@triton.jit
def _chunk(entries, splits):  # type: ignore[no-untyped-def]
    """Entries of each of a head's chunks but the last."""
    return tl.maximum((entries + splits - 1) // splits, _LEAST_CHUNK)


@triton.jit(do_not_specialize=[*_COUNTS, "layer", "page_first", "page_block", "page_layer"])
def _attend_chunks(  # type: ignore[no-untyped-def]
    queries,  # (x, q, d)
    pages,  # (rows, d)
    blocks,  # (r, n)
    kept,  # (r,)
    tokens,  # (r,)
    first_query,  # (r + 1,)
    starts,  # (r, h + 1)
    parts,  # (splits, x, q, d): float32, or of one split the result
    log_sums,  # (splits, x, q) float32, base 2
    scaling,
    num_sequences,
    num_queries,  # of all sequences
    group,
    splits,
    layer,
    page_first,  # rows, as in PageLayout
    page_block,
    page_layer,
    query_token,  # strides, in elements
    query_head,
    query_channel,
    block_sequence,
    block_place,
    start_sequence,
    start_head,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED_LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SINGLE: tl.constexpr,
):
    """A tile of query rows over one chunk of its head's entries: its softmax and the log of its sum.

        out = Σ softmax(logits)_n · v_n,    l = log2 Σ 2^logits,    logits = q · k · scaling · log2 e

    A row reads kept entries and the first tokens up to its own; where that is nothing, out = 0 and l = -∞.
    """
    PAGE_ROWS: tl.constexpr = HEADS * BLOCK_SIZE
    head, split = tl.program_id(1), tl.program_id(2)
    sequence, first_row = _tile_rows(tl.program_id(0), first_query, num_sequences, group, BLOCK_M, IS_SINGLE)
    asked = tl.load(first_query + sequence).to(tl.int32)
    asking = tl.load(first_query + sequence + 1).to(tl.int32) - asked
    if first_row >= asking * group:
        return
    bound = starts + sequence.to(tl.int64) * start_sequence + head * start_head
    start = tl.load(bound).to(tl.int32)
    num_kept = tl.load(bound + start_head).to(tl.int32) - start
    num_tokens = tl.load(tokens + sequence).to(tl.int32)
    chunk = _chunk(num_kept + num_tokens, splits)
    first = split * chunk
    # The first chunk is there even if it is empty.
    if (split > 0) & (first >= num_kept + num_tokens):
        return

    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < asking * group
    position = row // group
    query_line = (asked + position).to(tl.int64)
    query_number = head * group + row % group
    # Entries of the head that a row reads, and the last row of the tile.
    limit = num_kept + tl.maximum(num_tokens - asking + position + 1, 0)
    last_position = tl.minimum(first_row + BLOCK_M, asking * group) - 1
    last = num_kept + tl.maximum(num_tokens - asking + last_position // group + 1, 0)
    last = tl.minimum(first + chunk, last)

    slots = tl.load(kept + sequence).to(tl.int32)
    full, rest = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    own = blocks + sequence.to(tl.int64) * block_sequence
    inner, places = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    where = query_line * query_token + query_number * query_head
    query_shown = is_row[:, None] & (inner < SIZE)[None, :]
    query = tl.load(queries + where[:, None] + inner[None, :] * query_channel, mask=query_shown, other=0.0)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0, tl.float32)
    summed = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for begin in range(first, last, BLOCK_N):
        place = begin + places
        there = place < last
        is_kept = place < num_kept

        # As PageLayout.tokens says: within a block, after what is kept there, head after head.
        slot = slots + place - num_kept
        column = slot // BLOCK_SIZE
        before = tl.where(column == full, rest, 0)
        line = before * HEADS + slot % BLOCK_SIZE - before + head * (BLOCK_SIZE - before)
        # As PageLayout.kept says.
        number = start + place
        page = number // PAGE_ROWS
        if PACKED_LAYERS == 1:
            layers = layer
            column = tl.where(is_kept, page, column)
            line = tl.where(is_kept, number % PAGE_ROWS, line)
        else:
            after = number - full * PACKED_LAYERS * PAGE_ROWS
            width = tl.maximum(rest * HEADS, 1)
            in_full = after < 0
            layers = tl.where(is_kept, tl.where(in_full, page % PACKED_LAYERS, after // width), layer)
            column = tl.where(is_kept, tl.where(in_full, page // PACKED_LAYERS, full), column)
            line = tl.where(is_kept, tl.where(in_full, number % PAGE_ROWS, after % width), line)
        block = tl.load(own + column * block_place, mask=there, other=0).to(tl.int64)
        entry = block * page_block + layers * page_layer.to(tl.int64) + page_first + line

        key_shown = there[None, :] & (inner < SIZE)[:, None]
        key = tl.load(pages + entry[None, :] * SIZE + inner[:, None], mask=key_shown, other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * scaling
        seen = there[None, :] & (place[None, :] < limit[:, None])
        logits = tl.where(seen, logits * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk = tl.exp2(highest - finite)
        weights = tl.exp2(logits - finite[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        value_shown = there[:, None] & (inner < SIZE)[None, :]
        value = tl.load(pages + (entry[:, None] + PAGE_ROWS) * SIZE + inner[None, :], mask=value_shown, other=0.0)
        summed = tl.dot(weights.to(value.dtype), value, summed * shrunk[:, None], input_precision="ieee")
        highest = higher

    divisor = tl.where(total == 0.0, 1.0, total)
    out = (split.to(tl.int64) * num_queries + query_line) * (HEADS * group) + query_number
    result = (summed / divisor[:, None]).to(parts.dtype.element_ty)
    tl.store(parts + out[:, None] * SIZE + inner[None, :], result, mask=query_shown)
    tl.store(log_sums + out, highest + tl.log2(divisor), mask=is_row)


@triton.jit(do_not_specialize=_COUNTS)
def _merge_chunks(  # type: ignore[no-untyped-def]
    parts,  # (splits, x, q, d) float32
    log_sums,  # (splits, x, q) float32, base 2
    tokens,  # (r,)
    first_query,  # (r + 1,)
    starts,  # (r, h + 1)
    merged,  # (x, q, d)
    num_sequences,
    num_queries,
    group,
    splits,
    start_sequence,  # strides, in elements
    start_head,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    IS_SINGLE: tl.constexpr,
):
    """One row's output of its chunks' outputs; `BLOCK_S` chunks at a time.

        out = Σ out_i · 2^(l_i - m) / Σ 2^(l_i - m),    m = max l_i

    Source: flash-decoding's second step; Milakov and Gimelshein, arXiv 1805.02867.
    """
    head = tl.program_id(1)
    sequence, first_row = _tile_rows(tl.program_id(0), first_query, num_sequences, group, BLOCK_M, IS_SINGLE)
    asked = tl.load(first_query + sequence).to(tl.int32)
    asking = tl.load(first_query + sequence + 1).to(tl.int32) - asked
    row = first_row + tl.program_id(2)
    if row >= asking * group:
        return
    bound = starts + sequence.to(tl.int64) * start_sequence + head * start_head
    entries = (tl.load(bound + start_head) - tl.load(bound)).to(tl.int32) + tl.load(tokens + sequence).to(tl.int32)
    chunk = _chunk(entries, splits)
    count = tl.maximum((entries + chunk - 1) // chunk, 1)
    heads = tl.num_programs(1) * group
    line = (asked + row // group).to(tl.int64) * heads + head * group + row % group

    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    inner = tl.arange(0, BLOCK_D)
    summed = tl.full((BLOCK_D,), 0.0, tl.float32)
    for begin in range(0, count, BLOCK_S):
        places = begin + tl.arange(0, BLOCK_S)
        there = places < count
        lines = places.to(tl.int64) * num_queries * heads + line
        logs = tl.load(log_sums + lines, mask=there, other=float("-inf"))
        shown = there[:, None] & (inner < SIZE)[None, :]
        outputs = tl.load(parts + lines[:, None] * SIZE + inner[None, :], mask=shown, other=0.0)
        higher = tl.maximum(highest, tl.max(logs, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk = tl.exp2(highest - finite)
        weights = tl.exp2(logs - finite)
        total = total * shrunk + tl.sum(weights, 0)
        summed = summed * shrunk + tl.sum(outputs * weights[:, None], 0)
        highest = higher
    result = summed / tl.where(total == 0.0, 1.0, total)
    tl.store(merged + line * SIZE + inner, result.to(merged.dtype.element_ty), mask=inner < SIZE)
