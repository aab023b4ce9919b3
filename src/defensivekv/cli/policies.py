"""`defensivekv policies`."""

from rich import box
from rich.console import Console
from rich.table import Table

from defensivekv.policies import policies, policy, summary

_WIDEST = 400


def list_policies() -> None:
    """List the policies: what each keeps, how it splits the budget, and the paper it comes from."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("policy", "what it keeps", "budget is split", "paper (arXiv)"):
        table.add_column(column, no_wrap=True)
    for name in policies():
        one = policy(name, budget=1.0)
        split = "" if name == "full" else one.allocation.description
        table.add_row(name, summary(name), split, one.paper.rpartition("/")[2])
    # One line for each policy even where the terminal is narrower: it wraps them, and a pipe should get them whole.
    width = Console(width=_WIDEST).measure(table).maximum
    Console(width=max(Console().width, width)).print(table)
