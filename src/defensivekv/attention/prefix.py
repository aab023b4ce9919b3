"""Packed queries over a ragged prefix, by any kernel that attends to a batch of equal blocks.

A decoding step has few queries and is bound by memory: all blocks of all heads go into one batched call, and
their parts are merged. Many queries are bound by arithmetic: head by head then, which needs no merging.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.attention.partial import Partial
from defensivekv.cache import PrefixView


@runtime_checkable
class Kernel(Protocol):
    """Attention to each of a batch of blocks by itself.

    Takes queries (n, r, d), keys (n, t, d), values (n, t, v) and which entries may be read, (n, t); None: all.
    Gives outputs (n, r, v), of any floating dtype, and float32 log-sum-exps (n, r).
    """

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """See the class."""
        ...


_MAX_BLOCK_QUERIES = 32
"""Packed queries up to which a call is bound by memory, or too small for the kernel to use its threads."""


def prefix_partial(queries: Float[Tensor, "b h r d"], view: PrefixView, kernel: Kernel) -> Partial:
    """The queries of every batch row over the entries that it sees of the prefix."""
    prefix, r = view.prefix, queries.shape[2]
    most = max(len(readers) for _, readers in view.sharers)
    reads_all = len(view.sharers) == len(prefix.lengths) and len(prefix.keys) > 0
    if not reads_all or most * r > _MAX_BLOCK_QUERIES:
        return _by_head(queries, view, kernel)
    if view.is_identity:
        output, log_sum = _by_block(queries.flatten(0, 1), view, kernel)
        return Partial(output.view(*queries.shape[:3], -1), log_sum.view(queries.shape[:3]))
    return _shared_by_block(queries, view, kernel, most)


def _shared_by_block(queries: Float[Tensor, "b h r d"], view: PrefixView, kernel: Kernel, most: int) -> Partial:
    """Batch rows that read one row of the prefix are packed into more queries of it; all rows are read."""
    b, h, r, d = queries.shape
    sources = len(view.prefix.lengths)
    slots = [0] * b
    packed_rows = [[0] * most for _ in range(sources)]
    for source, readers in view.sharers:
        for slot, reader in enumerate(readers):
            slots[reader], packed_rows[source][slot] = slot, reader
    packed = queries[torch.tensor(packed_rows, device=queries.device)].transpose(1, 2).reshape(sources * h, most * r, d)
    output, log_sum = _by_block(packed, view, kernel)
    rows = torch.tensor([view.rows, slots], device=queries.device)
    output = output.view(sources, h, most, r, -1).transpose(1, 2)[rows[0], rows[1]]
    return Partial(output, log_sum.view(sources, h, most, r).transpose(1, 2)[rows[0], rows[1]])


def _by_block(
    queries: Float[Tensor, "s r d"], view: PrefixView, kernel: Kernel
) -> tuple[Float[Tensor, "s r v"], Float[Tensor, "s r"]]:
    """One queries' batch entry for each segment of the prefix."""
    keys, values, blocks = view.prefix.keys, view.prefix.values, view.prefix.blocks
    size, count, owners = blocks.size, blocks.count, blocks.owners
    block_queries = queries.index_select(0, owners)
    parts = []
    if count:
        whole = slice(0, count * size)
        part = kernel(
            block_queries[:count], keys[whole].view(count, size, -1), values[whole].view(count, size, -1), None
        )
        part[1].index_fill_(0, blocks.mixed, float("-inf"))
        parts.append(part)
    if len(blocks.piece_visible):
        piece_keys = keys.index_select(0, blocks.piece_rows).view(-1, size, keys.shape[-1])
        piece_values = values.index_select(0, blocks.piece_rows).view(-1, size, values.shape[-1])
        parts.append(kernel(block_queries[count:], piece_keys, piece_values, blocks.piece_visible))
    log_sum = torch.cat([part[1] for part in parts])

    shape = queries.shape[:2]
    highest = log_sum.new_full(shape, float("-inf"))
    highest.scatter_reduce_(0, owners[:, None].expand_as(log_sum), log_sum, "amax")
    weights = (log_sum - highest.nan_to_num(neginf=0.0).index_select(0, owners)).exp_()
    total = log_sum.new_zeros(shape).index_add_(0, owners, weights)
    merged = log_sum.new_zeros(*shape, values.shape[-1])
    sizes = [len(part[1]) for part in parts]
    for (output, _), owner, weight in zip(parts, owners.split(sizes), weights.split(sizes), strict=True):
        merged.index_add_(0, owner, output.to(merged.dtype).mul_(weight.unsqueeze(-1)))
    merged /= total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return merged, highest + total.log()


def _by_head(queries: Float[Tensor, "b h r d"], view: PrefixView, kernel: Kernel) -> Partial:
    prefix = view.prefix
    b, h, r, d = queries.shape
    output = queries.new_zeros(b, h, r, prefix.values.shape[-1])
    log_sum = torch.full((b, h, r), float("-inf"), dtype=torch.float32, device=queries.device)
    for source, readers in view.sharers:
        for head in range(h):
            where = prefix.segment(source, head)
            if where.start == where.stop:
                continue
            packed = queries[readers, head].reshape(1, -1, d)
            part = kernel(packed, prefix.keys[None, where], prefix.values[None, where], None)
            output[readers, head] = part[0].view(len(readers), r, -1).to(output.dtype)
            log_sum[readers, head] = part[1].view(len(readers), r)
    return Partial(output, log_sum)
