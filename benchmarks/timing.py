"""Wall times of rivals, as of the package."""

from defensivekv.bench.timing import Samples, interleaved, medians, seconds, synchronise

__all__ = ["Samples", "interleaved", "medians", "seconds", "synchronise"]
