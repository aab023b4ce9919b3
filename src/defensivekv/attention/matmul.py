"""Partial attention by two matrix products: any device, any dtype, softcaps; the softmax in float32."""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.attention.partial import Partial
from defensivekv.attention.prefix import Kernel

_CHUNK_ELEMENTS = 2**24
_FEW_QUERIES = 16
_FOLDS = 8


def entries_partial(
    queries: Float[Tensor, "n r d"],
    keys: Float[Tensor, "n t d"],
    values: Float[Tensor, "n t v"],
    scaling: float,
    softcap: float | None,
    visible: Bool[Tensor, "n #r t"] | None = None,
) -> tuple[Float[Tensor, "n r v"], Float[Tensor, "n r"]]:
    """Queries over entries, all visible unless `visible` says otherwise: outputs and float32 log-sum-exps."""
    logits = _logits(queries, keys, scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    highest = _amax(logits).unsqueeze(-1).nan_to_num_(neginf=0.0)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    output = torch.bmm(weights.to(values.dtype), values) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return output, (highest + total.log()).squeeze(-1)


def _logits(queries: Float[Tensor, "n r d"], keys: Float[Tensor, "n t d"], scaling: float) -> Float[Tensor, "n r t"]:
    """A new float32 tensor."""
    if queries.dtype == torch.float32 and queries.shape[1] <= _FEW_QUERIES:
        # Keys first: for few queries, MKL's product is twice as fast as with the keys transposed.
        return torch.bmm(keys, (queries * scaling).mT).mT
    if queries.is_cuda and torch.version.hip is None:
        return torch.bmm(queries, keys.mT, out_dtype=torch.float32).mul_(scaling)
    return torch.bmm(queries, keys.mT).float().mul_(scaling)


def _amax(logits: Float[Tensor, "n r t"]) -> Float[Tensor, "n r"]:
    """Over the entries. Halfway along wide rows where queries lie innermost: a few at a time are not vectorised."""
    n, r, t = logits.shape
    if not logits.mT.is_contiguous() or t % _FOLDS:
        return logits.amax(-1)
    folded = logits.mT.view(n, _FOLDS, -1).amax(1)
    return folded.view(n, -1, r).amax(1)


def prefix_kernel(scaling: float, softcap: float | None) -> Kernel:
    """The kernel for blocks of a prefix."""
    return partial(_attend_blocks, scaling=scaling, softcap=softcap)


def _attend_blocks(
    queries: Float[Tensor, "n r d"],
    keys: Float[Tensor, "n t d"],
    values: Float[Tensor, "n t v"],
    visible: Bool[Tensor, "n t"] | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Some queries at a time, so that few logits are held at once."""
    step = max(1, _CHUNK_ELEMENTS // (keys.shape[0] * keys.shape[1]))
    mask = None if visible is None else visible.unsqueeze(1)
    parts = [entries_partial(part, keys, values, scaling, softcap, mask) for part in queries.split(step, 1)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)


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
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    outputs, logs = [], []
    for start in range(0, x, step):
        part = queries[:, :, :, start : start + step].reshape(b * h, -1, queries.shape[-1])
        mask = visible[:, :, start : start + step]
        heads = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (h, g))
        rows = heads.expand(b, h, g, -1, -1).reshape(b * h, -1, t)
        output, log_sum = entries_partial(part, flat_keys, flat_values, scaling, softcap, rows)
        outputs.append(output.view(b, h, g, -1, output.shape[-1]))
        logs.append(log_sum.view(b, h, g, -1))
    return Partial(torch.cat(outputs, 3).flatten(2, 3), torch.cat(logs, 3).flatten(2, 3))
