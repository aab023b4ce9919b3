"""Tokens without end under a bound: whether it holds, the time per token, the cost of its steps, and the memory."""

import time
from statistics import median

import psutil
import torch

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from defensivekv.bench.timing import Samples, synchronise
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

_METHODS = ("layer-defensivekv", "h2o", "tova", "streaming-llm")
_PARTS = 20
"""The start and the end that are compared are one part each of so many."""


@torch.inference_mode()
def run(settings: Settings, device: torch.device) -> list[Result]:
    """Generates greedily, one result for each method; the first over all tokens, the others over a tenth of them."""
    results = []
    for number, name in enumerate(_METHODS):
        tokens = settings.endless_tokens // (10 if number else 1)
        results.append(_generate(settings, device, name, tokens))
    return results


def _generate(settings: Settings, device: torch.device, name: str, tokens: int) -> Result:
    shape = dict(settings.thin) | {"num_hidden_layers": 4, "max_position_embeddings": 2 * settings.endless_tokens}
    model = random_model(settings, device, dtype="float32", **shape)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, name, max_entries=settings.bound)
    token = torch.ones(1, 2 * settings.bound, dtype=torch.long, device=device)
    heads = model.config.num_key_value_heads * model.config.num_hidden_layers
    process, times, steps = psutil.Process(), [], []
    most, memory = 0, []
    for number in range(tokens):
        synchronise(device)
        start = time.perf_counter()
        token = model(token, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1].argmax(-1)[None]
        synchronise(device)
        times.append(time.perf_counter() - start)
        stores = [layer.store for layer in cache.layers]
        if stores[0].tail_length == 0:
            steps.append(number)
        tails = stores[0].tail_length * heads
        most = max(most, tails + sum(len(store.view.prefix.keys) for store in stores if store.view is not None))
        if number % max(1, tokens // _PARTS) == 0:
            memory.append(process.memory_info().rss)
    part = max(1, tokens // _PARTS)
    evicting = [times[number] for number in steps[1:]]
    others = sorted(times[1:])[: len(times) - len(steps)]
    early, late = times[part : 2 * part], times[-part:]
    interval = max(1, steps[2] - steps[1]) if len(steps) > 2 else 1
    samples: Samples = {"first tokens": early, "last tokens": late, "tokens with a step": evicting or late}
    plain, stepping = median(others), median(evicting or late)
    figures = {
        "time per token, last over first": _per_token(late, interval) / _per_token(early, interval),
        "share of the time in steps": (stepping - plain) / (stepping + (interval - 1) * plain),
        "most entries per head": most / heads,
        "resident memory, last over first (MiB)": (memory[-1] - memory[len(memory) // 4]) / 2**20,
    }
    targets = (
        Target("time per token at the end over the start", figures["time per token, last over first"], at_most=1.1),
        Target("entries per head", figures["most entries per head"], at_most=float(settings.bound)),
        Target("growth of resident memory in MiB", figures["resident memory, last over first (MiB)"], at_most=8.0),
    )
    described = {
        "tokens": tokens,
        "bound": settings.bound,
        "interval": interval,
        "layers": model.config.num_hidden_layers,
        "dtype": "float32",
    }
    return Result(f"endless-{name}", described, samples, figures, targets if settings.has_targets else ())


def _per_token(times: list[float], interval: int) -> float:
    """Steps of eviction included: the median over intervals of the mean time in each."""
    blocks = [times[start : start + interval] for start in range(0, len(times) - interval + 1, interval)]
    return median(sum(block) / len(block) for block in blocks or [times])
