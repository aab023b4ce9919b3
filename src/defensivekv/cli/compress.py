"""`defensivekv compress`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from defensivekv.budget import format_bytes
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


def compress(
    model: ModelName = None,
    context: Annotated[str, typer.Option(help="Text file with the document; '-' reads standard input.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, whose name ends in .kv.")
    ] = None,
    policy: PolicyName = None,
    budget: BudgetText = None,
    max_entries: MaxEntries = None,
    chunk_size: ChunkSize = None,
    store: StoreAddress = None,
    store_max_bytes: StoreBytes = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    template: TemplateName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compress a document once and keep it, in a file or a store, for `ask --context` and `ask --store`."""
    console = make_console()
    if output is None and store is None:
        raise InvalidInputError("nowhere to keep it: give -o book.kv, or --store FOLDER")
    if output is not None:
        _check_output(output.absolute())
    asked = Asked(model, policy, budget, max_entries, chunk_size, dtype, device, template, trust_remote_code)
    opened = open_store(store, store_max_bytes)
    compressed = asked.compress(context, opened, console)
    print_context(compressed, console)
    if output is not None:
        compressed.save(output)
        console.print(f"file       {escape(str(output))}, {format_bytes(output.stat().st_size)}")
    if opened is not None:
        if compressed.key not in opened:
            raise InvalidInputError(f"the context is not in {store}: the warning above says why")
        console.print(f"store      {escape(opened.address)}, key {compressed.key}")


def _check_output(path: Path) -> None:
    """Before the document is read. Raises InvalidInputError for a file that could not be written."""
    if path.suffix != CONTEXT_SUFFIX:
        raise InvalidInputError(f"the file {path.name!r} must end in {CONTEXT_SUFFIX}, by which `ask` knows it")
    if not path.parent.is_dir():
        raise InvalidInputError(f"no folder {str(path.parent)!r} to write {path.name} to: make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidInputError(f"cannot write {str(path)!r}: it is a folder, or in one for reading alone")
