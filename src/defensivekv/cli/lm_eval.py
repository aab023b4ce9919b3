"""`defensivekv lm-eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from defensivekv.errors import DefensiveKVError, InvalidInputError
from defensivekv.policies import policy as make_policy


def lm_eval(
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names or patterns of the harness's tasks; with commas.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Local folder or hub name; the packaged model if left out.")] = None,
    policy: Annotated[str, typer.Option(help="See `defensivekv policies`.")] = "layer-defensivekv",
    budget: Annotated[
        str | None, typer.Option(help="What to keep: 0.2 (the default), 20%, 1024 (entries per head) or 64MiB.")
    ] = None,
    scoring: Annotated[str | None, typer.Option(help="In place of the policy's own part.")] = None,
    aggregation: Annotated[str | None, typer.Option(help="In place of the policy's own part.")] = None,
    weighting: Annotated[str | None, typer.Option(help="In place of the policy's own part.")] = None,
    allocation: Annotated[str | None, typer.Option(help="In place of the policy's own part.")] = None,
    window_size: Annotated[int | None, typer.Option(min=1, help="Tokens of the observation window.")] = None,
    profile: Annotated[Path | None, typer.Option(help="File of head profiles, for duo-attention.")] = None,
    query_aware: Annotated[bool, typer.Option("--query-aware", help="Compress with the question in sight.")] = False,
    context_field: Annotated[
        str | None, typer.Option(help="The documents' field with the context, where it has another name.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each document.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Continuations scored at a time.")] = 1,
    template: Annotated[str, typer.Option(help="auto, chat or plain.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the harness's results and our settings.")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Write each document and answer as well.")] = False,
) -> None:
    """Run tasks of the lm-evaluation-harness with contexts compressed before their questions are seen."""
    console = Console()
    if template not in ("auto", "chat", "plain"):
        raise InvalidInputError(f"unknown template {template!r}: use auto, chat or plain")
    parts = {
        "scoring": scoring,
        "aggregation": aggregation,
        "weighting": weighting,
        "allocation": allocation,
        "window_size": window_size,
        "profile": profile,
    }
    given: dict[str, Any] = {name: value for name, value in parts.items() if value is not None}
    chosen = make_policy(policy, budget or (None if policy == "full" else "0.2"), **given)
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InvalidInputError(f"cannot write {str(output)!r}: give --output a file in a folder that exists")
    if log_samples and output is None:
        raise InvalidInputError("--log-samples has nowhere to write to: give --output FILE")

    from defensivekv.integrations.lm_eval import EvictingLM  # first: says what to install

    manager, names = _find_tasks(tasks, include_path)

    from defensivekv.cli.models import load_model

    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, console=console
    )
    if template == "chat" and not tokenizer.chat_template:
        raise InvalidInputError("the tokenizer has no chat template: use --template plain")
    adapter = EvictingLM(
        loaded,
        tokenizer=tokenizer,
        policy=chosen,
        query_aware=query_aware,
        context_field=context_field,
        batch_size=batch_size,
    )
    results = _run(
        adapter,
        manager,
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        apply_chat_template=template != "plain" and bool(tokenizer.chat_template),
        log_samples=log_samples,
    )
    _print(results, adapter.describe(), console)
    if output is not None:
        _write(results, output)
        console.print(f"results {escape(str(output))}", highlight=False)


def _find_tasks(tasks: list[str] | None, include_path: Path | None) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names that it knows of those asked for. Raises InvalidInputError."""
    from lm_eval.tasks import TaskManager

    asked = [name.strip() for given in tasks or [] for name in given.split(",") if name.strip()]
    if not asked:
        raise InvalidInputError("no tasks: give --tasks, such as longbench_hotpotqa or boolq")
    if include_path is not None and not include_path.is_dir():
        raise InvalidInputError(f"no folder {str(include_path)!r}: give --include-path a folder of task files")
    try:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    except Exception as error:  # broken task files fail in many ways
        raise InvalidInputError(f"cannot read the task files: {type(error).__name__}: {error}") from error
    names: list[str] = []
    for name in asked:
        matches = manager.match_tasks([name])
        if not matches:
            raise InvalidInputError(
                f"no task {name!r}: `lm-eval ls tasks` lists those of the harness, --include-path adds your own"
            )
        names += [match for match in matches if match not in names]
    return manager, names


def _run(adapter: Any, manager: Any, **options: Any) -> dict[str, Any]:
    """The harness's results. What stops it is an error of ours, or of a task that cannot be loaded."""
    from lm_eval import simple_evaluate

    try:
        results: dict[str, Any] = simple_evaluate(adapter, task_manager=manager, **options)
    except DefensiveKVError:
        raise
    except Exception as error:  # tasks and their data fail in many ways
        raise InvalidInputError(f"the harness stopped: {type(error).__name__}: {error}") from error
    return results


def _print(results: dict[str, Any], settings: dict[str, Any], console: Console) -> None:
    from lm_eval.utils import make_table

    for column in ("results", "groups"):
        if column in results:
            console.print(escape(make_table(results, column)), highlight=False, soft_wrap=True)
    contexts, budget = settings["contexts"], settings["budget"]
    console.print(
        f"policy {escape(settings['policy'])}, budget {escape(budget['asked'])}: "
        f"{budget['achieved']['mean']:.1%} of the entries kept in the mean of {contexts['read']} contexts",
        highlight=False,
    )
    if settings["policy"] != "full" and contexts["kept_whole"]:
        console.print(
            f"[yellow]{contexts['kept_whole']} of them kept whole, as too short to compress or by their budget[/]",
            highlight=False,
        )


def _write(results: dict[str, Any], output: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    try:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"cannot write {str(output)!r}: {error}") from error
