"""Rivals at budgets: who takes turns in a cell, and with whom there is room for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from defensivekv.bench.plan import OURS, BenchPlan
from defensivekv.bench.records import Outcome, Status
from defensivekv.bench.rivals.rival import Filling, Prompt, Rival
from defensivekv.budget import Budget


@dataclass(frozen=True)
class Contender:
    """A rival at a budget. budget: None where it holds everything. policy: of ours, where that matters."""

    rival: Rival
    budget: Budget | None
    policy: str | None = None

    @property
    def label(self) -> str:
        """For tables and figures."""
        name = self.rival.name if self.policy is None else self.policy
        return name if self.budget is None else f"{name} {format_budget(self.budget)}"

    def share(self, tokens: int) -> Fraction | None:
        """Of that many tokens' entries, what it keeps."""
        return None if self.budget is None else self.budget.share(tokens, 1)

    def filling(self, tokens: int, batch: int, plan: BenchPlan) -> Filling:
        """What its cache is filled with."""
        return Filling(tokens, batch, self.share(tokens), plan.room, plan.seed)

    def prompt(self, tokens: int, plan: BenchPlan) -> Prompt:
        """What it reads."""
        return Prompt(tokens, self.share(tokens), self.policy or plan.policies[0], plan.seed)

    def outcome(self, status: Status = "ok", **fields: object) -> Outcome:
        """What it did."""
        budget = None if self.budget is None else str(self.budget)
        given = {"rival": self.rival.name, "label": self.label, "budget": budget, "policy": self.policy}
        return Outcome.model_validate({**given, "status": status, **fields})


def format_budget(budget: Budget) -> str:
    """In short: "20 %", or "1024 a head"."""
    if budget.kind == "share":
        return f"{float(100 * budget.amount):g} %"
    return f"{int(budget.amount)} a head"


def fillers(rivals: Sequence[Rival], plan: BenchPlan) -> list[Contender]:
    """Who generates tokens; this package at the first budget comes first. What it holds there is any policy's."""
    return [
        Contender(rival, budget)
        for rival in rivals
        if rival.fills
        for budget in (plan.shares if rival.takes_budget else (None,))
    ]


def readers(rivals: Sequence[Rival], plan: BenchPlan) -> list[Contender]:
    """Who reads prompts: this package under each of the policies."""
    return [
        Contender(rival, budget, policy)
        for rival in rivals
        if rival.reads
        for budget in (plan.shares if rival.takes_budget else (None,))
        for policy in (plan.policies if rival.name == OURS else (None,))
    ]


def in_groups(needs: Sequence[int], room: int) -> tuple[list[list[int]], list[int]]:
    """Numbers of those that are measured together within `room` bytes, and of those that do not fit at all.

    The first takes part in every group, so that the groups can be held against each other.
    """
    if needs[0] > room:
        return [], list(range(len(needs)))
    groups: list[list[int]] = [[0]]
    unfit: list[int] = []
    for number in range(1, len(needs)):
        if needs[0] + needs[number] > room:
            unfit.append(number)
        elif sum(needs[member] for member in groups[-1]) + needs[number] <= room:
            groups[-1].append(number)
        else:
            groups.append([0, number])
    return groups, unfit
