"""One query against a ragged prefix and a short tail, beside dense scaled-dot-product attention over everything."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.result import Result, Target
from benchmarks.settings import Settings, dtype_of
from defensivekv.attention import attend
from defensivekv.bench.caches import dense_entries, ragged_lengths, ragged_prefix
from defensivekv.bench.timing import interleaved, medians
from defensivekv.cache import PrefixView

_RAGGED = "ragged"
_COPY = "memory copy"
_TAIL = 32


def run(settings: Settings, device: torch.device) -> list[Result]:
    """A result for each dtype."""
    return [_run(settings, device, name) for name in settings.attention_dtypes]


def dense_rivals(queries: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways of calling SDPA for (1, q, 1, d) queries over (1, h, t, d) keys and values."""
    group = queries.shape[1] // keys.shape[1]
    packed = queries.unflatten(1, (-1, group)).flatten(2, 3)

    def repeated() -> Tensor:
        return F.scaled_dot_product_attention(
            queries, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        )

    def in_one_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(packed, keys, values)

    rivals: dict[str, Callable[[], Tensor]] = {
        "dense, enable_gqa": partial(F.scaled_dot_product_attention, queries, keys, values, enable_gqa=True),
        "dense, repeated keys": repeated,
        "dense, packed queries": partial(F.scaled_dot_product_attention, packed, keys, values),
        "dense, packed, math kernel": partial(in_one_backend, SDPBackend.MATH),
    }
    if queries.device.type == "cuda":
        rivals["dense, packed, efficient kernel"] = partial(in_one_backend, SDPBackend.EFFICIENT_ATTENTION)
    return rivals


@torch.inference_mode()
def _run(settings: Settings, device: torch.device, dtype_name: str) -> Result:
    dtype = dtype_of(dtype_name)
    generator = torch.Generator().manual_seed(0)
    h, d, t = settings.heads, settings.head_size, settings.tokens
    lengths = ragged_lengths(h, t, settings.budget, generator)
    prefix = ragged_prefix(lengths, t, d, dtype, device, generator)
    keys, values = dense_entries(h, t, d, dtype, device, generator)
    queries = torch.randn(1, h * settings.groups, 1, d, generator=generator).to(device, dtype)
    view = PrefixView(prefix, (0,))
    tail_keys, tail_values = keys[:, :, :_TAIL], values[:, :, :_TAIL]
    source = torch.ones(settings.copy_bytes // 4, device=device)
    target = torch.empty_like(source)

    dense = dense_rivals(queries, keys, values)
    ragged = partial(attend, queries, view, tail_keys, tail_values, scaling=d**-0.5)
    samples = interleaved(
        {_RAGGED: ragged, **dense, _COPY: partial(target.copy_, source)}, settings.short, device, warmup=3
    )

    times = medians(samples)
    best = min(dense, key=times.__getitem__)
    read = prefix.keys.nbytes + prefix.values.nbytes
    speed, copy_speed = read / times[_RAGGED], source.nbytes / times[_COPY]
    figures = {
        "ragged reads, GB/s": speed / 1e9,
        "copy reads, GB/s": copy_speed / 1e9,
        "ragged reads / copy reads": speed / copy_speed,
        f"ragged against the best ({best})": times[best] / times[_RAGGED],
    }
    targets = (
        Target("ragged attention against the best dense call", times[best] / times[_RAGGED], at_least=4.5),
        Target("reads against a memory copy's", speed / copy_speed, at_least=0.7),
    )
    described = {
        "dtype": dtype_name,
        "tokens": t,
        "budget": settings.budget,
        "heads": h,
        "groups": settings.groups,
        "head_size": d,
        "lengths": lengths,
        "tail": _TAIL,
        "copy_bytes": settings.copy_bytes,
    }
    is_held = settings.has_targets and device.type == "cpu" and dtype_name == "float32"
    return Result(f"attention-{dtype_name}", described, samples, figures, targets if is_held else ())
