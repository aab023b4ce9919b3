"""The oracle: dense attention in float32 with the entries that may not be read masked. Slow and obvious."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.cache import PrefixView


def masked_attention(
    queries: Float[Tensor, "b q x d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t v"],
    visible: Bool[Tensor, "b h x t"],
    scaling: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q"] | None = None,
) -> Float[Tensor, "b q x v"]:
    """Attention of every query over the entries visible to it; zero where there are none.

    visible: (b, h, x, t), True where the query may read the entry; the same for a group's query heads.
    Gives float32.
    """
    group = queries.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(group, dim=1)
    values = values.float().repeat_interleave(group, dim=1)
    logits = torch.einsum("bqxd,bqtd->bqxt", queries.float(), keys) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible.repeat_interleave(group, dim=1), float("-inf"))
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bqxt,bqtv->bqxv", weights, values)


def scatter_prefix(
    view: PrefixView, num_tokens: int
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t v"], Bool[Tensor, "b h t"]]:
    """The prefix laid out densely again: keys, values and where they are; evicted entries are zero."""
    prefix, b, h = view.prefix, len(view.rows), len(view.prefix.lengths[0])
    keys = prefix.keys.new_zeros(b, h, num_tokens, prefix.keys.shape[-1])
    values = prefix.values.new_zeros(b, h, num_tokens, prefix.values.shape[-1])
    there = torch.zeros(b, h, num_tokens, dtype=torch.bool, device=keys.device)
    for row, source in enumerate(view.rows):
        for head in range(h):
            positions = prefix.kept_positions(source, head).long()
            keys[row, head, positions] = prefix.keys[prefix.segment(source, head)]
            values[row, head, positions] = prefix.values[prefix.segment(source, head)]
            there[row, head, positions] = True
    return keys, values, there
