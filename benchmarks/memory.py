"""What a process takes at most to read a prompt and to go on from it, over the prompt's length.

Each way of reading runs in a process of its own; what is measured is the system's count of the process (its peak
resident set; on a GPU, the allocator's peak), less what it took before the prompt.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import FULL, QUICK, Settings
from defensivekv.bench.peak_memory import ALLOCATOR, PeakMemory
from defensivekv.integrations.competition import Competition
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "peak_memory.png"
_NEW_TOKENS = 256
_DTYPE = "float32"

_LABELS = {
    "full": "full cache",
    "two passes": "Layer-DefensiveKV, all layers held until the last (the authors' scheme)",
    "streaming": "Layer-DefensiveKV, streaming",
    "per layer": "DefensiveKV, layer by layer",
    "chunked": "Layer-DefensiveKV, in chunks",
    "bounded": "Layer-DefensiveKV, in chunks, bounded, and {new} tokens more",
}


def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result: MiB by way and prompt length. Draws docs/peak_memory.png where the settings are the full ones."""
    lengths = settings.memory_lengths
    peaks = {way: [_measured(way, length, settings, device) for length in lengths] for way in settings.memory_ways}
    figures = {
        f"{way}, {length} tokens (MiB)": peak
        for way, row in peaks.items()
        for length, peak in zip(lengths, row, strict=True)
    }
    shape = _shape(settings)
    described = {
        "dtype": _DTYPE,
        "budget": settings.budget,
        "chunk_size": settings.chunk_size,
        "bound": settings.bound,
        "new_tokens": _NEW_TOKENS,
        "lengths": list(settings.memory_lengths),
    } | {name: shape[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim") if name in shape}
    targets: tuple[Target, ...] = ()
    if settings.has_targets:
        draw(settings, peaks)
        last = {way: row[-1] for way, row in peaks.items()}
        targets = (
            Target("streaming over full, longest prompt", last["streaming"] / last["full"], at_most=0.45),
            Target("chunked over full, longest prompt", last["chunked"] / last["full"], at_most=0.35),
            Target("bounded, longest over a quarter of it", last["bounded"] / peaks["bounded"][-3], at_most=1.1),
        )
    return [Result("memory", described, {}, figures, targets)]


def draw(settings: Settings, peaks: dict[str, list[float]]) -> None:
    """The peaks over the prompt's length."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for way, row in peaks.items():
        label = _LABELS[way].format(new=_NEW_TOKENS)
        axes.plot(settings.memory_lengths, row, marker="o", label=label)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("peak memory over the idle model (MiB)")
    axes.set_xticks(settings.memory_lengths)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(
        f"budget {settings.budget:.0%}, chunks of {settings.chunk_size}, bound of {settings.bound} entries a head"
    )
    figure.savefig(PICTURE, dpi=150)
    plt.close(figure)


def _measured(way: str, length: int, settings: Settings, device: torch.device) -> float:
    kind = "full" if settings is FULL else "quick"
    command = [sys.executable, "-m", "benchmarks.memory", way, str(length), kind, str(device)]
    ran = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=True)
    return float(json.loads(ran.stdout.splitlines()[-1]))


def _shape(settings: Settings) -> dict[str, Any]:
    """A model of little but a cache: 64 KiB of keys and values a token, in 16 layers."""
    return (
        {"num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64} | dict(settings.model) | dict(settings.thin)
    )


def _peak(way: str, length: int, settings: Settings, device: torch.device) -> float:
    """MiB that this process takes at most, over what it takes before."""
    model = random_model(settings, device, dtype=_DTYPE, **_shape(settings))
    if way != "full":
        dkv.enable(model)
    make, chunk, new = _ways(model, settings)[way]
    _read(model, make(), torch.ones(1, 2 * settings.chunk_size, dtype=torch.long, device=device), chunk, 2)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    peak = PeakMemory(device)
    _read(model, make(), ids, chunk, new)
    return peak.bytes / 2**20


def _ways(model: PreTrainedModel, settings: Settings) -> dict[str, tuple[Callable[[], Any], int | None, int]]:
    """Of each way: a new cache, tokens read at a time, tokens generated after."""
    budget, name = settings.budget, "layer-defensivekv"
    return {
        "full": (lambda: DynamicCache(config=model.config), None, 0),
        "two passes": (lambda: _without_streaming(dkv.EvictingCache(model, name, budget)), None, 0),
        "streaming": (lambda: dkv.EvictingCache(model, name, budget), None, 0),
        "per layer": (lambda: dkv.EvictingCache(model, "defensivekv", budget), None, 0),
        "chunked": (lambda: dkv.EvictingCache(model, name, budget), settings.chunk_size, 0),
        "bounded": (
            lambda: dkv.EvictingCache(model, name, max_entries=settings.bound),
            settings.chunk_size,
            _NEW_TOKENS,
        ),
    }


def _without_streaming(cache: dkv.EvictingCache) -> dkv.EvictingCache:
    """The same cache, which evicts nothing before it has seen all layers."""
    competition = cache.decision._competition
    add = Competition.add

    def added(*args: Any, **kwargs: Any) -> Any:
        return add(competition, *args, **kwargs | {"streams": False})

    competition.add = added  # type: ignore[method-assign]
    return cache


@torch.inference_mode()
def _read(model: PreTrainedModel, cache: Any, ids: torch.Tensor, chunk: int | None, new: int) -> None:
    if isinstance(cache, dkv.EvictingCache):
        dkv.prefill(model, cache, ids, chunk_size=chunk)
    else:
        model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    token = ids[:, -1:]
    for _ in range(new):
        token = model(token, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    given_way, given_length, given_kind, given_device = sys.argv[1:]
    given_settings = FULL if given_kind == "full" else QUICK
    print(json.dumps(_peak(given_way, int(given_length), given_settings, torch.device(given_device))))
