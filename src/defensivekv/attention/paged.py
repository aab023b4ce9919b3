"""Attention of new tokens over what stayed of their prompts and the tokens since, in an engine's pages."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.attention import native_pages, triton
from defensivekv.attention.reference import masked_attention
from defensivekv.cache import PageLayout, PageTable

Starts = Int[Tensor, "r h1"]
"""Of one layer: where each head's kept rows begin among its sequence's, and where the last one's end; int32."""


@torch.no_grad()
def attend_pages(
    queries: Float[Tensor, "x q d"],
    pages: Float[Tensor, "rows d"],
    layout: PageLayout,
    layer: int,
    table: PageTable,
    starts: Starts,
    *,
    scaling: float,
) -> Float[Tensor, "x q d"]:
    """Attention of every query over its sequence's kept entries and its tokens up to the query's own.

    queries: (x, q, d), of all sequences one after the other, as `table.first_query` says.
    pages: (rows, d) contiguous, of the queries' dtype. starts: (r, h + 1), of this layer.
    """
    if native_pages.supports(queries, pages):
        return native_pages.read(queries, pages, layout, layer, table, starts, scaling)
    if queries.is_cuda and pages.is_contiguous() and triton.supports(queries, pages, pages):
        from defensivekv.kernels.paged_attention import paged_attention

        return paged_attention(queries, pages, layout, layer, table, starts, scaling=scaling)
    return gathered_attention(queries, pages, layout, layer, table, starts, scaling=scaling)


def gathered_attention(
    queries: Float[Tensor, "x q d"],
    pages: Float[Tensor, "rows d"],
    layout: PageLayout,
    layer: int,
    table: PageTable,
    starts: Starts,
    *,
    scaling: float,
) -> Float[Tensor, "x q d"]:
    """The same on any device, head by head, from copies of what is read. Slow and obvious."""
    output = torch.empty_like(queries)
    group = queries.shape[1] // layout.heads
    for sequence, blocks in enumerate(table.blocks):
        first, last = table.first_query[sequence].item(), table.first_query[sequence + 1].item()
        if first == last:
            continue
        slots, count = int(table.kept[sequence]), int(table.tokens[sequence])
        numbers = torch.arange(count, device=blocks.device)
        tokens = layout.rows(blocks, layout.tokens(numbers, slots), layer)
        seen = numbers[None] <= (count - (last - first) + torch.arange(last - first, device=blocks.device))[:, None]
        for head in range(layout.heads):
            bounds = starts[sequence, head : head + 2].tolist()
            kept = layout.kept(torch.arange(*bounds, device=blocks.device), slots)
            rows = torch.cat((layout.rows(blocks, kept, layer), tokens[:, head]))
            visible = torch.cat((seen.new_ones(len(seen), bounds[1] - bounds[0]), seen), dim=1)
            heads = slice(head * group, (head + 1) * group)
            output[first:last, heads] = masked_attention(
                queries[None, first:last, heads].transpose(1, 2),
                pages[rows][None, None],
                pages[rows + layout.page_rows][None, None],
                visible[None, None],
                scaling,
            )[0].transpose(0, 1)
    return output
