"""Attention of decoding steps as one operator for compiled code: `torch.ops.defensivekv.ragged_attention`.

All that changes from step to step lies in tensors, how many tokens the tail holds included, so that a compiled step or
a captured CUDA graph goes on by itself.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.attention import native, triton
from defensivekv.cache import PrefixIndex, PrefixView, StaticTail
from defensivekv.errors import InvalidInputError
from defensivekv.kernels.work import Work
from defensivekv.types import Keys, Values

_NAME = "defensivekv::ragged_attention"
_SCHEMA = (
    "(Tensor queries, Tensor keys, Tensor values, Tensor[] plan, SymInt[] sizes, Tensor tail_keys, Tensor tail_values, "
    "Tensor count, Tensor? visible, float scaling, float? softcap, Tensor? sinks) -> Tensor"
)


@dataclass(frozen=True, eq=False)
class StaticReads:
    """A prefix and how the device's kernel goes through it, as tensors and numbers alone.

    keys: (s, d).  values: (s, v).  plan: the tensors of a `PrefixIndex` on a CPU, of a `Work` on a GPU. sizes: the
    numbers of a `Work`.
    """

    keys: Tensor
    values: Tensor
    plan: list[Tensor]
    sizes: list[int]

    @classmethod
    def of(cls, view: PrefixView) -> "StaticReads":
        """How `view` is read. What it is made of stays where it is, as compiled code is told."""
        prefix = view.prefix
        if prefix.keys.is_cuda:
            work = triton.work_of(view)
            plan, sizes = [work.items, work.readers, work.first_split], [work.chunk, work.num_splits, work.most_readers]
        else:
            index = view.index
            plan, sizes = [index.offsets, index.first_reader, index.readers], []
        for tensor in (prefix.keys, prefix.values, *plan):
            # Another cache's prefix, of other lengths, is read by the same compiled code.
            torch._dynamo.mark_static_address(tensor, guard=False)
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return cls(prefix.keys, prefix.values, plan, sizes)


def check_served(keys: Keys, values: Values) -> None:
    """Raises InvalidInputError where no kernel of the device can read entries like these."""
    supports = triton.supports if keys.is_cuda else native.supports
    if not supports(keys[:, :, :1], keys, values):
        raise InvalidInputError(
            f"static tokens need a kernel that serves {keys.dtype} heads of {keys.shape[-1]} and "
            f"{values.shape[-1]} on {keys.device}: {triton.NEEDS if keys.is_cuda else native.needs()}; leave "
            "static_tokens out"
        )


def attend_static(
    queries: Float[Tensor, "b q x d"],
    reads: StaticReads,
    tail: StaticTail,
    *,
    visible: Bool[Tensor, "#b #q x c"] | None = None,
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q"] | None = None,
) -> Float[Tensor, "b q x v"]:
    """As `attend`, over a prefix and what a tail holds by its own count, the last of which are the queries' own.

    visible: of the tail's whole buffers.
    """
    output: Tensor = torch.ops.defensivekv.ragged_attention(
        queries,
        reads.keys,
        reads.values,
        reads.plan,
        reads.sizes,
        tail.key_buffer,
        tail.value_buffer,
        tail.count,
        visible,
        scaling,
        softcap,
        sinks,
    )
    return output.transpose(1, 2)


def _read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: list[Tensor],
    sizes: list[int],
    tail_keys: Tensor,
    tail_values: Tensor,
    count: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if keys.is_cuda:
        prefix = (keys, values, Work(plan[0], plan[1], plan[2], sizes[0], sizes[1], sizes[2]))
        output = triton.read(queries, prefix, tail_keys, tail_values, count, visible, scaling, softcap, sinks)
        return output.transpose(1, 2).contiguous()
    used = int(count)
    segments = native.Segments(keys, values, PrefixIndex(*plan))
    seen = None if visible is None else visible[..., :used]
    tail_keys, tail_values = tail_keys[:, :, :used], tail_values[:, :, :used]
    return native.read(queries, segments, tail_keys, tail_values, seen, scaling, softcap, sinks)


def _shape(queries: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
    b, q, x, _d = queries.shape
    return queries.new_empty(b, x, q, values.shape[-1])


torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, ("cpu", "cuda"), _read)
torch.library.register_fake(_NAME, _shape)
