"""`defensivekv policies`."""

from rich import box
from rich.console import Console
from rich.table import Table

from defensivekv.policies import policies, policy, summary


def list_policies() -> None:
    """List the policies: what each keeps, how it splits the budget, and the paper it comes from."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    table.add_column("what it keeps")
    table.add_column("budget is split")
    table.add_column("paper (arXiv)", no_wrap=True)
    for name in policies():
        one = policy(name, budget=1.0)
        split = "" if name == "full" else one.allocation.description
        table.add_row(name, summary(name), split, one.paper.rpartition("/")[2])
    Console().print(table)
