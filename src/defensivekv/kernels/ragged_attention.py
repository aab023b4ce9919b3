"""Decode attention over a ragged prefix and a dense tail in two launches: all entries read once, then the merge."""

# mypy: disable-error-code="import-untyped"

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.kernels.attend_splits import attend_splits
from defensivekv.kernels.merge_splits import merge_splits
from defensivekv.kernels.work import Work, chunk_size

_STAGES, _STAGE_BYTES = 3, 2**15
"""Steps of the loop that a program is in, all but one of them being loads, and bytes of keys and values of each.

64 KiB in flight leave room for three programs on a multiprocessor of an H100, and for one on consumers' cards.
"""

_MERGED_SPLITS = 16


@dataclass(frozen=True, eq=False)
class Segments:
    """Ragged entries. keys: (s, d).  values: (s, v).  work: how they are read."""

    keys: Float[Tensor, "s d"]
    values: Float[Tensor, "s v"]
    work: Work


def ragged_attention(
    queries: Float[Tensor, "b q x d"],
    prefix: Segments | None,
    tail_keys: Float[Tensor, "b h c d"],
    tail_values: Float[Tensor, "b h c v"],
    used: int | Int[Tensor, ""],
    *,
    visible: Bool[Tensor, "b q x c"] | None = None,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q"] | None = None,
) -> Float[Tensor, "b q x v"]:
    """Attention over the prefix and the first `used` tokens of the tail, in the queries' dtype.

    queries, tail_keys, tail_values: of any strides but the innermost, which is 1. They and the prefix are of one
    dtype: float16, bfloat16 or float32. Key and value heads of at most 256, for which there is shared memory.
    prefix: what all queries of a batch row may read; None: there is none.
    used: a number, or a 0-d int32 or int64 tensor on the device, at most `c`; what lies beyond is not read.
    visible: what may be read of the tail, of any strides; None: causal, the last `x` tokens being the queries' own.

    Nothing waits for the device, and no shape depends on what is stored there: a captured graph may be replayed after
    the tail has grown, where `used` is a tensor. The first call compiles; it and the making of `prefix` precede a
    capture.
    """
    b, q, x, d = queries.shape
    h, capacity, v = tail_values.shape[1:]
    rows = q // h * x
    packed_rows = rows * (1 if prefix is None else prefix.work.most_readers)
    block = _Block.of(packed_rows, d, v, queries.dtype)
    tail_chunk = chunk_size(b * h * capacity, queries.device)
    tail_chunks = max(1, -(-capacity // tail_chunk))
    tail_tiles = -(-rows // block.m)
    num_items, tiles, prefix_splits = 0, 1, 0
    # Where there is no prefix, no program reads these.
    keys, values, items, readers, first_split = tail_keys, tail_values, queries, queries, queries
    if prefix is not None:
        keys, values = prefix.keys, prefix.values
        items, readers, first_split = prefix.work.items, prefix.work.readers, prefix.work.first_split
        num_items, tiles, prefix_splits = len(items), -(-packed_rows // block.m), prefix.work.num_splits
    splits = prefix_splits + b * h * tail_chunks
    outputs = torch.empty(splits, rows, v, dtype=torch.float32, device=queries.device)
    log_sums = torch.empty(splits, rows, dtype=torch.float32, device=queries.device)
    merged = torch.empty(b, x, q, v, dtype=queries.dtype, device=queries.device).transpose(1, 2)
    is_counted = isinstance(used, Tensor)
    with torch.cuda.device_of(queries):
        attend_splits[(num_items * tiles + b * h * tail_chunks * tail_tiles,)](
            queries,
            keys,
            values,
            items,
            readers,
            first_split,
            tail_keys,
            tail_values,
            used,
            queries if visible is None else visible.view(torch.uint8),
            outputs,
            log_sums,
            float(scaling),
            0.0 if softcap is None else float(softcap),
            num_items,
            tiles,
            tail_tiles,
            prefix_splits,
            tail_chunks,
            tail_chunk,
            h,
            q // h,
            x,
            *queries.stride()[:3],
            keys.stride(0),
            values.stride(0),
            *tail_keys.stride()[:3],
            *tail_values.stride()[:3],
            *((0, 0, 0, 0) if visible is None else visible.stride()),
            KEY_SIZE=d,
            VALUE_SIZE=v,
            BLOCK_D=block.d,
            BLOCK_V=block.v,
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            HAS_PREFIX=prefix is not None,
            HAS_MASK=visible is not None,
            HAS_SOFTCAP=softcap is not None,
            IS_COUNTED=is_counted,
            num_warps=block.warps,
            num_stages=_STAGES,
        )
        merge_splits[(b * q * x,)](
            outputs,
            log_sums,
            first_split,
            queries if sinks is None else sinks,
            merged,
            used,
            prefix_splits,
            tail_chunks,
            tail_chunk,
            h,
            q // h,
            x,
            *merged.stride()[:3],
            VALUE_SIZE=v,
            BLOCK_V=block.v,
            BLOCK_S=_MERGED_SPLITS,
            HAS_PREFIX=prefix is not None,
            HAS_SINKS=sinks is not None,
            IS_COUNTED=is_counted,
            num_warps=4,
        )
    return merged


@dataclass(frozen=True)
class _Block:
    """Sizes of a program's tiles, powers of two: query rows, entries, key size, value size; and its warps.

    More rows, or fewer warps for them, would spill registers; so would the products of float32, which no tensor core
    computes exactly.
    """

    m: int
    n: int
    d: int
    v: int
    warps: int

    @classmethod
    def of(cls, rows: int, key_size: int, value_size: int, dtype: torch.dtype) -> "_Block":
        d, v = (max(16, triton.next_power_of_2(size)) for size in (key_size, value_size))
        m = 16 if rows <= 16 or dtype == torch.float32 else 32
        n = min(max(16, _STAGE_BYTES // (2 * max(d, v) * dtype.itemsize)), 64)
        return cls(m, n, d, v, 4 if m == 16 and dtype != torch.float32 else 8)
