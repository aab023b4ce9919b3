"""Importances of one entry, over queries and over the query heads of its group, to one score."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F

from defensivekv.errors import InvalidInputError
from defensivekv.types import HeadScores, Importance

_TINY = 1e-12


@runtime_checkable
class Aggregation(Protocol):
    """(h, g, w, n) importances to (h, n) scores, head by head."""

    def __call__(self, importance: Importance) -> HeadScores: ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...


@dataclass(frozen=True)
class Mean:
    """The mean over queries and query heads, smoothed along positions (SnapKV, arXiv 2404.14469).

    kernel_size: width of the mean filter (stride 1, zero padded, padding counted); 1: no smoothing.
    """

    kernel_size: int = 5
    description = "mean"

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def __call__(self, importance: Importance) -> HeadScores:
        return _smooth(importance.mean(dim=(1, 2)), self.kernel_size)


@dataclass(frozen=True)
class Defensive:
    """Worst-case risk with prior-risk correction (arXiv 2510.13334, section 4, equations 6 to 8).

    The importances are smoothed along positions and every row rescaled to the sum it had before; the worst
    case is the maximum over queries and query heads; no score falls below the head's mean. Linear in `n`.

    kernel_size: width of the mean filter (stride 1, zero padded, padding counted).
    """

    kernel_size: int = 5
    description = "worst case, floored at the mean"

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def __call__(self, importance: Importance) -> HeadScores:
        smoothed = _smooth(importance, self.kernel_size)
        scale = importance.sum(-1, keepdim=True) / (smoothed.sum(-1, keepdim=True) + _TINY)
        worst = smoothed.mul_(scale).amax(dim=(1, 2))
        return worst.clamp_min(worst.mean(-1, keepdim=True))


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InvalidInputError(f"kernel_size {kernel_size} must be odd, so that the filter has a middle; 1: none")


def _smooth(values: HeadScores | Importance, kernel_size: int) -> HeadScores | Importance:
    """Mean filter along the last dimension; a new tensor."""
    if kernel_size == 1 or values.shape[-1] == 0:
        return values.clone()
    # Shifted sums: every one of them is a vectorised pass, which avg_pool1d is not on a CPU.
    n = values.shape[-1]
    padded = F.pad(values, (kernel_size // 2, kernel_size // 2))
    total = padded[..., :n].clone()
    for shift in range(1, kernel_size):
        total += padded[..., shift : shift + n]
    return total.div_(kernel_size)
