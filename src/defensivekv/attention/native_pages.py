"""Attention over an engine's pages by the compiled CPU kernel, which reads them where they lie."""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.attention.native import MAX_ROWS
from defensivekv.cache import PageLayout, PageTable
from defensivekv.kernels.native import DTYPES, find_library

_LANES = 16


class _Arguments(ctypes.Structure):
    """`PageArguments` of paged_attention.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "threads", "sequences", "heads", "group", "size", "most_rows")),
        ("queries", c_void_p),
        ("query_strides", c_int64 * 2),
        ("output", c_void_p),
        ("output_strides", c_int64 * 2),
        ("pages", c_void_p),
        *((name, c_int64) for name in ("block_size", "block_stride", "first")),
        *((name, c_int64) for name in ("layer", "layer_stride", "packed_layers")),
        ("blocks", c_void_p),
        ("blocks_stride", c_int64),
        *((name, c_void_p) for name in ("kept", "tokens", "first_query", "starts")),
        ("scaling", c_float),
    ]


def supports(queries: Float[Tensor, "x q d"], pages: Float[Tensor, "rows d"]) -> bool:
    """Whether the kernel can serve these tensors; compiles it if need be."""
    return (
        queries.device.type == "cpu"
        and queries.dtype in DTYPES
        and queries.dtype == pages.dtype
        and queries.shape[-1] % _LANES == 0
        and queries.shape[-1] > 0
        and pages.is_contiguous()
        and find_library().functions is not None
    )


def read(
    queries: Float[Tensor, "x q d"],
    pages: Float[Tensor, "rows d"],
    layout: PageLayout,
    layer: int,
    table: PageTable,
    starts: Int[Tensor, "r h1"],
    scaling: float,
) -> Float[Tensor, "x q d"]:
    """As `attend_pages`, of tensors that `supports` agreed to; rows of no sequence's queries are not written."""
    (_, q, d), h = queries.shape, layout.heads
    # Elements of a vector must lie side by side, and numbers as the kernel counts on them.
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    blocks = table.blocks.int()
    blocks = blocks if blocks.stride(-1) == 1 else blocks.contiguous()
    kept, tokens, first_query, starts = (
        numbers.int().contiguous() for numbers in (table.kept, table.tokens, table.first_query, starts)
    )
    output = queries.new_empty(queries.shape)
    call = _Arguments(
        dtype=DTYPES[queries.dtype],
        threads=torch.get_num_threads(),
        sequences=len(blocks),
        heads=h,
        group=q // h,
        size=d,
        most_rows=MAX_ROWS,
        queries=queries.data_ptr(),
        query_strides=queries.stride()[:2],
        output=output.data_ptr(),
        output_strides=output.stride()[:2],
        pages=pages.data_ptr(),
        block_size=layout.block_size,
        block_stride=layout.block_stride,
        first=layout.first,
        layer=layer,
        layer_stride=layout.layer_stride,
        packed_layers=layout.packed_layers,
        blocks=blocks.data_ptr(),
        blocks_stride=blocks.stride(0),
        kept=kept.data_ptr(),
        tokens=tokens.data_ptr(),
        first_query=first_query.data_ptr(),
        starts=starts.data_ptr(),
        scaling=scaling,
    )
    functions = find_library().functions
    assert functions is not None
    if functions.defensivekv_attend_pages(ctypes.byref(call)):
        raise MemoryError("no memory for the partial results of attention")
    return output
