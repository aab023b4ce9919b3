"""A decoding step with the same stored entries after prompts of different lengths: evicted tokens cost nothing."""

from functools import partial

import torch

import defensivekv as dkv
from benchmarks.decode_step import step
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from defensivekv.bench.caches import filled_evicting
from defensivekv.bench.timing import interleaved, medians


def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result with a rival for each logical length."""
    model = random_model(settings, device)
    dkv.enable(model)
    shortest = min(settings.logical_lengths)
    caches = {
        f"{seen} tokens seen": filled_evicting(model, shortest, settings.budget, seen, torch.Generator().manual_seed(0))
        for seen in settings.logical_lengths
    }
    samples = interleaved(
        {name: partial(step, model, cache) for name, cache in caches.items()}, settings.medium, device, warmup=2
    )
    times = medians(samples)
    spread = max(times.values()) / min(times.values()) - 1
    described = {
        "dtype": settings.model_dtype,
        "stored_entries": int(next(iter(caches.values())).lengths.sum()),
        "logical_lengths": list(settings.logical_lengths),
    }
    target = Target("slowest over fastest length, less one", spread, at_most=0.1)
    return [
        Result(
            "logical-length",
            described,
            samples,
            {"slowest / fastest - 1": spread},
            (target,) if settings.has_targets and device.type == "cpu" else (),
        )
    ]
