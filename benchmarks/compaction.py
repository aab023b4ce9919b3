"""The kept entries of a dense layer to a ragged prefix, beside indexing by the mask, and a memory copy."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.result import Result
from benchmarks.settings import Settings, dtype_of
from defensivekv.bench.caches import dense_entries, ragged_lengths
from defensivekv.bench.timing import interleaved, medians
from defensivekv.cache import RaggedPrefix

_OURS, _INDEXED, _COPY = "compaction", "indexing by the mask", "memory copy"


def indexed(keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Keys, values, positions and lengths of what is kept."""
    counts: list[list[int]] = kept.sum(-1).tolist()
    return keys[kept], values[kept], kept.nonzero()[:, -1].to(torch.int32), counts


@torch.inference_mode()
def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result. The floor is reading and writing what is kept at the speed of a copy."""
    dtype, generator = dtype_of(settings.model_dtype), torch.Generator().manual_seed(0)
    h, d, t = settings.heads, settings.head_size, settings.scored
    # Of a model, whose tokens come before its heads.
    keys, values = (
        entries.view(1, t, h, d).transpose(1, 2) for entries in dense_entries(h, t, d, dtype, device, generator)
    )
    lengths = ragged_lengths(h, t, settings.budget, generator)
    ranks = torch.rand(1, h, t, generator=generator).argsort(-1)
    kept = (ranks < torch.tensor(lengths)[:, None]).to(device)
    source = torch.ones(settings.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    rivals: dict[str, Callable[[], object]] = {
        _OURS: partial(RaggedPrefix.gather, keys, values, kept),
        _INDEXED: partial(indexed, keys, values, kept),
        _COPY: partial(target.copy_, source),
    }
    samples = interleaved(rivals, settings.short, device, warmup=3)

    times = medians(samples)
    copied = 2 * sum(lengths) * d * dtype.itemsize
    speed, copy_speed = copied / times[_OURS], source.nbytes / times[_COPY]
    figures = {
        "compaction, GB/s": speed / 1e9,
        "copy, GB/s": copy_speed / 1e9,
        "compaction / copy": speed / copy_speed,
        "against indexing": times[_INDEXED] / times[_OURS],
    }
    described = {
        "dtype": settings.model_dtype,
        "tokens": t,
        "budget": settings.budget,
        "heads": h,
        "head_size": d,
        "lengths": lengths,
        "copy_bytes": settings.copy_bytes,
    }
    return [Result("compaction", described, samples, figures)]
