"""`defensivekv demo`."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from defensivekv.budget import format_bytes
from defensivekv.errors import InvalidInputError
from defensivekv.policies import policy as make_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from defensivekv.evaluation.report import Aggregate, Results
    from defensivekv.evaluation.runner import RunPlan

POLICIES = ("random", "streaming-llm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv")
AVERAGED = "layer-averaged"
"""Layer-DefensiveKV with the mean in place of the worst case, and nothing else changed."""

BUDGETS = ("0.1", "0.2", "0.4", "0.6")
SHOWN_BUDGET = 0.2


def demo(
    documents: Annotated[int, typer.Option(min=1, help="Documents of each task.")] = 6,
    tokens: Annotated[int, typer.Option(min=512, max=2048, help="Tokens of a document.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the figures.")] = Path("demo-output"),
) -> None:
    """Answer questions about documents from evicted caches, with the model that ships with the package."""
    console = Console()
    from defensivekv.cli.models import load_model

    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"cannot write to {output}: it is a file")
    model, tokenizer = load_model(None, dtype="float32", device="auto", trust_remote_code=False, console=console)
    _show_one_document(model, tokenizer, tokens, seed, console)
    plan = _plan(documents, tokens, seed)
    results = _run_grid(plan, model, tokenizer, console)
    _print_table(results, documents, tokens, console)
    _print_order(results, console)
    output.mkdir(parents=True, exist_ok=True)
    _write(results, plan, output)
    console.print(f"picture {output / 'score_vs_budget.png'}\nfigures {output / 'demo.json'}", highlight=False)


def _show_one_document(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: int, seed: int, console: Console
) -> None:
    from defensivekv.integrations.transformers import compress
    from defensivekv.needleworld import MAX_NEW_TOKENS, make_sample, score

    sample = make_sample("multi_query", num_tokens=tokens, seed=seed, num_questions=3)
    excerpt = textwrap.shorten(sample.document, 400, placeholder=" ...")
    console.rule("one document")
    console.print(
        f"{excerpt}\n[dim]({tokens} tokens; the questions come after it has been compressed)[/]\n", highlight=False
    )
    full = compress(model, tokenizer, sample.document, "full")
    worst = compress(model, tokenizer, sample.document, "layer-defensivekv", SHOWN_BUDGET)
    averaged = make_policy("layer-defensivekv", SHOWN_BUDGET, aggregation="mean")
    mean = compress(model, tokenizer, sample.document, averaged)
    names = ("all of the cache", f"{SHOWN_BUDGET:.0%}, worst case", f"{SHOWN_BUDGET:.0%}, averaged")
    for question in sample.questions:
        console.print(f"[bold]{escape(question.text)}[/]", highlight=False)
        for name, context in zip(names, (full, worst, mean), strict=True):
            reply = context.ask(question.text, max_new_tokens=MAX_NEW_TOKENS)
            share = score(reply, question.answer)
            mark = f"[green]{share:.0%}[/]" if share == 1 else f"[red]{share:.0%}[/]"
            held = format_bytes(context.report().nbytes)
            console.print(f"  {name:16}  {held:>9}  {mark} found  {escape(reply)}", highlight=False)
    console.print()


def _plan(documents: int, tokens: int, seed: int) -> "RunPlan":
    from defensivekv.evaluation.runner import make_plan

    averaged = {"name": "layer-defensivekv", "aggregation": "mean", "label": AVERAGED}
    return make_plan(
        {
            "tasks": ["needleworld"],
            "policies": ["full", *POLICIES, averaged],
            "budgets": BUDGETS,
            "num_samples": documents,
            "lengths": [tokens],
            "seed": seed,
            "dtype": "float32",
        }
    )


def _run_grid(
    plan: "RunPlan", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", console: Console
) -> "Results":
    import tempfile

    from defensivekv.cli.evaluate import run_with_progress
    from defensivekv.evaluation.report import Results
    from defensivekv.evaluation.runner import read_records, read_timings

    console.rule("methods and budgets")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_with_progress(plan, folder, lambda _: (model, tokenizer), console)
        return Results.from_records(read_records(folder), read_timings(folder))


def _rows(results: "Results") -> list[tuple[str, str, "Aggregate"]]:
    """Policy, budget, and what was measured; the full cache first."""
    (setting,) = results.settings
    (group,) = results.groups(setting)
    named = [("full", "1.0"), *((name, budget) for name in (*POLICIES, AVERAGED) for budget in BUDGETS)]
    return [(name, budget, results.aggregate(setting, name, budget, group)) for name, budget in named]


def _print_table(results: "Results", documents: int, tokens: int, console: Console) -> None:
    from defensivekv.needleworld import TASKS

    rows = _rows(results)
    full = rows[0][2]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("policy", no_wrap=True)
    for title in ("budget", "found", "interval", "KV held", "of full", "a token", "of full"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, budget, cell in rows:
        assert cell.score is not None
        assert cell.cache_bytes is not None
        assert cell.token_seconds is not None
        assert full.cache_bytes is not None
        assert full.token_seconds is not None
        table.add_row(
            name,
            f"{float(budget):.0%}",
            f"{cell.score.mean:.1%}",
            f"{100 * cell.score.low:.0f} - {100 * cell.score.high:.0f}",
            format_bytes(round(cell.cache_bytes)),
            f"{cell.cache_bytes / full.cache_bytes:.1%}",
            f"{1e3 * cell.token_seconds:.2f} ms",
            f"x{cell.token_seconds / full.token_seconds:.2f}",
            end_section=budget in ("1.0", BUDGETS[-1]),
        )
    console.print(table)
    _print_text(
        console,
        f"{documents} documents of {tokens} tokens for each of {', '.join(TASKS)}; compressed before any question is "
        "seen; greedy. Found: the share of the values asked for that stand in the answer, with its 95 % interval over "
        "documents. KV held: for one document, positions counted. A token: the median decoding step. The model is "
        "tiny, so a step's time is that of Python and not of memory; `make bench` measures speed at real sizes.",
    )
    console.print()


def _print_order(results: "Results", console: Console) -> None:
    from defensivekv.evaluation import order_disagreements

    (setting,) = results.settings
    (group,) = results.groups(setting)
    found = False
    for budget in BUDGETS:
        for worse, better, by in order_disagreements(results, setting, group, budget):
            found = True
            clear = "clearly" if by.low > 0 else "within the noise"
            _print_text(
                console,
                f"order   at {float(budget):.0%}, {worse} is above {better} by {100 * by.mean:.1f} points "
                f"({100 * by.low:.1f} to {100 * by.high:.1f}: {clear}); in the paper it is below",
                indent=" " * 8,
            )
    if not found:
        console.print("order   of the methods: as in the paper at every budget", highlight=False)


def _print_text(console: Console, text: str, indent: str = "") -> None:
    """Prints prose, broken between words; `indent` stands before every line but the first."""
    console.print(textwrap.fill(text, min(console.width, 110), subsequent_indent=indent), highlight=False)


def _write(results: "Results", plan: "RunPlan", output: Path) -> None:
    from defensivekv.evaluation.report.figures import draw_curves

    (setting,) = results.settings
    draw_curves(results, setting, output / "score_vs_budget.png")
    example = next(iter(results.cells.values())).example
    about: dict[str, Any] = {"plan": plan.model_dump(mode="json", exclude_defaults=True)}
    if example is not None:
        about |= {"versions": example.versions, "device": example.device}
    cells = []
    for name, budget, cell in _rows(results):
        fields = asdict(cell)
        cells.append({"policy": name, "budget": float(budget), **fields, "batch_sizes": sorted(cell.batch_sizes)})
    (output / "demo.json").write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n", encoding="utf-8")
