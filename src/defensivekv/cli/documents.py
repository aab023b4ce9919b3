"""Documents on the command line: read, compressed, found again; what `ask` and `compress` have in common."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from defensivekv.budget import format_bytes
from defensivekv.errors import InvalidInputError
from defensivekv.policies import policy as make_policy

if TYPE_CHECKING:
    from defensivekv.integrations.transformers import Context, ContextStore

CONTEXT_SUFFIX = ".kv"
DEFAULT_POLICY = "layer-defensivekv"


@dataclass(frozen=True)
class Asked:
    """How a document is to be compressed; fields as the options of `defensivekv compress`."""

    model: str | None
    policy: str | None
    budget: str | None
    max_entries: int | None
    chunk_size: int | None
    dtype: str
    device: str
    template: str
    trust_remote_code: bool

    def compress(self, source: str, store: "ContextStore | None", console: Console) -> "Context":
        """Reads a text file, or finds it in the store. Bad options are refused before the model is loaded."""
        name = self.policy or DEFAULT_POLICY
        chosen = make_policy(name, self.budget or (None if name == "full" else "0.2"))
        if self.template not in ("auto", "chat", "plain"):
            raise InvalidInputError(f"unknown template {self.template!r}: use auto, chat or plain")
        document = read_document(source)

        from defensivekv.cli.models import load_model
        from defensivekv.integrations.transformers import compress

        model, tokenizer = load_model(
            self.model,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            console=console,
        )
        with console.status("reading the document"):
            return compress(
                model,
                tokenizer,
                document,
                chosen,
                template=self.template,  # type: ignore[arg-type]
                max_entries=self.max_entries,
                chunk_size=self.chunk_size,
                store=store,
            )

    def load(self, path: Path, console: Console) -> "Context":
        """Loads a stored context, with the model that its file names where none is; shrinks it to a smaller budget."""
        given = {"policy": self.policy, "max-entries": self.max_entries, "chunk-size": self.chunk_size}
        wrong = next((name for name, value in given.items() if value is not None), None)
        if wrong is not None or self.template != "auto":
            raise InvalidInputError(
                f"{str(path)!r} is compressed already: leave --{wrong or 'template'} out, or give the document itself"
            )

        from defensivekv.cli.models import PACKAGED, load_model
        from defensivekv.integrations.transformers import load_context
        from defensivekv.integrations.transformers.contexts.files import file_facts

        facts = file_facts(path)
        name = self.model or (None if facts.model == PACKAGED else facts.model)
        if self.model is None and not facts.model:
            raise InvalidInputError(f"{str(path)!r} does not say which model made it: name the model")
        if self.model is None and self.trust_remote_code:
            raise InvalidInputError(f"name the model whose code is to be trusted: {str(path)!r} says {facts.model!r}")
        if self.model is None and name is not None and Path(name).is_absolute() and not Path(name).is_dir():
            raise InvalidInputError(f"{name!r}, which made {str(path)!r}, is not there any more: name the model")
        model, tokenizer = load_model(
            name,
            dtype=facts.dtype if self.dtype == "auto" else self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            console=console,
        )
        context = load_context(path, model, tokenizer)
        return context if self.budget is None else context.shrink(self.budget)


def open_store(address: str | None, max_bytes: str | None) -> "ContextStore | None":
    """The store at that address; None where none is given."""
    if address is None:
        if max_bytes is not None:
            raise InvalidInputError("--store-max-bytes is for a store: give --store as well")
        return None
    from defensivekv.integrations.transformers import ContextStore

    return ContextStore(address, max_bytes)


def read_document(source: str) -> str:
    """The text of a file, or of standard input for '-'. Raises InvalidInputError where there is none."""
    if not source:
        raise InvalidInputError("no document: give --context FILE, or --context - for standard input")
    try:
        text = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read {source!r} as text: {error}") from error
    if not text.strip():
        raise InvalidInputError(f"the document {source!r} is empty")
    return text


def print_context(context: "Context", console: Console) -> None:
    """Where the context came from, what it holds, and what was kept."""
    report, tokens, seconds = context.report(), context.num_tokens, context.prefill_seconds
    came = (
        f"{tokens} tokens, read before in {seconds:.2f} s"
        if context.was_stored
        else f"{tokens} tokens read in {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s, compression included)"
    )
    console.print(
        f"document   {came}\n"
        f"cache      {format_bytes(report.evicted_nbytes)} held of {format_bytes(report.full_bytes)}: "
        f"{report.achieved:.1%} of the entries kept by {escape(report.policy)}, budget {escape(report.asked)}"
    )
