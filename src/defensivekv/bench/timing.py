"""Wall times of rivals, taken in turns, so that a noisy neighbour disturbs them all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Samples = dict[str, list[float]]
"""Seconds of every repetition, by rival."""


def synchronise(device: torch.device) -> None:
    """Waits for the device: without it, a GPU's work is still queued when the clock stops."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(
    rivals: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device, warmup: int = 1
) -> Samples:
    """Times every rival `repetitions` times, A B C A B C ..., after `warmup` rounds that are not counted."""
    samples: Samples = {name: [] for name in rivals}
    for repetition in range(-warmup, repetitions):
        for name, call in rivals.items():
            elapsed = seconds(call, device)
            if repetition >= 0:
                samples[name].append(elapsed)
    return samples


def medians(samples: Samples) -> dict[str, float]:
    """Seconds, by rival."""
    return {name: median(times) for name, times in samples.items()}
