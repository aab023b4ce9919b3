"""Peak memory over the prompt's length, each way of reading in a process of its own."""

import time
from collections.abc import Callable, Iterator

from defensivekv.bench.contenders import Contender, format_budget, readers
from defensivekv.bench.measures.peak import peak_of
from defensivekv.bench.plan import OURS, BenchPlan
from defensivekv.bench.records import CellRecord
from defensivekv.bench.rivals.registry import Field
from defensivekv.errors import RivalError
from defensivekv.policies import policy as make_policy
from defensivekv.policies.steps import check_evicts_in_steps


def measure_memory(
    field: Field, plan: BenchPlan, threads: int, length: int, tokens: int, say: Callable[[str], None]
) -> CellRecord:
    """The full cache, and this package's policies with the prompt read whole and in chunks."""
    started = time.perf_counter()
    outcomes = []
    for contender, way, label in _ways(field, plan):
        say(label)
        policy = contender.policy or plan.policies[0]
        share = None if contender.budget is None else str(contender.budget)
        try:
            peak = peak_of(field.host.subject, threads, way, tokens, policy=policy, share=share)
        except RivalError as error:
            outcomes.append(contender.outcome("failed", label=label, reason=str(error)))
        else:
            outcomes.append(contender.outcome(label=label, peak_bytes=peak))
    return CellRecord(
        kind="memory",
        length=length,
        batch=1,
        filled=tokens,
        wall_s=round(time.perf_counter() - started, 1),
        outcomes=tuple(outcomes),
    )


def _ways(field: Field, plan: BenchPlan) -> Iterator[tuple[Contender, str, str]]:
    for contender in readers(field.rivals, plan):
        if contender.rival.name == "stock":
            yield contender, "stock", "stock"
        if contender.rival.name == OURS:
            yield contender, "whole", contender.label
            assert contender.budget is not None
            if _takes_chunks(contender):
                yield contender, "chunked", f"{contender.policy} {format_budget(contender.budget)}, in chunks"


def _takes_chunks(contender: Contender) -> bool:
    assert contender.policy is not None
    try:
        check_evicts_in_steps(make_policy(contender.policy, contender.budget))
    except ValueError:
        return False
    return True
