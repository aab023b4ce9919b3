"""Scores of the observation window with defensive aggregation, without ever writing the window's attention weights.

    A[r, c]   = softmax over all t columns of softcap(q_r · k_c · scaling) under the causal mask, in the keys' dtype
    sums[c]   = Σ_r A[r, c]                                                    r: the w queries of g query heads
    S[r, c]   = (A[r, c - s] + … + A[r, c + s]) / kernel_size                  s = kernel_size // 2, zeros outside
    scores[c] = max_r S[r, c] · Σ_c A[r, c] / (Σ_c S[r, c] + 1e-12)            c < n = t - w

             columns   0 ………………………… n ……… t         a head's keys are read three times, and A is made three times:
    rows   g * w  ┌──────────────────┬──────┐       1  top[r], Σ_c exp(logit - top)        all t, in splits
                  │ every one is seen│◣     │       2  Σ_c A[r, c], Σ_c S[r, c]            n, in splits
                  └──────────────────┴──────┘       3  max and sum over rows               n, in tiles with a halo of s

Σ_c S[r, c] needs no S: an entry counts in as many places as the filter reaches from it. In tiles, S is a product with
a band matrix of ones, exact but for the rounding of sums: no other way leads to a neighbour's column in a register.

Products are rounded to the dtype of queries and keys before the softmax, and weights after it, as the model's own
attention would. Source: equations 6 to 8 of arXiv 2510.13334, the floor at the mean left out.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from defensivekv.kernels.window_passes import column_maxima, row_sums, softmax_parts

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_HEAD_SIZE = 256

MAX_KERNEL_SIZE = 31
"""Of the mean filter: its halo, on both sides of a tile, leaves more than half of the tile."""

_SPLIT = 512
"""Columns of one program of the passes over rows."""

_TINY = 1e-12


def window_scores(
    queries: Float[Tensor, "q w d"],
    keys: Float[Tensor, "h t d"],
    *,
    scaling: float,
    kernel_size: int,
    softcap: float | None = None,
    sinks: Float[Tensor, " q"] | None = None,
) -> tuple[Float[Tensor, "h n"], Float[Tensor, "h n"]]:
    """Scores and sums of the weights, float32, of the first `n = t - w` of one row's entries.

    queries: of the last `w` tokens. Both of one of `DTYPES` and of any strides. scaling: on queries, in their dtype.
    kernel_size: odd, at most `MAX_KERNEL_SIZE`; 1: no smoothing. softcap, sinks: as in `Observation`.

    What is held beside the results is `O(h * rows * t / 512)`. A row of NaN gives NaN in all of its head's entries.
    """
    (q, w, d), (h, t, _) = queries.shape, keys.shape
    n, rows = t - w, q // h * w
    results = torch.empty(2, h, n, dtype=torch.float32, device=keys.device)
    if n == 0:
        return results[0], results[1]
    grouped = (queries * scaling).reshape(h, rows, d)
    tiles = _Tiles.of(rows, d, keys.dtype)
    strides, cap = keys.stride(), 0.0 if softcap is None else softcap
    options = {
        "SIZE": d,
        "CHUNK": tiles.chunk,
        "BLOCK_R": tiles.rows,
        "BLOCK_C": tiles.columns,
        "IS_CAPPED": softcap is not None,
        "num_warps": tiles.num_warps,
        "num_stages": 2,
    }
    row_tiles = triton.cdiv(rows, tiles.rows)

    def of_splits(columns: int) -> Float[Tensor, "2 splits h rows"]:
        return torch.empty(2, triton.cdiv(columns, _SPLIT), h, rows, dtype=torch.float32, device=keys.device)

    # Triton launches on the current device, which need not be that of the layer.
    with torch.cuda.device_of(keys):
        tops, totals = of_splits(t)
        softmax_parts[(len(tops), h, row_tiles)](
            grouped, keys, tops, totals, t, rows, w, *strides, cap, SPLIT=_SPLIT, **options
        )
        top, total = _merged(tops, totals, sinks)
        before, after = of_splits(n)
        row_sums[(len(before), h, row_tiles)](
            grouped, keys, top, total, before, after, n, rows, *strides, cap,
            SPLIT=_SPLIT, KERNEL_SIZE=kernel_size, **options,
        )  # fmt: skip
        scale = before.sum(0) / (after.sum(0) + _TINY)
        column_maxima[(triton.cdiv(n, tiles.columns - kernel_size + 1), h)](
            grouped, keys, top, total, scale, *results, n, rows, *strides, cap,
            KERNEL_SIZE=kernel_size, PRECISION=_band_precision(keys.dtype), **options,
        )  # fmt: skip
    return results[0], results[1]


def _merged(
    tops: Float[Tensor, "splits h rows"], totals: Float[Tensor, "splits h rows"], sinks: Float[Tensor, " q"] | None
) -> tuple[Float[Tensor, "h rows"], Float[Tensor, "h rows"]]:
    """Of all columns: the highest logit of each row, and the sum of exponents less it, the sink's with them."""
    top = tops.amax(0)
    if sinks is None:
        return top, (totals * (tops - top).exp()).sum(0)
    sink = sinks.float().view(len(top), -1).repeat_interleave(top.shape[1] * len(top) // len(sinks), 1)
    top = torch.maximum(top, sink)
    return top, (totals * (tops - top).exp()).sum(0) + (sink - top).exp()


def _band_precision(dtype: torch.dtype) -> str:
    """Of float32, three products of tensor cores on NVIDIA's: of ones, as exact as a sum, and registers suffice."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


@dataclass(frozen=True)
class _Tiles:
    """Of a program, powers of two: rows, columns, and channels of a product at a time."""

    rows: int
    columns: int
    chunk: int
    num_warps: int

    @classmethod
    def of(cls, rows: int, size: int, dtype: torch.dtype) -> "_Tiles":
        """In float32, products are made without tensor cores, of operands in registers: of few channels at a time."""
        is_wide = dtype == torch.float32
        most_rows, most_channels = (32, 16) if is_wide else (128 if size <= 128 else 64, 128)
        rows = min(max(16, triton.next_power_of_2(rows)), most_rows)
        chunk = min(max(16, triton.next_power_of_2(size)), most_channels)
        return cls(rows, 64, chunk, 8 if is_wide or rows > 64 else 4)
