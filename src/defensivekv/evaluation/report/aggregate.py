"""Means over the tasks of a suite or of a domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from defensivekv.evaluation.report.bootstrap import mean_over_tasks, relative_loss
from defensivekv.evaluation.report.cell import Cell, mean_or_none
from defensivekv.evaluation.statistics import Interval


@dataclass(frozen=True)
class Aggregate:
    """One policy at one budget over tasks.

    tasks: that were asked for. missing: those of them without an answered sample; while there are any, there is no
    mean, since it would be over other tasks than the next row's. n, failures, truncations: samples, summed.
    score: mean over the tasks' means. loss: the share of the full cache's mean that is lost, over the `paired` samples
    that both answered; None for the full cache, without it, or where the two cannot be compared. achieved,
    cache_bytes, full_bytes: means over tasks. token_seconds, prefill_seconds: medians over samples.
    """

    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    n: int
    failures: int
    truncations: int
    score: Interval | None
    loss: Interval | None
    paired: int
    achieved: float | None
    cache_bytes: float | None
    full_bytes: float | None
    token_seconds: float | None
    prefill_seconds: float | None
    batch_sizes: frozenset[int]


def aggregate_cells(own: Mapping[str, Cell | None], full: Mapping[str, Cell | None]) -> Aggregate:
    """The aggregate of one policy's cells by task, None where it was not run, against the full cache's."""
    cells = [cell for cell in own.values() if cell is not None]
    answered = [cell for cell in cells if cell.n]
    missing = tuple(task for task, cell in own.items() if cell is None or not cell.n)
    is_whole = bool(answered) and not missing
    loss, paired = _loss(own, full) if is_whole else (None, 0)
    token_times = [seconds for cell in answered for seconds in cell.token_times]
    prefill_times = [timing.prefill_seconds for cell in answered for timing in cell.timings]
    return Aggregate(
        tasks=tuple(own),
        missing=missing,
        n=sum(cell.n for cell in cells),
        failures=sum(cell.failures for cell in cells),
        truncations=sum(cell.truncations for cell in cells),
        score=mean_over_tasks([cell.scores for cell in answered]) if is_whole else None,
        loss=loss,
        paired=paired,
        achieved=mean_or_none([cell.achieved for cell in answered if cell.achieved is not None]),
        cache_bytes=mean_or_none([cell.cache_bytes for cell in answered if cell.cache_bytes is not None]),
        full_bytes=mean_or_none([cell.full_bytes for cell in answered if cell.full_bytes is not None]),
        token_seconds=median(token_times) if token_times else None,
        prefill_seconds=median(prefill_times) if prefill_times else None,
        batch_sizes=frozenset(size for cell in answered for size in cell.batch_sizes),
    )


def domain_loss(domains: Sequence[Sequence[tuple[Cell, Cell]]]) -> Interval | None:
    """The mean of the domains' losses; of each domain, its tasks' cells, the policy's and the full cache's.

    None where a task has no samples that both answered, or where the two cannot be compared.
    """
    paired = [[own.paired_with(full) for own, full in domain] for domain in domains]
    whole = [[pair for pair in domain if pair is not None] for domain in paired]
    return relative_loss(whole) if list(map(len, whole)) == list(map(len, domains)) else None


def _loss(own: Mapping[str, Cell | None], full: Mapping[str, Cell | None]) -> tuple[Interval | None, int]:
    pairs = []
    for task, cell in own.items():
        yardstick = full[task]
        if cell is None or yardstick is None or cell.key == yardstick.key:
            return None, 0
        pair = cell.paired_with(yardstick)
        if pair is None:
            return None, 0
        pairs.append(pair)
    return relative_loss([pairs]), sum(len(scores) for scores, _ in pairs)
