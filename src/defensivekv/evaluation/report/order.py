"""The order and the short names of policies, budgets, suites, tasks and domains, as the paper's tables have them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from defensivekv.budget import Budget
from defensivekv.errors import BudgetError
from defensivekv.evaluation.report.text import one_line

FULL = "full"
"""The policy that keeps everything; the yardstick of every table."""

POLICIES = (
    FULL,
    "streaming-llm",
    "random",
    "snapkv",
    "adakv",
    "cake",
    "duo-attention",
    "criticalkv",
    "ada-criticalkv",
    "defensivekv",
    "layer-defensivekv",
)

RULER = {
    "cwe": "cwe",
    "fwe": "fwe",
    "niah_multikey_1": "MK1",
    "niah_multikey_2": "MK2",
    "niah_multikey_3": "MK3",
    "niah_multiquery": "MQ",
    "niah_multivalue": "MV",
    "niah_single_1": "S1",
    "niah_single_2": "S2",
    "niah_single_3": "S3",
    "qa_1": "qa1",
    "qa_2": "qa2",
    "vt": "vt",
}
"""RULER's tasks (arXiv 2404.06654), in the order of the authors' table, and their short names."""

LONGBENCH = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summarisation": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
"""LongBench's 16 English datasets (arXiv 2308.14508) by domain."""

_NEEDLEWORLD = ("single_key", "multi_key", "multi_value", "multi_query", "variable_chain")
_SUITES = ("longbench", "ruler", "niah", "needleworld")
_BUDGETS = ("share", "adaptive", "entries", "bytes")
_TASKS = (*(task for tasks in LONGBENCH.values() for task in tasks), *RULER, *_NEEDLEWORLD)


class Group(NamedTuple):
    """Tasks that may be averaged: those of one suite at one length (tokens of a context; None where it varies)."""

    suite: str
    length: int | None

    @property
    def label(self) -> str:
        """Its name for people."""
        return one_line(self.suite, 40) + (f", {self.length:,} tokens" if self.length else "")


class BudgetRank(NamedTuple):
    """Sorts shares, adaptive budgets, entries, bytes, and what is not understood, in this order, each by amount."""

    kind: int
    amount: float
    text: str


def base_task(task: str) -> str:
    """The task's name without its suite and its length: "vt" of "ruler/vt@4096"."""
    return task.split("/", 1)[-1].rsplit("@", 1)[0]


def task_length(task: str) -> int | None:
    """The length in the task's name, in tokens: 4096 of "ruler/vt@4096"."""
    match = re.search(r"@([0-9]{1,9})$", task)
    return int(match[1]) if match else None


def task_label(task: str) -> str:
    """What a column of the task is called: "MK1" of "ruler/niah_multikey_1@4096"."""
    base = base_task(task)
    return RULER.get(base, one_line(base, 24)) if task.startswith("ruler/") else one_line(base, 24)


def sorted_policies(names: Iterable[str]) -> list[str]:
    """The paper's rows in their order; a variant ("snapkv-w16") after the one it is named for; the rest by name."""
    return sorted(set(names), key=_policy_rank)


def sorted_tasks(names: Iterable[str]) -> list[str]:
    """Tasks in the order of their suite's table; the rest by name."""
    return sorted(set(names), key=lambda name: (_index(_TASKS, base_task(name)), name))


def sorted_groups(groups: Iterable[Group]) -> list[Group]:
    """LongBench, RULER, needles, then the rest by name; short contexts first."""
    return sorted(set(groups), key=lambda group: (_index(_SUITES, group.suite), group.suite, group.length or 0))


def budget_rank(text: str) -> BudgetRank:
    """Where a budget, as a record has it in words, stands among others."""
    try:
        budget = Budget.parse(text.removesuffix(" entries per head"))
    except BudgetError:
        return BudgetRank(len(_BUDGETS), 0.0, text)
    return BudgetRank(_BUDGETS.index(budget.kind), float(budget.amount), text)


def budget_share(text: str) -> float | None:
    """The share that the budget asks for, or None where it is a count or a size."""
    rank = budget_rank(text)
    return rank.amount if rank.kind == 0 else None


def budget_label(text: str) -> str:
    """The budget for people: "20 %" for a share, otherwise as it was given."""
    share = budget_share(text)
    return one_line(text, 40) if share is None else f"{100 * share:.4g} %"


def _policy_rank(name: str) -> tuple[int, int, str]:
    if name in POLICIES:
        return POLICIES.index(name), 0, name
    stems = [known for known in POLICIES if re.match(rf"{known}[^a-z0-9]", name)]
    if stems:
        return POLICIES.index(max(stems, key=len)), 1, name
    return len(POLICIES), 0, name


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
