"""Softmax attention over a part of the entries, and how parts are merged.

With `l = log Σ exp(logits)` of each part, the whole is `Σ out_i · exp(l_i - l)`, `l = log Σ exp(l_i)`
(flash-decoding; Milakov and Gimelshein, arXiv 1805.02867).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partial:
    """Attention of packed queries over some entries.

    output: (b, h, r, v) the weighted values, `r = g * x` packed queries.
    log_sum: (b, h, r) float32, the log of the summed exponentials; -inf where there was no entry.
    """

    output: Float[Tensor, "b h r v"]
    log_sum: Float[Tensor, "b h r"]


def merge(parts: list[Partial], sinks: Float[Tensor, "h r"] | None = None) -> Float[Tensor, "b h r v"]:
    """The attention over all parts together, in the first part's dtype; zero where there is no entry at all.

    sinks: (h, r) logits that take part in the softmax without a value.
    """
    logs = [part.log_sum for part in parts]
    if sinks is not None:
        logs.append(sinks.float().expand_as(logs[0]))
    stacked = torch.stack(logs)
    highest = stacked.amax(0).nan_to_num(neginf=0.0)
    weights = (stacked - highest).exp()
    weights = weights / weights.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    output = sum(part.output * weight.unsqueeze(-1) for part, weight in zip(parts, weights, strict=False))
    assert isinstance(output, Tensor)
    return output.to(parts[0].output.dtype)


def pack(queries: Float[Tensor, "b q x d"], num_heads: int) -> Float[Tensor, "b h r d"]:
    """A group's query heads as query rows of their key-value head, so that its entries are read once."""
    b, q, x, d = queries.shape
    return queries.reshape(b, num_heads, q // num_heads * x, d)


def unpack(packed: Float[Tensor, "b h r v"], num_queries: int) -> Float[Tensor, "b q x v"]:
    """The inverse of `pack` for outputs; `num_queries` is `x`."""
    b, h, r, v = packed.shape
    return packed.reshape(b, h * (r // num_queries), num_queries, v)
