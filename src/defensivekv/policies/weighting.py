"""Scores weighted by what an entry's value can change in the layer's output."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.kernels.device import runs_kernels
from defensivekv.kernels.native import value_norm as native
from defensivekv.policies.allocation import Contender, PerLayer
from defensivekv.policies.layout import Layout
from defensivekv.policies.observation import Observation
from defensivekv.policies.standing import Staged
from defensivekv.types import HeadScores, SlotScores


@runtime_checkable
class Weighting(Protocol):
    """Scores of one row's entries, weighted by what is measured of each entry once."""

    def measure(self, row: Observation) -> SlotScores | None:
        """Of the entries of one row (batch size 1, no pads), (h, t); None where nothing is."""
        ...

    def __call__(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> HeadScores:
        """The weighted scores, (h, n); entries that must stay score the layer's maximum.

        scores, mean_importance: (h, n) of the first `n` slots; zero in empty ones. measured: (h, m) of all slots.
        share: of the text's entries to keep.
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

    @property
    def needs_projection(self) -> bool:
        """Whether it reads the layer's output projection."""
        ...


@runtime_checkable
class StagedWeighting(Weighting, Protocol):
    """One that lets a number of each head's entries come first, of which alone the budget decides.

    What is left for a smaller budget is then known without the entries that are gone; see `standing`.
    """

    def stage(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> Staged:
        """The two stages; ranks below `num_first` of `share` are known. Arguments as of a `Weighting`."""
        ...

    def num_first(self, num_tokens: int, window: int, share: Fraction) -> int | None:
        """Of each head, the entries that come first; None: that is not all that the budget decides.

        num_tokens: of the text. window: entries at its end that stay, unscored.
        """
        ...


class _InStages:
    """A `StagedWeighting` of which `stage` and `num_first` are all there is to say."""

    def __call__(
        self: StagedWeighting,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> HeadScores:
        count = self.num_first(layout.num_tokens, layout.num_slots - scores.shape[-1], share)
        return self.stage(scores, mean_importance, measured, layout, share).with_first(count or 0)


@dataclass(frozen=True)
class TwoStageValueNorm(_InStages):
    """Value weighting as DefensiveKV uses it (arXiv 2510.13334, appendix; the authors' code decides).

    Scores are multiplied by the value norm, divided for each token by its sum over heads. Then the entries
    that carry the first `mass` of the mean importance of their head are pinned: sorted in descending order,
    those before the cumulative sum first reaches `mass - bias`, at most `floor((t - w) * share - w)` of them.
    `bias` is the mean mass on the last `w` scored columns. Pinned entries score the layer's maximum.
    """

    mass: float = 0.9
    description = "value norm, mass pinned first"
    needs: frozenset[str] = frozenset({"masses"})
    needs_projection = True

    def measure(self, row: Observation) -> SlotScores:
        """Value norms, divided for each token by their sum over heads."""
        norms = value_norms(row)
        # A token whose values are all zero has no norm to divide by, and nothing to lose.
        return norms.div_(norms.sum(0, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny))

    def stage(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> Staged:
        assert measured is not None
        n = scores.shape[-1]
        window = layout.num_slots - n
        weighted = scores * measured[:, :n]
        limit = self.num_first(layout.num_tokens, window, share)
        bias = mean_importance[:, max(0, n - window) :].sum(-1).mean()
        # A head of which nothing was seen yet has no mass.
        total = mean_importance.sum(-1, keepdim=True).clamp_min(torch.finfo(mean_importance.dtype).tiny)
        ranked, order = mean_importance.topk(min(n, limit), dim=-1)
        is_before = (ranked / total).cumsum(-1) < self.mass - bias
        return Staged.of(weighted, order, weighted.max(), is_before)

    def num_first(self, num_tokens: int, window: int, share: Fraction) -> int:
        return max(0, floor((num_tokens - window) * share - window))


@dataclass(frozen=True)
class TwoStageCritical:
    """CriticalKV (arXiv 2502.03805, algorithm 1; constants as in kvpress).

    The best entries by score fill the first half of each head's budget (`first_stage`, the window counted);
    the rest are ranked by `(score + epsilon) * value norm`.

    head_budgets: how a layer's budget is split over its heads, by the scores before they are weighted (Ada-CriticalKV);
    what fills them then scores the most, for an allocation that takes as many of the layer. None: every head gets the
    same.
    """

    first_stage: Fraction = Fraction(1, 2)
    epsilon: float = 1e-4
    head_budgets: PerLayer | None = None
    description = "value norm after half by score"
    needs: frozenset[str] = frozenset({"masses"})
    needs_projection = True

    def measure(self, row: Observation) -> SlotScores:
        """Value norms."""
        return value_norms(row)

    def __call__(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> HeadScores:
        window = layout.num_slots - scores.shape[-1]
        count = self.num_first(layout.num_tokens, window, share)
        if count is not None:
            return self.stage(scores, mean_importance, measured, layout, share).with_first(count)
        assert self.head_budgets is not None
        weighted, top = self._weighted(scores, measured), torch.finfo(scores.dtype).max
        padded = torch.nn.functional.pad(scores, (0, window), value=float("inf"))
        budgets = self.head_budgets([Contender(padded, num_tokens=layout.num_tokens)], share)[0].sum(-1)
        for head, budget in enumerate(budgets.tolist()):
            first = max(0, floor(budget * self.first_stage) - window)
            weighted[head, scores[head].topk(first).indices] = top
            weighted[head, weighted[head].topk(max(0, budget - window)).indices] = top
        return weighted

    def stage(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> Staged:
        count = self.num_first(layout.num_tokens, layout.num_slots - scores.shape[-1], share) or 0
        order = scores.topk(min(scores.shape[-1], count), dim=-1).indices
        return Staged.of(self._weighted(scores, measured), order, torch.finfo(scores.dtype).max)

    def num_first(self, num_tokens: int, window: int, share: Fraction) -> int | None:
        if self.head_budgets is not None:
            return None
        return max(0, floor(num_tokens * share * self.first_stage) - window)

    def _weighted(self, scores: HeadScores, measured: SlotScores | None) -> HeadScores:
        assert measured is not None
        weighted: HeadScores = (scores + self.epsilon) * measured[:, : scores.shape[-1]]
        return weighted


@dataclass(frozen=True)
class ValueSize(_InStages):
    """`(score + epsilon) * ‖v‖₂`, without the output projection (Expected Attention, arXiv 2510.00636)."""

    epsilon: float = 0.0
    description = "size of the value"
    needs: frozenset[str] = frozenset({"masses"})
    needs_projection = False

    def measure(self, row: Observation) -> SlotScores:
        """Sizes of the values."""
        size: SlotScores = row.values[0].float().norm(dim=-1)
        return size

    def stage(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> Staged:
        assert measured is not None
        return Staged((scores + self.epsilon) * measured[:, : scores.shape[-1]])

    def num_first(self, num_tokens: int, window: int, share: Fraction) -> int:
        return 0


@dataclass(frozen=True)
class RecentFirst(_InStages):
    """A part of each head's budget goes to its latest entries (H2O, arXiv 2306.14048, section 4: one half)."""

    part: Fraction = Fraction(1, 2)
    description = "half of it to the latest"
    needs: frozenset[str] = frozenset()
    needs_projection = False

    def measure(self, row: Observation) -> None:
        """Nothing."""

    def stage(
        self,
        scores: HeadScores,
        mean_importance: HeadScores,
        measured: SlotScores | None,
        layout: Layout,
        share: Fraction,
    ) -> Staged:
        latest_first = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device).expand(scores.shape)
        return Staged.of(scores, latest_first, torch.finfo(scores.dtype).max)

    def num_first(self, num_tokens: int, window: int, share: Fraction) -> int:
        return max(0, floor(num_tokens * share * self.part) - window)


@torch.no_grad()
def value_norms(row: Observation) -> Float[Tensor, "h t"]:
    """`mean over the group's query heads g of ‖v·Wo[g]‖₁`, (h, t) float32 (CriticalKV, arXiv 2502.03805).

    The products are made in the model's dtype, on CUDA by a kernel, elsewhere in chunks of tokens: `t × hidden` is
    never held.
    Raises InvalidInputError without an output projection.
    """
    if row.output_projection is None:
        raise InvalidInputError(
            "value weighting needs the layer's output projection: give Observation(output_projection=...), "
            "or use a policy without it such as 'snapkv'"
        )
    values = row.values[0].detach()
    h, t, v = values.shape
    g = row.num_groups
    hidden = row.output_projection.shape[0]
    weights = row.output_projection.detach().to(values.dtype)
    if runs_kernels(values.device):
        from defensivekv.kernels import value_norm as kernel

        if values.dtype in kernel.DTYPES:
            return kernel.value_norms(values, weights)
    if native.supports(values, weights):
        return native.value_norms(values, weights)
    # (hidden, h, g, v): the columns of the weight belong to the query heads in order.
    projection = weights.view(hidden, h, g, v)
    norms = torch.empty(h, t, dtype=torch.float32, device=values.device)
    step = max(1, min(t, _chunk_elements(values.device) // (g * hidden)))
    products = values.new_empty(step, g * hidden)
    for head in range(h):
        weight = projection[:, head].transpose(0, 1).reshape(g * hidden, v)
        for start in range(0, t, step):
            part = values[head, start : start + step]
            product = torch.mm(part, weight.mT, out=products[: len(part)])
            torch.sum(product.abs_(), -1, dtype=torch.float32, out=norms[head, start : start + step])
    return norms.div_(g)


def _chunk_elements(device: torch.device) -> int:
    """Products at a time: as many as stay in the cores' caches until they are summed up; on a GPU, few launches."""
    return 2**20 * torch.get_num_threads() if device.type == "cpu" else 2**25
