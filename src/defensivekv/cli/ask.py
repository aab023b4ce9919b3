"""`defensivekv ask`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from defensivekv.budget import format_bytes
from defensivekv.errors import InvalidInputError
from defensivekv.policies import policy as make_policy


def ask(
    model: Annotated[
        str | None, typer.Argument(help="Local folder or hub name; the packaged model if left out.")
    ] = None,
    context: Annotated[str, typer.Option(help="Text file with the document; '-' reads standard input.")] = "",
    question: Annotated[list[str] | None, typer.Option(help="A question; give the option again for more.")] = None,
    policy: Annotated[str, typer.Option(help="See `defensivekv policies`.")] = "layer-defensivekv",
    budget: Annotated[
        str | None,
        typer.Option(help="What to keep: 0.2 (the default), 20%, 1024 (entries per head), 64MiB, auto:0.99."),
    ] = None,
    max_entries: Annotated[
        int | None, typer.Option(min=1, help="Entries per head that may ever be held, question and answer counted.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the document read at a time; all, or 512 under a bound.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    template: Annotated[str, typer.Option(help="auto, chat or plain.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
) -> None:
    """Compress a document once and answer each question from what is kept of its cache."""
    console = Console()
    chosen = make_policy(policy, budget or (None if policy == "full" else "0.2"))
    if not question:
        raise InvalidInputError("no question: give --question at least once")
    for number, text in enumerate(question, start=1):
        if not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InvalidInputError(f"question {number} is empty or not UTF-8")
    if template not in ("auto", "chat", "plain"):
        raise InvalidInputError(f"unknown template {template!r}: use auto, chat or plain")
    document = read_document(context)

    from defensivekv.cli.models import load_model
    from defensivekv.integrations.transformers import compress

    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, console=console
    )
    with console.status("reading the document"):
        compressed = compress(
            loaded,
            tokenizer,
            document,
            chosen,
            template=template,  # type: ignore[arg-type]
            max_entries=max_entries,
            chunk_size=chunk_size,
        )
    report = compressed.report()
    console.print(
        f"document   {compressed.num_tokens} tokens read in {compressed.prefill_seconds:.2f} s "
        f"({compressed.num_tokens / compressed.prefill_seconds:,.0f} tokens/s, compression included)\n"
        f"cache      {format_bytes(report.evicted_nbytes)} held of {format_bytes(report.full_bytes)}: "
        f"{report.achieved:.1%} of the entries kept by {escape(report.policy)}, budget {escape(report.asked)}",
        highlight=False,
    )
    for text in question:
        with console.status("answering"):
            answer = compressed.answer(text, max_new_tokens=max_new_tokens)
        console.print(f"\n[bold]question[/]   {escape(text)}", highlight=False)
        console.print(f"[bold]answer[/]     {escape(answer.text)}", highlight=False)
        console.print(
            f"[dim]           {answer.question_tokens} + {answer.new_tokens} tokens in {answer.seconds:.2f} s "
            f"({answer.new_tokens / answer.seconds:,.1f} new tokens/s, the question's reading included)[/]",
            highlight=False,
        )


def read_document(source: str) -> str:
    """The text of a file, or of standard input for '-'. Raises InvalidInputError where there is none."""
    if not source:
        raise InvalidInputError("no document: give --context FILE, or --context - for standard input")
    try:
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {source!r} as text: {error}") from error
    if not text.strip():
        raise InvalidInputError(f"the document {source!r} is empty")
    return text
