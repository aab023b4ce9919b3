"""`defensivekv bench`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from defensivekv.errors import InvalidInputError

if TYPE_CHECKING:
    from defensivekv.bench.plan import BenchPlan
    from defensivekv.bench.records import Results

_Many = list[str] | None


def bench(
    model: Annotated[
        str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="In place of a model: llama-3.2-1b, llama-3.1-8b, ..., with random weights.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of it; all if left out.")] = None,
    lengths: Annotated[_Many, typer.Option(help="Tokens stored or read, such as 4k,32k.")] = None,
    budgets: Annotated[_Many, typer.Option(help="0.2, 20%, 1024 (entries per head).")] = None,
    policies: Annotated[_Many, typer.Option(help="Of prefills and memory; see `defensivekv policies`.")] = None,
    batch_sizes: Annotated[_Many, typer.Option(help="Of the throughput, such as 1,2,4.")] = None,
    what: Annotated[_Many, typer.Option(help="prefill,decode,throughput,memory,capacity; all if left out.")] = None,
    rivals: Annotated[
        _Many,
        typer.Option(
            help="compiled,stock,static,static-compiled,flat-copy,kvpress,llama.cpp,openvino; all (if left out), none."
        ),
    ] = None,
    python: Annotated[_Many, typer.Option(help="A rival's own Python, as kvpress=PATH; again for more.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (the model's; bfloat16 for shapes), float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, of rivals too.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What has to fit into, as 16GiB; the device's if left out.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Allocate what is said to fit.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of weights and entries.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Turns that each rival takes; 9 if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that it runs, measures nothing.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the run; a stopped run goes on in it.")] = Path(
        "bench-output"
    ),
    install_rivals: Annotated[
        _Many, typer.Option(help="Install these into ~/.cache/defensivekv/rivals, and measure nothing.")
    ] = None,
) -> None:
    """Measure time, memory and capacity, beside other caches and other packages, in turns.

    Caches of any length are filled without reading a prompt. Without arguments: the packaged model.
    """
    console = Console()
    if install_rivals is not None:
        _install(_parts(install_rivals) or [], console)
        return
    from defensivekv.bench.plan import make_plan
    from defensivekv.cli.models import find_device

    fields = {
        "model": model,
        "shape": shape,
        "layers": layers,
        "lengths": _parts(lengths),
        "budgets": _parts(budgets),
        "policies": _parts(policies),
        "batch_sizes": _parts(batch_sizes),
        "what": _parts(what),
        "rivals": _parts(rivals),
        "pythons": _pythons(python),
        "dtype": dtype,
        "device": str(find_device(device)),
        "threads": threads,
        "memory": memory,
        "verify": verify,
        "seed": seed,
        "repeats": repeats,
    }
    plan = make_plan({name: value for name, value in fields.items() if value is not None}, quick=quick)
    results = _run(plan, output, console)
    _report(results, output, console)


def _run(plan: "BenchPlan", output: Path, console: Console) -> "Results":
    """Runs under a line that says what goes on; ends the program with status 130 where it is interrupted."""
    from transformers.utils import logging

    from defensivekv.bench.runner import bench as run

    logging.disable_progress_bar()
    try:
        with console.status("starting") as status:
            return run(plan, output, lambda text: status.update(escape(text)))
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on in {escape(str(output))}", highlight=False)
        sys.exit(130)


def _report(results: "Results", output: Path, console: Console) -> None:
    from defensivekv.bench.report import draw_figures, print_results

    print_results(results, console)
    for path in draw_figures(results, output):
        console.print(f"picture {escape(str(path))}", highlight=False)
    console.print(f"figures {escape(str(output / 'results.json'))}", highlight=False)


def _install(names: list[str], console: Console) -> None:
    from defensivekv.bench.rivals.installing import install

    for name in names:
        made = install(name, lambda text: console.print(f"[dim]{escape(text)}[/]", highlight=False))
        console.print(f"{escape(name)} is installed: {escape(str(made))}", highlight=False)


def _pythons(given: list[str] | None) -> dict[str, str] | None:
    """Rival and Python of each option. Raises InvalidInputError."""
    if given is None:
        return None
    pairs = [text.partition("=") for text in given]
    for (name, _, path), text in zip(pairs, given, strict=True):
        if not name or not path:
            raise InvalidInputError(f"--python {text!r} is not understood: give it as kvpress=/path/to/bin/python")
    return {name: path for name, _, path in pairs}


def _parts(values: list[str] | None) -> list[str] | None:
    """What was given in several options, or with commas in one."""
    return None if values is None else [part.strip() for value in values for part in value.split(",") if part.strip()]
