"""Partial attention by two matrix products: any device, any dtype, softcaps; logits in float32."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.attention.partial import Partial
from defensivekv.cache import PrefixView

_CHUNK_ELEMENTS = 2**24


def entries_partial(
    queries: Float[Tensor, "*b r d"],
    keys: Float[Tensor, "*b t d"],
    values: Float[Tensor, "*b t v"],
    scaling: float,
    softcap: float | None,
    visible: Bool[Tensor, "*#b r t"] | None = None,
) -> Partial:
    """Packed queries over entries, all visible unless `visible` says otherwise."""
    logits = (queries @ keys.mT).float() * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    log_sum = logits.logsumexp(-1)
    weights = (logits - log_sum.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Partial(weights.to(values.dtype) @ values, log_sum)


def tail_partial(
    queries: Float[Tensor, "b h g x d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t v"],
    scaling: float,
    softcap: float | None,
    visible: Bool[Tensor, "#b #q x t"],
) -> Partial:
    """Queries over a dense tail, some positions at a time so that few logits are held at once."""
    b, h, g, x = queries.shape[:4]
    t = keys.shape[2]
    step = max(1, _CHUNK_ELEMENTS // max(1, b * h * g * t))
    outputs, logs = [], []
    for start in range(0, x, step):
        part = queries[:, :, :, start : start + step]
        mask = visible[:, :, start : start + step]
        heads = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (h, g))
        rows = heads.expand(-1, -1, g, -1, -1).flatten(2, 3)
        result = entries_partial(part.flatten(2, 3), keys, values, scaling, softcap, rows)
        outputs.append(result.output.unflatten(2, (g, -1)))
        logs.append(result.log_sum.unflatten(2, (g, -1)))
    return Partial(torch.cat(outputs, 3).flatten(2, 3), torch.cat(logs, 3).flatten(2, 3))


def prefix_partial(
    queries: Float[Tensor, "b h r d"], view: PrefixView, scaling: float, softcap: float | None
) -> Partial:
    """Packed queries over a ragged prefix, head by head."""
    prefix = view.prefix
    b, h, r, _ = queries.shape
    output = queries.new_zeros(b, h, r, prefix.values.shape[-1])
    log_sum = torch.full((b, h, r), float("-inf"), dtype=torch.float32, device=queries.device)
    for source, readers in view.sharers:
        for head in range(h):
            where = prefix.segment(source, head)
            if where.start == where.stop:
                continue
            packed = queries[readers, head].flatten(0, 1)
            part = entries_partial(packed, prefix.keys[where], prefix.values[where], scaling, softcap)
            output[readers, head] = part.output.view(len(readers), r, -1)
            log_sum[readers, head] = part.log_sum.view(len(readers), r)
    return Partial(output, log_sum)
