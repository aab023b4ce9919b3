"""All benchmarks by name, and one run of some of them."""

import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import torch

from benchmarks import (
    attention,
    compaction,
    decode_step,
    endless,
    logical_length,
    memory,
    prefill,
    ragged_attention,
    value_norm,
    window_scores,
)
from benchmarks.result import Result, write
from benchmarks.settings import FULL, QUICK, Settings
from defensivekv.bench.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"

BENCHMARKS: dict[str, Callable[[Settings, torch.device], list[Result]]] = {
    "attention": attention.run,
    "ragged-attention": ragged_attention.run,
    "window-scores": window_scores.run,
    "value-norm": value_norm.run,
    "compaction": compaction.run,
    "decode-step": decode_step.run,
    "logical-length": logical_length.run,
    "prefill": prefill.run,
    "memory": memory.run,
    "endless": endless.run,
}


def run(
    names: Sequence[str],
    *,
    quick: bool,
    device: torch.device,
    output: Path,
    extra: dict[str, object] | None = None,
    limit_s: float = inf,
) -> list[Result]:
    """Runs and prints the benchmarks of these names; writes one JSON to `output`, with `extra` at its head.

    None is started once `limit_s` seconds have passed; the JSON names those under "not_run".
    """
    settings = QUICK if quick else FULL
    header = describe(device) | {"quick": quick} | (extra or {})
    print(f"{header['device']}, {header['threads']} threads, {header['versions']}, commit {header['commit']}\n")
    started = time.perf_counter()
    results: list[Result] = []
    waiting = list(names)
    while waiting and time.perf_counter() - started < limit_s:
        for result in BENCHMARKS[waiting.pop(0)](settings, device):
            print(f"{result}\n", flush=True)
            results.append(result)
        elapsed = round(time.perf_counter() - started, 1)
        write(output, header | {"wall_s": elapsed, "not_run": list(waiting)}, results)
    if waiting:
        print(f"not run, for want of time: {', '.join(waiting)}")
    print(f"written to {output}")
    return results
