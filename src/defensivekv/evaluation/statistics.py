"""Means with confidence intervals."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: list[float], *, seed: int = 0) -> Interval:
    """The mean of independent values with its percentile-bootstrap interval.

    Pass one value for each document: the questions of one document stand or fall together.
    """
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        mean = float(data.mean())
        return Interval(mean, mean, mean)
    result = bootstrap(
        (data,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(float(data.mean()), float(interval.low), float(interval.high))
