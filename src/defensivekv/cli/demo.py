"""`defensivekv demo`."""

import json
import platform
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from defensivekv.budget import format_bytes
from defensivekv.policies import Policy
from defensivekv.policies import policy as make_policy
from defensivekv.policies.aggregation import Mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from defensivekv.evaluation import Cell

POLICIES = ("random", "streaming-llm", "snapkv", "adakv", "criticalkv", "defensivekv", "layer-defensivekv")
AVERAGED = "layer-averaged"
"""Layer-DefensiveKV with the mean in place of the worst case, and nothing else changed."""

BUDGETS = (0.1, 0.2, 0.4, 0.6)
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

    model, tokenizer = load_model(None, dtype="float32", device="auto", trust_remote_code=False, console=console)
    _show_one_document(model, tokenizer, tokens, seed, console)
    cells = _run_grid(model, tokenizer, documents, tokens, seed, console)
    _print_table(cells, documents, tokens, console)
    _print_order(cells, console)
    output.mkdir(parents=True, exist_ok=True)
    _write(cells, output, documents=documents, tokens=tokens, seed=seed)
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
    worst = compress(model, tokenizer, sample.document, policy_named("layer-defensivekv", SHOWN_BUDGET))
    mean = compress(model, tokenizer, sample.document, policy_named(AVERAGED, SHOWN_BUDGET))
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


def _run_grid(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: int,
    tokens: int,
    seed: int,
    console: Console,
) -> list["Cell"]:
    from defensivekv.evaluation import evaluate_cell, make_suite

    suite = make_suite(documents, num_tokens=tokens, seed=seed)
    grid = [make_policy("full"), *(policy_named(name, budget) for name in (*POLICIES, AVERAGED) for budget in BUDGETS)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    cells = []
    console.rule("methods and budgets")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(grid) * len(suite))
        for policy in grid:
            progress.update(task, description=f"{policy.name} at {float(policy.budget.amount):.0%}")
            cells.append(
                evaluate_cell(model, tokenizer, suite, policy, advance=lambda done: progress.advance(task, done))
            )
    return cells


def policy_named(name: str, budget: float) -> Policy:
    """The policy of that name, or the averaged twin of Layer-DefensiveKV."""
    if name != AVERAGED:
        return make_policy(name, budget)
    return replace(make_policy("layer-defensivekv", budget), name=AVERAGED, aggregation=Mean())


def _print_table(cells: list["Cell"], documents: int, tokens: int, console: Console) -> None:
    from defensivekv.needleworld import TASKS

    full = cells[0]
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("policy", no_wrap=True)
    for title in ("budget", "found", "interval", "KV held", "of full", "a token", "of full"):
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        score = cell.accuracy
        table.add_row(
            cell.policy,
            f"{cell.budget:.0%}",
            f"{score.mean:.1%}",
            f"{100 * score.low:.0f} - {100 * score.high:.0f}",
            format_bytes(round(cell.cache_bytes)),
            f"{cell.cache_bytes / full.cache_bytes:.1%}",
            f"{1e3 * cell.token_seconds:.2f} ms",
            f"x{cell.token_seconds / full.token_seconds:.2f}",
            end_section=cell.budget in (1.0, BUDGETS[-1]),
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


def _print_order(cells: list["Cell"], console: Console) -> None:
    from defensivekv.evaluation import order_disagreements

    found = False
    for budget in BUDGETS:
        at_budget = {cell.policy: cell for cell in cells if cell.budget == budget}
        for worse, better, by in order_disagreements(at_budget):
            found = True
            clear = "clearly" if by.low > 0 else "within the noise"
            _print_text(
                console,
                f"order   at {budget:.0%}, {worse} is above {better} by {100 * by.mean:.1f} points "
                f"({100 * by.low:.1f} to {100 * by.high:.1f}: {clear}); in the paper it is below",
                indent=" " * 8,
            )
    if not found:
        console.print("order   of the methods: as in the paper at every budget", highlight=False)


def _print_text(console: Console, text: str, indent: str = "") -> None:
    """Prints prose, broken between words; `indent` stands before every line but the first."""
    console.print(textwrap.fill(text, min(console.width, 110), subsequent_indent=indent), highlight=False)


def _write(cells: list["Cell"], output: Path, *, documents: int, tokens: int, seed: int) -> None:
    import torch
    import transformers

    from defensivekv import __version__
    from defensivekv.evaluation.figure import draw_scores

    title = f"Needle questions after {tokens} tokens, asked after compression"
    draw_scores(cells, output / "score_vs_budget.png", title=title)
    settings = {
        "documents_per_task": documents,
        "tokens": tokens,
        "seed": seed,
        "defensivekv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    record = {"settings": settings, "cells": [{**asdict(cell), "accuracy": asdict(cell.accuracy)} for cell in cells]}
    (output / "demo.json").write_text(json.dumps(record, indent=1))
