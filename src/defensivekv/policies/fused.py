"""Steps of the method that one kernel makes at once, where there is one for them."""

from defensivekv.kernels.device import runs_kernels
from defensivekv.policies.aggregation import Aggregation, Defensive
from defensivekv.policies.observation import Observation
from defensivekv.policies.scoring import Scorer, WindowAttention
from defensivekv.types import HeadScores


def window_scores(
    row: Observation, window_size: int, scorer: Scorer, aggregation: Aggregation
) -> tuple[HeadScores, HeadScores] | None:
    """What the aggregation reduces the scorer's importances to, and their sums, (h, n) each, of one row.

    None: there is no kernel for these parts, or this row, and they are to be asked themselves.
    """
    if type(scorer) is not WindowAttention or type(aggregation) is not Defensive:
        return None
    if not runs_kernels(row.keys.device):
        return None
    from defensivekv.kernels import window_scores as kernel

    window = min(window_size, row.num_tokens)
    if (
        row.layout is not None
        or row.repeats is not None
        # Too few, which the scorer refuses.
        or row.queries.shape[2] < window
        or row.keys.dtype not in kernel.DTYPES
        or row.queries.dtype != row.keys.dtype
        or row.keys.shape[-1] > kernel.MAX_HEAD_SIZE
        or aggregation.kernel_size > kernel.MAX_KERNEL_SIZE
    ):
        return None
    return kernel.window_scores(
        row.queries[0, :, -window:],
        row.keys[0],
        scaling=row.softmax_scaling,
        kernel_size=aggregation.kernel_size,
        softcap=row.softcap,
        sinks=row.sinks,
    )
