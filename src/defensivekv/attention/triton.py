"""Attention by the Triton kernel: prefix and tail in one launch, and one more that merges what its programs read."""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.cache import PrefixView
from defensivekv.kernels import is_available
from defensivekv.kernels.work import Work
from defensivekv.types import Keys, Values

MAX_ROWS = 64
"""Query heads of a group times positions: more of them are bound by arithmetic, which matrix products do better."""

MAX_HEAD_SIZE = 256

NEEDS = (
    "the Triton kernel needs CUDA, Triton, float32, bfloat16 or float16 throughout and head sizes of at most "
    f"{MAX_HEAD_SIZE}"
)
"""What `supports` asks for."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_work: WeakKeyDictionary[PrefixView, Work] = WeakKeyDictionary()


def supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel can serve these tensors, of queries (b, q, x, d) and a tail."""
    return (
        is_available(queries.device)
        and queries.dtype in _DTYPES
        and queries.dtype == keys.dtype == values.dtype
        and 0 < queries.shape[-1] <= MAX_HEAD_SIZE
        and 0 < values.shape[-1] <= MAX_HEAD_SIZE
    )


def suits(queries: Tensor, keys: Tensor) -> bool:
    """Whether it is the fastest, where it can serve them: on a GPU, for few queries."""
    return queries.is_cuda and queries.shape[1] // keys.shape[1] * queries.shape[2] <= MAX_ROWS


def attend(
    queries: Float[Tensor, "b q x d"],
    view: PrefixView | None,
    tail_keys: Keys,
    tail_values: Values,
    *,
    used: Int[Tensor, ""] | None = None,
    visible: Bool[Tensor, "#b #q x t"] | None,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " q"] | None,
) -> Float[Tensor, "b q x v"]:
    """As `attention.attend`, of tensors that `supports` agreed to. The result is a view of a contiguous (b, x, q, v).

    used: how much of the tail there is, on the device; None: all of it. A captured graph or compiled step is given
    whole buffers and this, so that the tail can grow between replays; what lies beyond is not read.
    """
    count = tail_keys.shape[2] if used is None else used
    if view is None:
        return read(queries, None, tail_keys, tail_values, count, visible, scaling, softcap, sinks)
    prefix = (view.prefix.keys, view.prefix.values, work_of(view))
    return read(queries, prefix, tail_keys, tail_values, count, visible, scaling, softcap, sinks)


def read(
    queries: Float[Tensor, "b q x d"],
    prefix: tuple[Tensor, Tensor, Work] | None,
    tail_keys: Keys,
    tail_values: Values,
    used: int | Int[Tensor, ""],
    visible: Bool[Tensor, "#b #q x t"] | None,
    scaling: float,
    softcap: float | None,
    sinks: Float[Tensor, " q"] | None,
) -> Float[Tensor, "b q x v"]:
    """The call itself. prefix: keys (s, d), values (s, v) and how they are gone through."""
    from defensivekv.kernels.ragged_attention import Segments, ragged_attention

    b, q, x, _ = queries.shape
    return ragged_attention(
        _innermost(queries),
        None if prefix is None else Segments(_innermost(prefix[0]), _innermost(prefix[1]), prefix[2]),
        _innermost(tail_keys),
        _innermost(tail_values),
        used,
        visible=None if visible is None else visible.expand(b, q, x, -1),
        scaling=scaling,
        softcap=softcap,
        sinks=None if sinks is None else sinks.contiguous(),
    )


def work_of(view: PrefixView) -> Work:
    """How the kernel reads the view: made when first asked for, which copies to the device, and kept as long as it."""
    work = _work.get(view)
    if work is None:
        work = _work[view] = Work.of(view.prefix.lengths, view.rows, view.prefix.keys.device)
    return work


def _innermost(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
