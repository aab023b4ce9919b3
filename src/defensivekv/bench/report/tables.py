"""The results on a terminal."""

from collections.abc import Callable, Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from defensivekv.bench.plan import OURS
from defensivekv.bench.records import CellRecord, Outcome, Results
from defensivekv.bench.sizes import format_tokens
from defensivekv.budget import format_bytes
from defensivekv.console import print_whole

_NOISY = 1.3
_Row = Callable[[Outcome, CellRecord], list[str]]


def print_results(results: Results, console: Console) -> None:
    """Every cell as a table, and below each what was not measured, and why."""
    _print_header(results, console)
    missing = {name for name, said in results.rivals.items() if said.get("missing")}
    for cell in results.of_kind("steps"):
        batch = f", {cell.batch} sequences" if cell.batch > 1 else ""
        title = f"one token after {format_tokens(cell.filled)} stored{batch}"
        columns = ["", "ms", "min to max", "tokens/s", f"x {OURS}", "cache", "floor, ms", "achieved"]
        _print_cell(console, title, columns, cell, _step_row, missing)
    for cell in results.of_kind("prefill"):
        title = f"a prompt of {format_tokens(cell.filled)} tokens, until its first token"
        columns = ["", "s", "min to max", "over stock", "floor, s"]
        _print_cell(console, title, columns, cell, _prefill_row, missing)
    for cell in results.of_kind("memory"):
        title = f"peak memory over the idle model, a prompt of {format_tokens(cell.filled)} tokens"
        _print_cell(console, title, ["", "peak", "of stock"], cell, _memory_row, missing)
    for cell in results.of_kind("capacity"):
        lengths = sorted({length for each in cell.outcomes for length in each.largest_batches})
        columns = ["", "a token", "longest", *(f"batch at {format_tokens(length)}" for length in lengths)]
        title = f"what fits beside the weights into {format_bytes(cell.memory_bytes)}"
        _print_cell(console, title, columns, cell, _capacity_row, missing)


def _print_header(results: Results, console: Console) -> None:
    machine, model, roof = results.machine, results.model, results.roofline
    layers = f"{model['layers']} layers" + (f" of {model['of_layers']}" if model["layers"] < model["of_layers"] else "")
    lines = [
        f"{model['name']}: {layers}, {model['parameters'] / 1e9:.3g} billion weights, {model['dtype']}, "
        f"{format_bytes(model['weight_bytes'])}; a token's keys and values take {format_bytes(model['token_bytes'])}",
        f"{machine['device']}, {machine['threads']} threads; memory reads {roof['read'] / 1e9:.1f} GB/s, copies "
        f"{roof['copy'] / 1e9:.1f} GB/s; {model['dtype']} products {roof['matmul'] / 1e9:,.0f} GFLOP/s",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        + f", commit {machine['commit']}",
    ]
    about: dict[str, list[str]] = {}
    for name, said in results.rivals.items():
        about.setdefault(_about(said), []).append(name)
    lines += [f"{', '.join(names)}: {text}" for text, names in about.items() if text]
    for line in lines:
        # Text and not str: names may hold what rich takes for markup.
        console.print(Text(line))


def _about(said: dict[str, object]) -> str:
    if said.get("missing"):
        return str(said["missing"])
    versions = said.get("versions")
    parts = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    return ", ".join([*parts, *(str(said[name]) for name in ("weights", "note") if said.get(name))])


def _print_cell(
    console: Console, title: str, columns: Sequence[str], cell: CellRecord, row: _Row, missing: Collection[str]
) -> None:
    """missing: rivals of which was said already that they are not there."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    outcomes = [each for each in cell.outcomes if not (each.rival == OURS and each.turns > 1)]
    shown = [each for each in outcomes if each.status == "ok"]
    for each in shown:
        table.add_row(*(Text(text) for text in row(each, cell)), style="bold" if each.rival == OURS else "")
    if shown:
        print_whole(table, console)
    else:
        console.print(Text(f"{title}: nothing was measured"))
    for each in outcomes:
        if each.status != "ok" and not (each.status == "missing" and each.rival in missing):
            console.print(Text(f"  {each.label}: {each.reason}", style="dim" if each.status == "missing" else "red"))
    for text, labels in _notes(outcomes).items():
        console.print(Text(f"  {', '.join(labels)}: {text}", style="dim"))
    if cell.noise > _NOISY:
        said = f"noisy: medians are up to {cell.noise:.1f} times the fastest; measure again on a quiet machine"
        console.print(Text(f"  {said}", style="yellow"))
    if cell.read_speeds:
        low, high = min(cell.read_speeds) / 1e9, max(cell.read_speeds) / 1e9
        console.print(Text(f"  memory was read at {low:.1f} to {high:.1f} GB/s between the turns", style="dim"))


def _notes(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Each note once, with the labels that it is of."""
    notes: dict[str, list[str]] = {}
    for each in outcomes:
        for text in (each.note, each.verified):
            if text:
                notes.setdefault(text, []).append(each.label)
    return notes


def _step_row(each: Outcome, cell: CellRecord) -> list[str]:
    ours, seconds = cell.ours(each.turns), each.seconds
    assert seconds is not None
    against = "" if ours is None or ours.seconds is None else f"{seconds / ours.seconds:.2f}"
    return [
        each.label,
        milliseconds(seconds),
        f"{milliseconds(min(each.samples_s))} to {milliseconds(max(each.samples_s))}",
        f"{cell.batch / seconds:.3g}",
        against,
        format_bytes(each.held_bytes or 0),
        "" if each.floor_s is None else milliseconds(each.floor_s),
        "" if each.achieved is None else f"{each.achieved:.0%}",
    ]


def _prefill_row(each: Outcome, cell: CellRecord) -> list[str]:
    seconds, over = each.seconds, overhead(each, cell)
    assert seconds is not None
    return [
        each.label,
        f"{seconds:.3g}",
        f"{min(each.samples_s):.3g} to {max(each.samples_s):.3g}",
        "" if over is None else f"{over:+.1%}",
        "" if each.floor_s is None else f"{each.floor_s:.3g}",
    ]


def _memory_row(each: Outcome, cell: CellRecord) -> list[str]:
    stock = next((other.peak_bytes for other in cell.outcomes if other.rival == "stock"), None)
    share = f"{each.peak_bytes / stock:.0%}" if stock and each.peak_bytes is not None else ""
    return [each.label, format_bytes(each.peak_bytes or 0), share]


def _capacity_row(each: Outcome, cell: CellRecord) -> list[str]:
    batches = (f"{each.largest_batches[length]:,}" for length in sorted(each.largest_batches))
    return [each.label, format_bytes(each.held_bytes or 0), f"{each.longest:,} tokens", *batches]


def overhead(each: Outcome, cell: CellRecord) -> float | None:
    """What a prefill takes over the stock cache's, from the turns that both took; None where there is none."""
    stock = next((other for other in cell.outcomes if other.rival == "stock" and other.samples_s), None)
    if stock is None or stock.seconds is None or each.seconds is None or each.rival == "stock":
        return None
    return each.seconds / stock.seconds - 1


def milliseconds(seconds: float) -> str:
    """Three digits, as far as there are."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
