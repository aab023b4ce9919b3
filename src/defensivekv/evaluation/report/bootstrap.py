"""Intervals of means over tasks, and of losses, by resampling samples within tasks."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from defensivekv.evaluation.statistics import CONFIDENCE, RESAMPLES, Interval, mean_interval

Floats = NDArray[np.float64]

Pair = tuple[Floats, Floats]
"""The sample scores of a task, none empty, and the full cache's scores of the same samples."""


def mean_over_tasks(tasks: Sequence[Floats], *, seed: int = 0) -> Interval:
    """The mean of the tasks' means, with its 95 % percentile-bootstrap interval.

    tasks: sample scores of each, none empty. The tasks are given, not drawn: only samples are resampled.
    """
    if len(tasks) == 1:
        return mean_interval(tasks[0].tolist(), seed=seed)
    mean = float(np.mean([scores.mean() for scores in tasks]))
    draws = np.mean([scores[rows].mean(axis=1) for scores, rows in zip(tasks, _rows(tasks, seed), strict=True)], axis=0)
    return _around(mean, draws)


def relative_loss(domains: Sequence[Sequence[Pair]], *, seed: int = 0) -> Interval | None:
    """The share of the full cache's mean that is lost, 1 - mean / full mean, with its paired 95 % interval.

    domains: of each, its tasks' pairs. The means are over the tasks of a domain, the loss is the domains' mean. None
    where the full cache scores nothing in a domain. Negative where nothing is lost.
    """
    losses, draws = [], []
    for number, pairs in enumerate(domains):
        full_mean = float(np.mean([full.mean() for _, full in pairs]))
        if full_mean <= 0:
            return None
        losses.append(1 - float(np.mean([own.mean() for own, _ in pairs])) / full_mean)
        own_draws, full_draws = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
        for (own, full), rows in zip(pairs, _rows([own for own, _ in pairs], seed + number), strict=True):
            own_draws += own[rows].mean(axis=1)
            full_draws += full[rows].mean(axis=1)
        # A resample in which the full cache scores nothing has no relative loss.
        usable = full_draws > 0
        draws.append(np.where(usable, 1 - own_draws / np.where(usable, full_draws, 1), np.nan))
    mean_draws = np.mean(draws, axis=0)
    return _around(float(np.mean(losses)), mean_draws[np.isfinite(mean_draws)])


def _rows(tasks: Sequence[Floats], seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for scores in tasks:
        yield rng.integers(len(scores), size=(RESAMPLES, len(scores)))


def _around(mean: float, draws: Floats) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    # Sums of equal numbers in another order differ in their last bits.
    return Interval(mean, min(float(low), mean), max(float(high), mean))
