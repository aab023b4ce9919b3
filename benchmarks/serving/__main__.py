"""`python -m benchmarks.serving`: a table, a picture and one JSON of loads served with and without eviction.

Needs vLLM (its CPU build will do): `make bench-serving` makes an environment that has it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.serving.settings import FULL, QUICK, Load
from defensivekv.bench.machine import describe
from defensivekv.drawing import add_legend, drawing, panels

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
PICTURE = ROOT / "docs" / "serving.png"

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    # All cores; vLLM leaves one out.
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

Measured = dict[str, list[dict[str, Any]]]


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument(
        "--rounds", type=int, default=None, help="times that every way is run (default: the load's own)"
    )
    parser.add_argument("--loads", nargs="*", default=None, help="decode-step, throughput; none: both")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    options = parser.parse_args(arguments)
    loads = [load for load in (QUICK if options.quick else FULL) if not options.loads or load.name in options.loads]
    header = describe(torch.device("cpu")) | {"vllm": metadata.version("vllm"), "quick": options.quick}
    console = Console()
    console.print(str(ENVIRONMENT))
    console.print(f"{header['device']}, {header['threads']} threads, vLLM {header['vllm']}, commit {header['commit']}")
    results = []
    for load in loads:
        measured: Measured = {way: [] for way in load.ways}
        for _ in range(options.rounds or load.rounds):
            for way in load.ways:
                with console.status(f"{load.name}, {way}"):
                    measured[way].append(run(load, way))
        results.append({"load": asdict(load), "measured": measured})
        console.print(table(load, measured))
        if load.name == "throughput" and options.output == RESULTS and not options.quick:
            draw(load, measured)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(header | {"results": results}, indent=1) + "\n", encoding="utf-8")


def run(load: Load, way: str) -> dict[str, Any]:
    """One way of serving, from its engine's start to its end."""
    job = asdict(load) | {"options": load.ways[way], "config": load.shape.config(load.prompt * 2, load.dtype)}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.engine", str(asked), str(answer)],
            env={**ENVIRONMENT, **os.environ},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{load.name}, {way}: the engine failed\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def figures(load: Load, runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the runs of what each run came to."""
    each = [
        {
            "tokens/s": load.requests * load.generated / one["seconds"],
            "generating at once": one["most_generating"],
            "first token, median s": median(one["first"]),
            "last token, median s": median(one["last"]),
            "last token, slowest s": one["last"][-1],
            "step, ms": None if one["step"] is None else 1e3 * one["step"],
        }
        for one in runs
    ]
    found: dict[str, float | None] = {}
    for name in each[0]:
        values = [one[name] for one in each if one[name] is not None]
        found[name] = median(values) if values else None
    return found


def table(load: Load, measured: Measured) -> Table:
    """One line for each way."""
    shape = load.shape
    made = Table(
        title=f"{load.name}: {load.requests} requests of {load.prompt} + {load.generated} tokens, a cache for "
        f"{load.cache_tokens} tokens; {shape.num_hidden_layers} layers of {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads on {shape.num_key_value_heads} of {shape.head_dim}, {load.dtype}, "
        f"{'compiled' if load.is_compiled else 'eager'}; "
        f"medians of {len(next(iter(measured.values())))}",
    )
    made.add_column("")
    rows = {way: figures(load, runs) for way, runs in measured.items()}
    for name in next(iter(rows.values())):
        made.add_column(name, justify="right")
    for way, row in rows.items():
        made.add_row(way, *("" if value is None else f"{value:.4g}" for value in row.values()))
    return made


def draw(load: Load, measured: Measured) -> None:
    """Throughput and latency over the budget, and stock vLLM's as lines across."""
    rows = {way: figures(load, runs) for way, runs in measured.items()}
    budgets = sorted((int(way[:-1]), way) for way in rows if way != "stock")
    shown = {
        "generated tokens a second": {"tokens/s": "tokens/s"},
        "seconds, median request": {"last token": "last token, median s", "first token": "first token, median s"},
    }
    with drawing():
        figure, axes = panels(len(shown), below=0.5)
        handles = {}
        for panel, (label, lines) in zip(axes, shown.items(), strict=True):
            for number, (line, name) in enumerate(lines.items()):
                values = [rows[way][name] or 0 for _, way in budgets]
                (handles[line],) = panel.plot(
                    [share for share, _ in budgets], values, marker="o", color=f"C{number + len(lines) - 1}"
                )
                handles[f"{line}, stock vLLM"] = panel.axhline(
                    rows["stock"][name] or 0, color=f"C{number + len(lines) - 1}", linestyle="--"
                )
            panel.set_xlabel("budget (% of the prompt's entries)")
            panel.set_ylabel(label)
            panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
            panel.grid(alpha=0.3)
        add_legend(figure, handles, 3)
        figure.suptitle(
            f"{load.requests} requests of {load.prompt} + {load.generated} tokens in a cache for {load.cache_tokens}",
            fontsize=9,
        )
        figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
