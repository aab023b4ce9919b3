"""`defensivekv evaluate`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from defensivekv.errors import InvalidInputError
from defensivekv.policies import policies as known_policies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from defensivekv.evaluation.runner import RunPlan
    from defensivekv.evaluation.runner.crew import Load
    from defensivekv.evaluation.runner.run import Step

_RANKED = """random streaming-llm knorm keydiff tova h2o snapkv pyramidkv adakv criticalkv ada-criticalkv lagkv chunkkv
    expected-attention kvzip cake defensivekv layer-defensivekv""".split()
_BUDGETS = ("0.1", "0.2", "0.4", "0.6", "0.8")
_PACKAGED_SAMPLES = 6
"""Documents of each task, so that the whole grid takes minutes on two cores."""


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="needleworld, ruler, ruler/vt, longbench, haystack, ...; with commas.")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option(help="Names of `defensivekv policies`, as snapkv+aggregation=defensive.")
    ] = None,
    budgets: Annotated[
        list[str] | None, typer.Option(help="0.2, 20%, 1024 (entries per head), 64MiB; 1.0 is policy full.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Samples of each task at most.")] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Tokens of generated contexts, such as 4096,8192.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samples; 42 if left out.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of local data files.")] = None,
    split: Annotated[str | None, typer.Option(help="How context and question are divided, where tasks differ.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Documents read at a time.")] = None,
    max_context_tokens: Annotated[int | None, typer.Option(min=2, help="Longer documents lose their middle.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or address where compressed documents are kept and found again.")
    ] = None,
    store_max_bytes: Annotated[str | None, typer.Option(help="What the store may hold, such as 20GiB.")] = None,
    query_aware: Annotated[
        bool | None, typer.Option("--query-aware", help="Compress with the question in sight.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat or plain.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run; a stopped run goes on in it.")] = Path(
        "evaluate-output"
    ),
    config: Annotated[Path | None, typer.Option(help="YAML file of these settings; options come first.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Spread the cells over a Ray cluster.")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Its address; a local one if left out.")] = None,
    against: Annotated[str | None, typer.Option(help="paper: put the published figures beside ours.")] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Score the folder's answers again; run nothing.")] = False,
) -> None:
    """Rank methods by what a model still answers from their caches, and write the report.

    Without arguments: the packaged model on its own suite.
    """
    console = Console()
    if against not in (None, "paper"):
        raise InvalidInputError(f"nothing is known of {against!r}: --against takes 'paper'")
    options = {
        "model": model,
        "tasks": _parts(tasks),
        "policies": _parts(policies),
        "budgets": _parts(budgets),
        "num_samples": num_samples,
        "lengths": _parts(lengths),
        "seed": seed,
        "data": None if data is None else str(data),
        "split": split,
        "batch_size": batch_size,
        "max_context_tokens": max_context_tokens,
        "store": store,
        "store_max_bytes": store_max_bytes,
        "query_aware": query_aware,
        "template": template,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    asked = {name: value for name, value in options.items() if value is not None}
    on_ray = ray or ray_address is not None
    if rescore:
        if asked or on_ray or config is not None:
            raise InvalidInputError("--rescore runs nothing: give it --output and --against only")
        from defensivekv.evaluation.runner import rescore as score_again

        console.print(f"{score_again(output)} records have other scores now in {escape(str(output))}", highlight=False)
    else:
        plan = read_plan(config, asked)
        run_with_progress(plan, output, load_for, console, on_ray=on_ray, ray_address=ray_address)
    if not _report(output, console, against_paper=against == "paper"):
        console.print("[bold red]error:[/] no sample was answered", highlight=False)
        sys.exit(1)


def read_plan(config: Path | None, options: dict[str, Any]) -> "RunPlan":
    """The plan of a file and of options, which come first; what neither names is filled in.

    Raises InvalidInputError.
    """
    from defensivekv.evaluation.runner import load_plan, make_plan

    fields = (load_plan(config) if config is not None else {}) | options
    if fields.get("model") is None and "tasks" not in fields:
        fields = {"tasks": ["needleworld"], "num_samples": _PACKAGED_SAMPLES} | fields
    if "tasks" not in fields:
        raise InvalidInputError("no tasks: give --tasks, such as ruler or longbench, or a --config that names them")
    known = known_policies()
    ranked = ["full", *(name for name in _RANKED if name in known)]
    return make_plan({"policies": ranked, "budgets": _BUDGETS} | fields)


def load_for(plan: "RunPlan") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The plan's model and tokenizer; on this machine or another."""
    import torch

    from defensivekv.cli.models import load_model

    if plan.model is None:
        # Threads cost a model of this size more than they give, and on a busy machine ten times as much.
        torch.set_num_threads(1)
    return load_model(
        plan.model,
        dtype=plan.dtype,
        device=plan.device,
        trust_remote_code=plan.trust_remote_code,
        console=Console(stderr=True),
    )


def _parts(values: list[str] | None) -> list[str] | None:
    """What was given in several options, or with commas in one."""
    return None if values is None else [part.strip() for value in values for part in value.split(",") if part.strip()]


def run_with_progress(
    plan: "RunPlan",
    output: Path,
    load: "Load",
    console: Console,
    *,
    on_ray: bool = False,
    ray_address: str | None = None,
) -> None:
    """Runs the plan into the folder under a progress bar; ends the program with status 130 where it is interrupted."""
    from defensivekv.evaluation.runner import evaluate as run

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    done: dict[str, float] = {}
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(step: "Step") -> None:
            done[step.cell.slug] = step.done / step.samples
            text = f"{step.cell.task.name}  {step.cell.setting.title} at {step.cell.setting.budget}"
            bar.update(task, description=escape(text), completed=sum(done.values()), total=step.cells)

        try:
            run(plan, output, load, on_ray=on_ray, ray_address=ray_address, progress=show)
        except KeyboardInterrupt:
            bar.stop()
            console.print(f"stopped; the same command goes on in {escape(str(output))}", highlight=False)
            sys.exit(130)


def _report(output: Path, console: Console, *, against_paper: bool) -> bool:
    """Writes and prints the report; whether any sample was answered."""
    from defensivekv.evaluation.report import Results, print_report
    from defensivekv.evaluation.report.writing import write_results
    from defensivekv.evaluation.runner import read_records, read_timings

    results = Results.from_records(read_records(output), read_timings(output))
    with console.status("writing the report"):
        page = write_results(results, output, against_paper=against_paper)
    print_report(results, console, against_paper=against_paper)
    console.print(f"report {escape(str(page))}", highlight=False)
    return any(cell.n for cell in results.cells.values())
