"""The Triton kernel of ragged attention at a batch, on the device alone: bytes a second beside a device copy's."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention import dense_rivals
from benchmarks.result import Result, Target
from benchmarks.settings import Settings, dtype_of
from defensivekv.attention import attend
from defensivekv.bench.caches import dense_entries, ragged_lengths, ragged_prefix
from defensivekv.bench.timing import interleaved, medians
from defensivekv.cache import PrefixView

_BATCH = 8
_TAIL = 32
_CALLS = 10
"""Calls in one captured graph: the clock and the graph's start are shared by them."""

_RAGGED = "ragged, triton"
_PRODUCTS = "ragged, matmul"
_EAGER = "ragged, triton, with its launch"
_COPY = "device copy"


def run(settings: Settings, device: torch.device) -> list[Result]:
    """A result for each dtype; none without a CUDA device."""
    if device.type != "cuda":
        print("ragged-attention: left out, its kernel runs on CUDA devices only\n")
        return []
    return [_run(settings, device, name) for name in ("bfloat16", "float16")]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`_CALLS` calls as one CUDA graph: what is left when the host takes no time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph.replay


@torch.inference_mode()
def _run(settings: Settings, device: torch.device, dtype_name: str) -> Result:
    dtype = dtype_of(dtype_name)
    generator = torch.Generator().manual_seed(0)
    h, d, t = settings.heads, settings.head_size, settings.tokens
    lengths = [length for _ in range(_BATCH) for length in ragged_lengths(h, t, settings.budget, generator)]
    prefix = ragged_prefix(lengths, t, d, dtype, device, generator, _BATCH)
    keys, values = dense_entries(h, t, d, dtype, device, generator, _BATCH)
    queries = torch.randn(_BATCH, h * settings.groups, 1, d, generator=generator).to(device, dtype)
    view = PrefixView(prefix, tuple(range(_BATCH)))
    tail = keys[:, :, :_TAIL], values[:, :, :_TAIL]
    source = torch.ones(settings.copy_bytes // 4, device=device)
    target = torch.empty_like(source)

    def ragged(backend: str) -> Tensor:
        return attend(queries, view, *tail, scaling=d**-0.5, backend="triton" if backend == _RAGGED else "matmul")

    dense = dense_rivals(queries, keys, values)
    # Copies of all keys would be kept for each of the captured calls.
    del dense["dense, repeated keys"]
    calls: dict[str, Callable[[], object]] = {
        **{name: partial(ragged, name) for name in (_RAGGED, _PRODUCTS)},
        **dense,
        _COPY: partial(target.copy_, source),
    }
    rivals = {name: captured(call) for name, call in calls.items()}
    rivals[_EAGER] = calls[_RAGGED]
    samples = interleaved(rivals, settings.short, device, warmup=3)
    samples = {
        name: times if name == _EAGER else [seconds / _CALLS for seconds in times] for name, times in samples.items()
    }

    times = medians(samples)
    best = min(dense, key=times.__getitem__)
    read = prefix.keys.nbytes + prefix.values.nbytes + 2 * _BATCH * h * _TAIL * d * dtype.itemsize
    # A copy reads and writes every byte.
    speed, copy_speed = read / times[_RAGGED], 2 * source.nbytes / times[_COPY]
    figures = {
        "ragged, GB/s": speed / 1e9,
        "copy, GB/s read and written": copy_speed / 1e9,
        "ragged / copy": speed / copy_speed,
        f"ragged against the best dense ({best})": times[best] / times[_RAGGED],
        "ragged, triton against matmul": times[_PRODUCTS] / times[_RAGGED],
    }
    described = {
        "dtype": dtype_name,
        "batch": _BATCH,
        "tokens": t,
        "budget": settings.budget,
        "heads": h,
        "groups": settings.groups,
        "head_size": d,
        "longest head": max(lengths),
        "shortest head": min(lengths),
        "tail": _TAIL,
        "copy_bytes": settings.copy_bytes,
        "calls in a graph": _CALLS,
    }
    targets = (Target("bandwidth against a device copy's", speed / copy_speed, at_least=0.8),)
    return Result(
        f"ragged-attention-{dtype_name}", described, samples, figures, targets if settings.has_targets else ()
    )
