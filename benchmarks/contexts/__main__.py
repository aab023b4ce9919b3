"""`python -m benchmarks.contexts`: a table, a picture and one JSON of contexts kept in files."""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contexts.first_answer import POLICY, STOCK, TEXT, Document, measure
from benchmarks.contexts.settings import FULL, QUICK, Settings
from benchmarks.contexts.sharing import many_forks, two_processes
from benchmarks.contexts.subject import make_model, make_tokenizer
from defensivekv.bench.machine import describe
from defensivekv.budget import format_bytes
from defensivekv.drawing import add_legend, drawing, panels
from defensivekv.integrations.transformers.contexts.fingerprints import model_fingerprint

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "contexts.json"
PICTURE = ROOT / "docs" / "contexts.png"

Lengths = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contexts", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, default=None, help="where to keep the files (default: a temporary one)")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    console, header = Console(), describe(torch.device("cpu")) | {"quick": options.quick}
    console.print(f"{header['device']}, {header['threads']} threads, {header['versions']}, commit {header['commit']}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        content = header | {"settings": asdict(settings)} | run(settings, Path(folder), console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.output == RESULTS and not options.quick:
        draw(content["lengths"])


def run(settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    """Everything that is measured."""
    model, tokenizer = make_model(settings), make_tokenizer(settings)
    start = time.perf_counter()
    model_fingerprint(model)
    fingerprint = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    console.print(f"fingerprint of {format_bytes(weights)} of weights: {fingerprint:.3f} s, once a process")
    lengths: Lengths = []
    for length in settings.lengths:
        with console.status(f"{length} tokens"):
            document = Document(model, tokenizer, length, settings, folder)
            lengths.append(_of_length(document, length, settings))
        console.print(table(lengths[-1:], settings))
    path = folder / f"{settings.sharing}-{max(settings.budgets)}.kv"
    shared, forks = two_processes(path, settings), many_forks(path, settings)
    console.print(
        f"two processes on one file of {format_bytes(shared['file'])}: each has "
        f"{' and '.join(format_bytes(size) for size in shared['rss'])} of it resident, together they hold "
        f"{format_bytes(sum(shared['pss']))}"
    )
    own = format_bytes(forks["of their own"])
    console.print(
        f"{forks['forks']} forks that answered, of a context of {format_bytes(forks['prefix'])}: the process grew by "
        f"{format_bytes(forks['grown'])}, tokens of their own ({own}) counted; each layer has "
        f"{forks['prefixes per layer']:g} prefix"
    )
    return {
        "fingerprint_s": fingerprint,
        "weights_bytes": weights,
        "lengths": lengths,
        "two_processes": shared,
        "forks": forks,
    }


def _of_length(document: Document, length: int, settings: Settings) -> dict[str, Any]:
    samples: dict[str, dict[str, list[float]]] = {way: {"disk": [], "memory": []} for way in document.ways}
    for repetition in range(-1, settings.rounds):
        for way, found in samples.items():
            if way == TEXT and repetition not in (0, 1, 2):
                continue
            for name in found:
                # Text has no file, and is read once.
                if way == TEXT and name == "memory":
                    continue
                seconds = measure(document, way, from_disk=name == "disk")
                if repetition >= 0:
                    found[name].append(seconds)
    return {
        "tokens": length,
        "bytes": {name: path.stat().st_size for name, path in document.files.items()},
        "seconds": samples,
        "prefill_s": document.read_seconds,
        "compress_s": document.compress_seconds,
    }


def table(lengths: Lengths, settings: Settings) -> Table:
    """One line for each way and length."""
    made = Table(
        title=f"to the first token of an answer to {settings.question} tokens; {POLICY}, {settings.dtype}, "
        f"{dict(settings.model)['num_hidden_layers']} layers; medians of {settings.rounds}"
    )
    for name in ("tokens", "from", "bytes", "s, from disk", "s, in memory"):
        made.add_column(name, justify="left" if name == "from" else "right")
    for one in lengths:
        for way, found in one["seconds"].items():
            size = format_bytes(one["bytes"][way]) if way in one["bytes"] else ""
            times = [f"{median(values):.4g}" if values else "" for values in found.values()]
            made.add_row(str(one["tokens"]), way, size, *times)
    return made


def draw(lengths: Lengths) -> None:
    """Seconds and bytes over the document's length."""
    ways = list(lengths[0]["seconds"])
    tokens = [one["tokens"] for one in lengths]
    with drawing():
        figure, axes = panels(2, below=0.5)
        handles = {}
        for number, way in enumerate(ways):
            label = way if way in (TEXT, STOCK) else f"context at {way}"
            seconds = [median(one["seconds"][way]["disk"]) for one in lengths]
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "markersize": 4}
            (handles[label],) = axes[0].plot(tokens, seconds, **style)
            if way != TEXT:
                axes[1].plot(tokens, [one["bytes"][way] / 2**20 for one in lengths], **style)
        for axis, name in zip(axes, ("seconds to the first token, file not in memory", "MiB on disk"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
            axis.set_xlabel("tokens of the document")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        add_legend(figure, handles, 3)
        figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
