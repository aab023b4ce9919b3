"""Attention by the compiled CPU kernel: prefix and tail in one call, at the speed of the memory they are read from."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.cache import PrefixIndex, PrefixView
from defensivekv.kernels.native import DTYPES, find_library
from defensivekv.types import Keys, Values

MAX_ROWS = 64
"""Query heads of a group times positions: more of them are bound by arithmetic, which matrix products do better."""

_LANES = 16


class _Arguments(ctypes.Structure):
    """`Arguments` of ragged_attention.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "threads", "batch", "heads", "group", "positions")),
        *((name, c_int64) for name in ("key_size", "value_size")),
        ("queries", c_void_p),
        ("query_strides", c_int64 * 3),
        ("output", c_void_p),
        ("output_strides", c_int64 * 3),
        *((name, c_void_p) for name in ("keys", "values")),
        ("sources", c_int64),
        *((name, c_void_p) for name in ("offsets", "first_reader", "readers", "tail_keys", "tail_values")),
        ("tail_key_strides", c_int64 * 3),
        ("tail_value_strides", c_int64 * 3),
        ("used", c_int64),
        ("visible", c_void_p),
        ("visible_strides", c_int64 * 4),
        ("sinks", c_void_p),
        *((name, c_float) for name in ("scaling", "softcap")),
    ]


def supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel can serve these tensors, of queries (b, q, x, d) and a tail; compiles it if need be."""
    return (
        queries.device.type == "cpu"
        and queries.dtype in DTYPES
        and queries.dtype == keys.dtype == values.dtype
        and queries.shape[-1] % _LANES == 0
        and values.shape[-1] % _LANES == 0
        and values.shape[-1] > 0
        and queries.shape[1] // keys.shape[1] * queries.shape[2] <= MAX_ROWS
        and find_library().functions is not None
    )


def needs() -> str:
    """What `supports` asks for."""
    library = "" if find_library().functions is not None else f", and its library: {find_library().reason}"
    return (
        "the CPU kernel needs float32, bfloat16 or float16 throughout, head sizes that are multiples of "
        f"{_LANES} and at most {MAX_ROWS} query heads of a group times positions{library}"
    )


@dataclass(frozen=True, eq=False)
class Segments:
    """A prefix's keys (s, d) and values (s, v), and where its heads lie in them."""

    keys: Tensor
    values: Tensor
    index: PrefixIndex


def attend(
    queries: Float[Tensor, "b q x d"],
    view: PrefixView | None,
    tail_keys: Keys,
    tail_values: Values,
    *,
    visible: Bool[Tensor, "#b #q x t"] | None,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " q"] | None,
) -> Float[Tensor, "b q x v"]:
    """As `attention.attend`, of tensors that `supports` agreed to; gives a view of a contiguous (b, x, q, v)."""
    prefix = None if view is None else Segments(view.prefix.keys, view.prefix.values, view.index)
    return read(queries, prefix, tail_keys, tail_values, visible, scaling, softcap, sinks).transpose(1, 2)


def read(
    queries: Float[Tensor, "b q x d"],
    prefix: Segments | None,
    tail_keys: Keys,
    tail_values: Values,
    visible: Bool[Tensor, "#b #q x t"] | None,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " q"] | None,
) -> Float[Tensor, "b x q v"]:
    """The call itself."""
    (b, q, x, d), (h, t), v = queries.shape, tail_keys.shape[1:3], tail_values.shape[-1]
    # Elements of a vector must lie side by side; nothing else is asked of the layout.
    queries, tail_keys, tail_values = (_innermost(tensor) for tensor in (queries, tail_keys, tail_values))
    output = queries.new_empty(b, x, q, v)
    call = _Arguments(
        dtype=DTYPES[queries.dtype],
        threads=torch.get_num_threads(),
        batch=b,
        heads=h,
        group=q // h,
        positions=x,
        key_size=d,
        value_size=v,
        queries=queries.data_ptr(),
        query_strides=queries.stride()[:3],
        output=output.data_ptr(),
        output_strides=(output.stride(0), output.stride(2), output.stride(1)),
        tail_keys=tail_keys.data_ptr(),
        tail_values=tail_values.data_ptr(),
        tail_key_strides=tail_keys.stride()[:3],
        tail_value_strides=tail_values.stride()[:3],
        used=t,
        scaling=scaling,
        softcap=0.0 if softcap is None else softcap,
    )
    if prefix is not None:
        index = prefix.index
        call.keys, call.values = prefix.keys.data_ptr(), prefix.values.data_ptr()
        call.sources = len(index.first_reader) - 1
        call.offsets, call.first_reader = index.offsets.data_ptr(), index.first_reader.data_ptr()
        call.readers = index.readers.data_ptr()
    if visible is not None:
        visible = visible.expand(b, q, x, t)
        call.visible, call.visible_strides = visible.data_ptr(), visible.stride()
    if sinks is not None:
        sinks = sinks.float().contiguous()
        call.sinks = sinks.data_ptr()
    functions = find_library().functions
    assert functions is not None
    if functions.defensivekv_attend(ctypes.byref(call)):
        raise MemoryError("no memory for the partial results of attention")
    return output


def _innermost(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
