"""Scores of a layer's entries by its last queries, with defensive aggregation, beside the same in plain operations."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result import Result
from benchmarks.settings import Settings, dtype_of
from defensivekv import Observation
from defensivekv.bench.caches import dense_entries
from defensivekv.bench.timing import interleaved, medians
from defensivekv.policies.aggregation import Defensive
from defensivekv.policies.evidence import observe
from defensivekv.policies.scoring import WindowAttention

_OURS, _PLAIN, _COPY = "window scores", "plain operations", "memory copy"
_KERNEL_SIZE = 5


def plain(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(q, w, d) queries and (h, t, d) keys to scores and sums, (h, n), as one would write it down."""
    h, t, d = keys.shape
    q, w, _ = queries.shape
    logits = (queries * d**-0.5).view(h, q // h * w, d) @ keys.mT
    future = torch.ones(w, w, dtype=torch.bool, device=keys.device).triu(1)
    logits.view(h, -1, w, t)[..., t - w :].masked_fill_(future, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32)[..., : t - w].to(keys.dtype).float()
    smooth = F.avg_pool1d(weights, _KERNEL_SIZE, stride=1, padding=_KERNEL_SIZE // 2)
    scale = weights.sum(-1, keepdim=True) / (smooth.sum(-1, keepdim=True) + 1e-12)
    return (smooth * scale).amax(1), weights.sum(1)


@torch.inference_mode()
def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result. The floor is the reading of the keys, once, at the bandwidth of a copy."""
    dtype, generator = dtype_of(settings.model_dtype), torch.Generator().manual_seed(0)
    h, d, t, w = settings.heads, settings.head_size, settings.scored, settings.window
    keys, values = dense_entries(h, t, d, dtype, device, generator)
    queries = torch.randn(1, h * settings.groups, w, d, generator=generator).to(device, dtype)
    row = Observation(queries=queries, keys=keys, values=values)
    source = torch.ones(settings.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    ours = partial(
        observe,
        row,
        w,
        scorer=WindowAttention(),
        aggregation=Defensive(_KERNEL_SIZE),
        preference=None,
        with_means=True,
    )
    rivals: dict[str, Callable[[], object]] = {
        _OURS: ours,
        _PLAIN: partial(plain, queries[0], keys[0]),
        _COPY: partial(target.copy_, source),
    }
    samples = interleaved(rivals, settings.medium, device, warmup=2)

    times = medians(samples)
    # A copy reads and writes every byte.
    speed, copy_speed = keys.nbytes / times[_OURS], 2 * source.nbytes / times[_COPY]
    figures = {
        "keys, GB/s": speed / 1e9,
        "copy, GB/s read and written": copy_speed / 1e9,
        "keys / copy": speed / copy_speed,
        "against plain operations": times[_PLAIN] / times[_OURS],
    }
    described = {
        "dtype": settings.model_dtype,
        "tokens": t,
        "window": w,
        "heads": h,
        "groups": settings.groups,
        "head_size": d,
        "copy_bytes": settings.copy_bytes,
    }
    return [Result("window-scores", described, samples, figures)]
