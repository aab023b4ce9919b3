"""`defensivekv ask`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from defensivekv.cli.documents import CONTEXT_SUFFIX, Asked, open_store, print_context
from defensivekv.cli.options import (
    BudgetText,
    ChunkSize,
    Device,
    Dtype,
    MaxEntries,
    ModelName,
    PolicyName,
    StoreAddress,
    StoreBytes,
    TemplateName,
    TrustRemoteCode,
)
from defensivekv.console import make_console
from defensivekv.errors import InvalidInputError


def ask(
    model: ModelName = None,
    context: Annotated[
        str, typer.Option(help="Text file with the document, '-' for standard input, or a .kv file of `compress`.")
    ] = "",
    question: Annotated[list[str] | None, typer.Option(help="A question; give the option again for more.")] = None,
    policy: PolicyName = None,
    budget: BudgetText = None,
    max_entries: MaxEntries = None,
    chunk_size: ChunkSize = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    store: StoreAddress = None,
    store_max_bytes: StoreBytes = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    template: TemplateName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a document once, or find it compressed, and answer each question from what is kept of its cache."""
    console = make_console()
    if not question:
        raise InvalidInputError("no question: give --question at least once")
    for number, text in enumerate(question, start=1):
        if not text.strip() or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InvalidInputError(f"question {number} is empty or not UTF-8")
    asked = Asked(model, policy, budget, max_entries, chunk_size, dtype, device, template, trust_remote_code)
    if Path(context).suffix == CONTEXT_SUFFIX:
        compressed = asked.load(Path(context), console)
    else:
        compressed = asked.compress(context, open_store(store, store_max_bytes), console)
    print_context(compressed, console)
    for text in question:
        with console.status("answering"):
            answer = compressed.answer(text, max_new_tokens=max_new_tokens)
        # As they are: whatever a model says is no markup.
        console.print(Text.assemble("\n", ("question", "bold"), f"   {text}"))
        console.print(Text.assemble(("answer", "bold"), f"     {answer.text}"))
        console.print(
            f"[dim]           {answer.question_tokens} + {answer.new_tokens} tokens in {answer.seconds:.2f} s "
            f"({answer.new_tokens / answer.seconds:,.1f} new tokens/s, the question's reading included)[/]"
        )
