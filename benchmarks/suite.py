"""All benchmarks by name, and one run of some of them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import attention, decode_step, logical_length, machine, prefill
from benchmarks.result import Result, write
from benchmarks.settings import FULL, QUICK, Settings

RESULTS = machine.ROOT / "benchmarks" / "results"

BENCHMARKS: dict[str, Callable[[Settings, torch.device], list[Result]]] = {
    "attention": attention.run,
    "decode-step": decode_step.run,
    "logical-length": logical_length.run,
    "prefill": prefill.run,
}


def run(
    names: Sequence[str], *, quick: bool, device: torch.device, output: Path, extra: dict[str, object] | None = None
) -> list[Result]:
    """Runs and prints the benchmarks of these names; writes one JSON to `output`, with `extra` at its head."""
    settings = QUICK if quick else FULL
    header = machine.describe(device) | {"quick": quick} | (extra or {})
    print(f"{header['device']}, {header['threads']} threads, {header['versions']}, commit {header['commit']}\n")
    started = time.perf_counter()
    results: list[Result] = []
    for name in names:
        for result in BENCHMARKS[name](settings, device):
            print(f"{result}\n", flush=True)
            results.append(result)
        write(output, header | {"wall_s": round(time.perf_counter() - started, 1)}, results)
    print(f"written to {output}")
    return results
