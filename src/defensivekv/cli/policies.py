"""`defensivekv policies`."""

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from defensivekv.console import make_console, print_whole
from defensivekv.policies import policies, policy, summary
from defensivekv.policies.presets import DUO_ATTENTION
from defensivekv.policies.profile import HeadProfile

_ANY_PROFILE = HeadProfile(((1.0,),), num_sinks=64, num_recent=256)
_COLUMNS = ("policy", "what it keeps", "budget is split", "paper (arXiv)")


def list_policies(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table, with links.")] = False,
) -> None:
    """List the policies: what each keeps, how it splits the budget, and the paper it comes from."""
    if markdown:
        print(markdown_table())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    for name, keeps, split, paper in _rows():
        table.add_row(name, keeps, split, paper.rpartition("/")[2])
    print_whole(table, make_console())


def markdown_table() -> str:
    """The table as the documentation has it."""
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    for name, keeps, split, paper in _rows():
        link = f"[{paper.rpartition('/')[2]}]({paper})" if paper else ""
        lines.append(" | ".join((f"`{name}`", keeps, split, link)))
    return "\n".join(f"| {line} |" for line in lines)


def _rows() -> list[tuple[str, str, str, str]]:
    """Of each policy its name, what it keeps, how the budget is split, and the paper's address."""
    rows = []
    for name in policies():
        one = policy(name, budget=1.0, profile=_ANY_PROFILE if name == DUO_ATTENTION else None)
        split = "" if name == "full" else one.allocation.description
        rows.append((name, summary(name), split, one.paper))
    return rows
