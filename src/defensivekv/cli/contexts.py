"""`defensivekv contexts`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from defensivekv.budget import format_bytes
from defensivekv.cli.documents import CONTEXT_SUFFIX, open_store
from defensivekv.cli.options import StoreAddress, StoreBytes
from defensivekv.console import make_console, print_whole
from defensivekv.errors import InvalidInputError

if TYPE_CHECKING:
    from defensivekv.integrations.transformers import ContextFacts, ContextStore

app = typer.Typer(help="Compressed documents in a store.", no_args_is_help=True)

_SHOWN_DIGITS = 12
Key = Annotated[str, typer.Argument(help="Of the context: as many of its first digits as tell it from the others.")]


def _store(address: str | None, max_bytes: str | None = None) -> "ContextStore":
    if address is None:
        raise InvalidInputError("no store: give --store FOLDER, or set DEFENSIVEKV_STORE")
    from defensivekv.integrations.transformers.contexts.store import local_folder

    place = local_folder(address)
    if place is not None and not place.expanduser().is_dir():
        raise InvalidInputError(f"no store at {address!r}: it is made by `defensivekv compress --store`")
    opened = open_store(address, max_bytes)
    assert opened is not None
    return opened


@app.command("list")
def list_contexts(store: StoreAddress = None) -> None:
    """What is in the store, the most recently used first."""
    console, entries = make_console(), _store(store).list()
    table = Table(box=None, pad_edge=False)
    for name in ("key", "policy", "budget", "model", "last used"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        facts, used = entry.facts, entry.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
        known = ("unreadable", "", "") if facts is None else (facts.policy, facts.budget, facts.model)
        tokens = "" if facts is None else f"{facts.num_tokens:,}"
        table.add_row(entry.key[:_SHOWN_DIGITS], *map(Text, known), used, tokens, format_bytes(entry.nbytes))
    print_whole(table, console)
    total = format_bytes(sum(entry.nbytes for entry in entries))
    console.print(f"{len(entries)} context{'' if len(entries) == 1 else 's'}, {total}")


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="Of the context, or its first digits; or a .kv file.")],
    store: StoreAddress = None,
) -> None:
    """All that a file says of its context."""
    console = make_console()
    if Path(key).suffix == CONTEXT_SUFFIX:
        from defensivekv.integrations.transformers.contexts.files import file_facts

        _print_facts(file_facts(Path(key)), Path(key).stat().st_size, console)
        return
    opened = _store(store)
    entry = opened.describe(opened.resolve(key))
    if entry.facts is None:
        raise InvalidInputError(f"the file of {entry.key} is damaged, or cannot be read: remove it")
    _print_facts(entry.facts, entry.nbytes, console)


def _print_facts(facts: "ContextFacts", nbytes: int, console: Console) -> None:
    rows = {
        "key": facts.key,
        "model": f"{facts.model or 'without a name'}, {facts.dtype}",
        "policy": facts.policy,
        "budget": facts.budget,
        "held": f"{facts.held:.2%} of the document's entries",
        "tokens": f"{facts.num_tokens:,}",
        "read in": f"{facts.prefill_seconds:.2f} s",
        "steps": ", ".join(facts.steps) or "none after the document",
        "created": facts.created,
        "made with": ", ".join(f"{name} {version}" for name, version in facts.made_with.items()),
        "file": format_bytes(nbytes),
    }
    for name, value in rows.items():
        console.print(f"{name:<10} {escape(value)}", soft_wrap=True)


@app.command()
def remove(key: Key, store: StoreAddress = None) -> None:
    """Remove one context."""
    opened = _store(store)
    whole = opened.resolve(key)
    if not opened.remove(whole):
        raise InvalidInputError(f"{whole} was not there any more")
    make_console().print(f"removed {whole}")


@app.command()
def prune(store: StoreAddress = None, store_max_bytes: StoreBytes = None) -> None:
    """Remove what writers that died left, and the least recently used contexts beyond --store-max-bytes."""
    gone = _store(store, store_max_bytes).prune()
    make_console().print(f"removed {len(gone)} context{'' if len(gone) == 1 else 's'}")
