"""Attention of new queries over a ragged prefix and a dense tail: the choice of backend, and the merge."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.attention import flash_cpu, matmul, native, triton
from defensivekv.attention.partial import Partial, merge, pack, unpack
from defensivekv.attention.prefix import prefix_partial
from defensivekv.cache import PrefixView
from defensivekv.errors import InvalidInputError
from defensivekv.types import Keys, Values

Backend = Literal["auto", "native", "triton", "flash-cpu", "matmul"]

_MATMUL_QUERIES = 4
_MATMUL_ENTRIES = 2**14
"""Packed queries up to which, and entries from which on, matrix products beat the flash kernel in float32."""


def causal_mask(num_queries: int, num_tokens: int, device: torch.device) -> Bool[Tensor, "1 1 x t"]:
    """True where a query may read: the last query sees all tokens, the one before it one less, and so on."""
    everything = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=device)
    return everything.tril(num_tokens - num_queries)[None, None]


@torch.no_grad()
def attend(
    queries: Float[Tensor, "b q x d"],
    view: PrefixView | None,
    tail_keys: Keys,
    tail_values: Values,
    *,
    visible: Bool[Tensor, "#b #q x t"] | None = None,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b q x v"]:
    """Attention over the prefix and the tail, in the queries' dtype. No gradient flows through it.

    queries: (b, q, x, d), after RoPE. view: the prefix, all of which every query may read; None: there is none.
    tail_keys, tail_values: (b, h, t, d or v), the last `x` tokens being the queries' own.
    visible: (b or 1, 1 or q, x, t) what may be read of the tail; None: causal.
    scaling: factor on the logits. softcap, sinks: as in `Observation`.
    backend: "native" (few queries on a CPU, where there is a compiler), "triton" (CUDA, fastest for few queries),
        "flash-cpu" (CPU, no softcap), "matmul" (anywhere) or "auto", the fastest that can: in this order, except that
        many queries are not read by "triton", and that without "native" few float32 queries read a large prefix by
        "matmul".

    Raises InvalidInputError where the backend cannot serve the tensors.
    """
    x = queries.shape[2]
    h, t = tail_keys.shape[1:3]
    can_run_native = backend in ("auto", "native") and native.supports(queries, tail_keys, tail_values)
    if can_run_native:
        return native.attend(
            queries, view, tail_keys, tail_values, visible=visible, scaling=scaling, softcap=softcap, sinks=sinks
        )
    if backend == "native":
        raise InvalidInputError(f"backend 'native' cannot serve these tensors: {native.needs()}")
    wants_triton = backend == "triton" or (backend == "auto" and triton.suits(queries, tail_keys))
    if wants_triton and triton.supports(queries, tail_keys, tail_values):
        return triton.attend(
            queries, view, tail_keys, tail_values, visible=visible, scaling=scaling, softcap=softcap, sinks=sinks
        )
    if backend == "triton":
        raise InvalidInputError(f"backend 'triton' cannot serve these tensors: {triton.NEEDS}")
    packed = pack(queries, h)
    group_sinks = None if sinks is None else sinks.view(h, -1, 1).expand(-1, -1, x).flatten(1)
    can_flash = flash_cpu.supports(queries, tail_values, softcap)
    if backend == "flash-cpu" and not can_flash:
        raise InvalidInputError("backend 'flash-cpu' needs CPU tensors, equal key and value heads and no softcap")
    flash = can_flash and backend != "matmul"
    parts: list[Partial] = []
    if t and flash:
        mask = _additive(visible, x, packed, t)
        parts.append(flash_cpu.tail_partial(packed, tail_keys, tail_values, scaling, mask))
    elif t:
        seen = causal_mask(x, t, queries.device) if visible is None else visible
        grouped = packed.unflatten(2, (-1, x))
        parts.append(matmul.tail_partial(grouped, tail_keys, tail_values, scaling, softcap, seen))
    if view is not None:
        products = not flash or (backend == "auto" and _suits_matmul(packed, view))
        kernel = matmul.prefix_kernel(scaling, softcap) if products else flash_cpu.prefix_kernel(scaling)
        parts.append(prefix_partial(packed, view, kernel))
    if not parts:
        return queries.new_zeros(*queries.shape[:3], tail_values.shape[-1])
    return unpack(merge(parts, group_sinks), x).to(queries.dtype)


def _suits_matmul(packed: Float[Tensor, "b h r d"], view: PrefixView) -> bool:
    is_large = len(view.prefix.keys) >= _MATMUL_ENTRIES
    return is_large and packed.dtype == torch.float32 and packed.shape[2] <= _MATMUL_QUERIES


def _additive(
    visible: Bool[Tensor, "#b #q x t"] | None, num_queries: int, packed: Float[Tensor, "b h r d"], num_tokens: int
) -> Float[Tensor, "#b #h r t"] | None:
    """The kernel's mask for packed queries; None where everything may be read."""
    if visible is None:
        if num_queries == 1:
            return None
        visible = causal_mask(num_queries, num_tokens, packed.device)
    h, r = packed.shape[1:3]
    group = r // num_queries
    if visible.shape[1] == 1:
        rows = visible.expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
    else:
        rows = visible.unflatten(1, (h, group)).flatten(2, 3)
    return torch.zeros(rows.shape, dtype=packed.dtype).masked_fill_(~rows, float("-inf"))
