"""The largest batch and the longest context in a given memory, from the bytes that caches really hold."""

import time
from collections.abc import Callable, Iterator

from defensivekv.bench.contenders import Contender, fillers
from defensivekv.bench.measures.peak import peak_of
from defensivekv.bench.plan import OURS, BenchPlan
from defensivekv.bench.records import CellRecord, Outcome
from defensivekv.bench.rivals.registry import Field
from defensivekv.bench.rivals.rival import Filling
from defensivekv.bench.sizes import format_tokens
from defensivekv.budget import format_bytes
from defensivekv.errors import RivalError

_PROBED = (1024, 2048)
"""Tokens of two caches that are filled, to tell what one token more takes."""


def measure_capacity(
    field: Field, plan: BenchPlan, threads: int, memory: int, say: Callable[[str], None]
) -> CellRecord:
    """Of the full cache and of this package's budgets. Weights and held cache are counted, and nothing else."""
    started = time.perf_counter()
    outcomes = []
    for contender in _keepers(field, plan):
        say(contender.label)
        outcomes.append(_capacity(field, plan, threads, contender, memory, say))
    return CellRecord(
        kind="capacity",
        length=0,
        batch=0,
        filled=0,
        memory_bytes=memory,
        wall_s=round(time.perf_counter() - started, 1),
        outcomes=tuple(outcomes),
    )


def _keepers(field: Field, plan: BenchPlan) -> Iterator[Contender]:
    for contender in fillers(field.rivals, plan):
        if contender.rival.name in ("stock", OURS) and (contender.budget is None or contender.budget.kind == "share"):
            yield contender


def _capacity(
    field: Field,
    plan: BenchPlan,
    threads: int,
    contender: Contender,
    memory: int,
    say: Callable[[str], None],
) -> Outcome:
    free = memory - field.host.facts.weight_bytes
    if free <= 0:
        reason = f"the weights alone take {format_bytes(field.host.facts.weight_bytes)}"
        return contender.outcome("no room", reason=reason)
    each = _bytes_per_token(contender, plan)
    longest = int(free / each)
    batches = {tokens: int(free / (each * tokens)) for tokens in plan.tokens}
    verified = ""
    positions = field.host.facts.positions or longest
    if plan.verify:
        tokens = min(longest, positions - 1)
        batch = max(1, int(free / (each * tokens)))
        say(f"allocating {contender.label}: {batch} x {format_tokens(tokens)}")
        verified = _verified(field, threads, contender, tokens, batch, memory)
    return contender.outcome(
        held_bytes=round(each),
        longest=longest,
        largest_batches=batches,
        verified=verified,
        note=_note(longest, positions),
    )


def _note(longest: int, positions: int) -> str:
    return f"the model has {format_tokens(positions)} positions" if longest > positions else ""


def _bytes_per_token(contender: Contender, plan: BenchPlan) -> float:
    held = []
    for tokens in _PROBED:
        stepper = contender.rival.fill(Filling(tokens, 1, contender.share(tokens), 1, plan.seed))
        held.append(stepper.held_bytes)
        stepper.close()
    return (held[1] - held[0]) / (_PROBED[1] - _PROBED[0])


def _verified(field: Field, threads: int, contender: Contender, tokens: int, batch: int, memory: int) -> str:
    """Fills caches of that size in a process of its own, and has them generate one token of each sequence."""
    way = "stock" if contender.budget is None else "whole"
    share = None if contender.budget is None else str(contender.budget)
    described = f"{batch} x {format_tokens(tokens)}"
    try:
        peak = peak_of(field.host.subject, threads, way, tokens, share=share, fills=batch)
    except RivalError as error:
        return f"{described}: {error}"
    taken = peak + field.host.facts.weight_bytes
    return f"{described}: one step took {format_bytes(taken)} at its peak, {taken / memory:.0%} of the memory"
