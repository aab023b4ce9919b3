"""Importances of one entry, over queries and over the query heads of its group, to one score.

An aggregation is three steps, so that queries may come in parts: `reduce` one part, `merge` what parts gave, `finish`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.types import HeadScores, Importance

Places = Int[Tensor, "h n"]

_TINY = 1e-12

_CHUNK_ELEMENTS = 2**18
"""Importances that are smoothed at a time on a CPU, so that they stay in the cache between the passes over them."""


@runtime_checkable
class Aggregation(Protocol):
    """(h, g, w, n) importances to (h, n) scores, head by head.

    places: (h, n) the entries' positions, where some were evicted from among them; see `Layout`. None: 0 to n - 1.
    """

    def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
        """Over the queries and query heads of one part."""
        ...

    def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
        """Of two parts' queries together. Parts that saw nothing of an entry are zero there."""
        ...

    def finish(self, reduced: HeadScores, counts: Tensor, places: Places | None = None) -> HeadScores:
        """The scores, once all queries are merged. counts: (n,) or (h, n) how many queries and query heads saw each
        entry.
        """
        ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What the scorer must give; see `scoring.Scorer.gives`."""
        ...


@dataclass(frozen=True)
class Mean:
    """The mean over queries and query heads, smoothed along positions (SnapKV, arXiv 2404.14469).

    kernel_size: width of the mean filter (stride 1, zero padded, padding counted); 1: no smoothing.
    """

    kernel_size: int = 5
    description = "mean"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
        return importance.sum(dim=(1, 2))

    def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
        return first + second

    def finish(self, reduced: HeadScores, counts: Tensor, places: Places | None = None) -> HeadScores:
        return _smooth(reduced / counts.clamp_min(1), self.kernel_size, places)


@dataclass(frozen=True)
class Max:
    """The maximum over queries and query heads, and nothing else (KVzip, arXiv 2505.23416)."""

    description = "worst case"
    needs: frozenset[str] = frozenset({"queries"})

    def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
        return importance.amax(dim=(1, 2))

    def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
        return torch.maximum(first, second)

    def finish(self, reduced: HeadScores, counts: Tensor, places: Places | None = None) -> HeadScores:
        return reduced


@dataclass(frozen=True)
class Defensive:
    """Worst-case risk with prior-risk correction (arXiv 2510.13334, section 4, equations 6 to 8).

    The importances are smoothed along positions and every row rescaled to the sum it had before; the worst
    case is the maximum over queries and query heads; no score falls below the head's mean. Linear in `n`.

    kernel_size: width of the mean filter (stride 1, zero padded, padding counted).
    """

    kernel_size: int = 5
    description = "worst case, floored at the mean"
    needs: frozenset[str] = frozenset({"queries", "masses"})

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
        rows = importance.flatten(1, 2)
        step = max(1, _CHUNK_ELEMENTS // max(1, rows[:, 0].numel())) if rows.device.type == "cpu" else rows.shape[1]
        worst = [self._worst(part, places) for part in rows.split(step, dim=1)]
        return worst[0] if len(worst) == 1 else torch.stack(worst).amax(0)

    def _worst(self, rows: Float[Tensor, "h r n"], places: Places | None) -> HeadScores:
        summed = _sum_neighbours(rows, self.kernel_size, places)
        # The filter's division and the rescaling in one pass.
        scale = rows.sum(-1, keepdim=True) / (summed.sum(-1, keepdim=True) + self.kernel_size * _TINY)
        return summed.mul_(scale).amax(dim=1)

    def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
        return torch.maximum(first, second)

    def finish(self, reduced: HeadScores, counts: Tensor, places: Places | None = None) -> HeadScores:
        if places is None:
            return reduced.clamp_min(reduced.mean(-1, keepdim=True))
        # Empty slots hold zeros.
        held = (places >= 0).sum(-1, keepdim=True).clamp_min(1)
        return reduced.clamp_min(reduced.sum(-1, keepdim=True) / held)


@dataclass(frozen=True)
class MeanAndVariance:
    """`mean + gamma * variance` over the window's queries, smoothed, then the mean over query heads (CAKE, arXiv
    2503.12491, section 4.3; the variance is the unbiased one, constants as in the DefensiveKV authors' runs).

    kernel_size: width of the mean filter (stride 1, zero padded, padding counted).
    """

    gamma: float = 200.0
    kernel_size: int = 5
    description = "mean and variance over time"
    needs: frozenset[str] = frozenset({"queries", "masses", "one part"})

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def reduce(self, importance: Importance, places: Places | None = None) -> HeadScores:
        indicator = importance.mean(2)
        if importance.shape[2] > 1:
            indicator = indicator + self.gamma * importance.var(2)
        return indicator.mean(1)

    def merge(self, first: HeadScores, second: HeadScores) -> HeadScores:
        # Parts of one window overlap nowhere: the scorer gives all of its queries at once.
        return first + second

    def finish(self, reduced: HeadScores, counts: Tensor, places: Places | None = None) -> HeadScores:
        return _smooth(reduced, self.kernel_size, places)


def _check_kernel_size(kernel_size: int) -> None:
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise InvalidInputError(f"kernel_size {kernel_size!r} must be odd, so that the filter has a middle; 1: none")


def _smooth(values: HeadScores, kernel_size: int, places: Places | None) -> HeadScores:
    """Mean filter along the last dimension; a new tensor. Evicted neighbours count as zeros."""
    return _sum_neighbours(values, kernel_size, places).div_(kernel_size)


def _sum_neighbours(
    values: Float[Tensor, "h *r n"], kernel_size: int, places: Places | None
) -> Float[Tensor, "h *r n"]:
    """The sum of each entry and of its head's within half the filter's width of its position; a new tensor.

    Shifted sums: every one of them is a vectorised pass, which avg_pool1d is not on a CPU.
    """
    reach, n = kernel_size // 2, values.shape[-1]
    total = values.clone()
    for shift in range(1, min(reach, n - 1) + 1):
        before, after = values[..., :-shift], values[..., shift:]
        if places is not None:
            near = (places[:, shift:] - places[:, :-shift] <= reach).view(len(places), *[1] * (values.dim() - 2), -1)
            before, after = before * near, after * near
        total[..., shift:] += before
        total[..., :-shift] += after
    return total
