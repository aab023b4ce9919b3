"""One query against ragged prefixes and short tails, beside the memory's speed and dense attention over everything."""

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
from defensivekv.bench.roofline import ReadProbe
from defensivekv.bench.timing import interleaved, medians
from defensivekv.cache import PrefixView

_RAGGED, _BATCHED = "ragged", "ragged, many rows"
_READ = "memory read"
_TAIL = 32
_ROWS = 16


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
    keys, values = dense_entries(h, t, d, dtype, device, generator)
    queries = torch.randn(1, h * settings.groups, 1, d, generator=generator).to(device, dtype)

    def layers(rows: int) -> list[Callable[[], Tensor]]:
        """A step's calls. As many entries in all, however many rows they are of; no two calls read the same."""
        calls: list[Callable[[], Tensor]] = []
        for _ in range(settings.attention_layers):
            lengths = [n for _ in range(rows) for n in ragged_lengths(h, t // rows, settings.budget, generator)]
            view = PrefixView(ragged_prefix(lengths, t, d, dtype, device, generator, rows), tuple(range(rows)))
            tail = [part[:, :, :_TAIL].repeat(rows, 1, 1, 1) for part in (keys, values)]
            calls.append(partial(attend, queries.repeat(rows, 1, 1, 1), view, *tail, scaling=d**-0.5))
        return calls

    ragged, batched = layers(1), layers(_ROWS)
    probe = ReadProbe(device)
    dense = dense_rivals(queries, keys, values)
    rivals: dict[str, Callable[[], object]] = {
        _RAGGED: partial(_in_turn, ragged),
        _BATCHED: partial(_in_turn, batched),
        **dense,
        _READ: probe.seconds,
    }
    samples = interleaved(rivals, settings.short, device, warmup=3)
    for name in (_RAGGED, _BATCHED):
        samples[name] = [elapsed / settings.attention_layers for elapsed in samples[name]]

    times = medians(samples)
    best = min(dense, key=times.__getitem__)
    entry = 2 * d * dtype.itemsize
    held = int(t * settings.budget * h) + h * _TAIL
    held_batched = _ROWS * (int(t // _ROWS * settings.budget * h) + h * _TAIL)
    speed, batched_speed = held * entry / times[_RAGGED], held_batched * entry / times[_BATCHED]
    read_speed = probe.nbytes / times[_READ]
    figures = {
        "ragged, GB/s": speed / 1e9,
        f"ragged, {_ROWS} rows, GB/s": batched_speed / 1e9,
        "memory, GB/s": read_speed / 1e9,
        "ragged / memory": speed / read_speed,
        f"{_ROWS} rows / one row": batched_speed / speed,
        f"ragged against the best dense ({best})": times[best] / times[_RAGGED],
    }
    targets = [
        Target("reads against the memory's", speed / read_speed, at_least=0.8 if dtype.itemsize == 4 else 0.7),
        Target("speed of many short rows against one long row's", batched_speed / speed, at_least=0.9),
    ]
    if dtype.itemsize == 4:
        targets.append(Target("time of the best dense call", times[best] / times[_RAGGED], at_least=4.5))
    described = {
        "dtype": dtype_name,
        "tokens": t,
        "budget": settings.budget,
        "layers": settings.attention_layers,
        "heads": h,
        "groups": settings.groups,
        "head_size": d,
        "tail": _TAIL,
    }
    is_held = settings.has_targets and device.type == "cpu"
    return Result(f"attention-{dtype_name}", described, samples, figures, tuple(targets) if is_held else ())


def _in_turn(calls: list[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()
