"""`defensivekv policies`."""

from rich import box
from rich.console import Console
from rich.table import Table

from defensivekv.policies import policies, policy, summary
from defensivekv.policies.presets import DUO_ATTENTION
from defensivekv.policies.profile import HeadProfile

_WIDEST = 400
_ANY_PROFILE = HeadProfile(((1.0,),), num_sinks=64, num_recent=256)


def list_policies() -> None:
    """List the policies: what each keeps, how it splits the budget, and the paper it comes from."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("policy", "what it keeps", "budget is split", "paper (arXiv)"):
        table.add_column(column, no_wrap=True)
    for name in policies():
        one = policy(name, budget=1.0, profile=_ANY_PROFILE if name == DUO_ATTENTION else None)
        split = "" if name == "full" else one.allocation.description
        table.add_row(name, summary(name), split, one.paper.rpartition("/")[2])
    # One line for each policy even where the terminal is narrower: it wraps them, and a pipe should get them whole.
    width = Console(width=_WIDEST).measure(table).maximum
    Console(width=max(Console().width, width)).print(table)
