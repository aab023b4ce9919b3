"""Partial attention by PyTorch's CPU flash kernel, which returns the log-sum-exp that merging needs.

A group's query heads are query rows of their key-value head, so that its entries are read once.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.attention.partial import Partial
from defensivekv.attention.prefix import Kernel


def supports(queries: Tensor, values: Tensor, softcap: float | None) -> bool:
    """Whether the kernel can serve these tensors."""
    return queries.device.type == "cpu" and queries.shape[-1] == values.shape[-1] and softcap is None


def tail_partial(
    queries: Float[Tensor, "b h r d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t v"],
    scaling: float,
    mask: Tensor | None,
) -> Partial:
    """Packed queries over a dense tail; mask: additive, (b or 1, h or 1, r, t), -inf where hidden; or None."""
    output, log_sum = _flash(queries, keys, values, scaling, mask)
    if mask is None:
        return Partial(output, log_sum)
    # The kernel's log-sum-exp of a row that sees nothing is 0.
    empty = torch.isneginf(mask).all(-1).expand_as(log_sum)
    return Partial(output.masked_fill(empty.unsqueeze(-1), 0.0), log_sum.masked_fill(empty, float("-inf")))


def prefix_kernel(scaling: float) -> Kernel:
    """The kernel for blocks of a prefix."""
    return partial(_attend_blocks, scaling=scaling)


def _attend_blocks(
    queries: Float[Tensor, "n r d"],
    keys: Float[Tensor, "n t d"],
    values: Float[Tensor, "n t v"],
    visible: Bool[Tensor, "n t"] | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=queries.dtype).masked_fill_(~visible, float("-inf"))
        mask = mask[:, None, None].expand(-1, -1, queries.shape[1], -1)
    output, log_sum = _flash(queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1), scaling, mask)
    return output.squeeze(1), log_sum.squeeze(1)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=mask, scale=scaling
    )
    return result
