"""Scores to kept sets: the highest stay. Equal scores at the threshold are taken in an arbitrary order.

A score of -inf is a slot that holds no entry, and never stays.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def keep_highest(scores: list[Float[Tensor, "_ _"]], count: int) -> list[Bool[Tensor, "_ _"]]:
    """The `count` highest scores over all the tensors together, as a mask for each."""
    flat = torch.cat([layer.flatten() for layer in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(min(count, len(flat)), sorted=False).indices] = True
    kept &= flat > float("-inf")
    parts = kept.split([layer.numel() for layer in scores])
    return [part.view(layer.shape) for part, layer in zip(parts, scores, strict=True)]


def keep_highest_per_head(scores: Float[Tensor, "h t"], count: int) -> Bool[Tensor, "h t"]:
    """The `count` highest scores of every head."""
    top = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True) & (scores > float("-inf"))
