"""What the queries that were seen so far say of a layer's entries."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.aggregation import Aggregation
from defensivekv.policies.fused import window_scores
from defensivekv.policies.layout import Layout
from defensivekv.policies.observation import Observation
from defensivekv.policies.preference import Preference
from defensivekv.policies.scoring import Part, Scorer
from defensivekv.types import HeadScores

_HEAD_CHUNK_ELEMENTS = 2**19
"""Importances at a time on a CPU, where they should stay in the cache between the passes over them."""

_HEAD_CHUNK_ELEMENTS_GPU = 2**26


@dataclass(frozen=True)
class Evidence:
    """Of one row.

    reduced: (h, n) what the aggregation made of the importances so far. counts: (n,) or (h, n) queries and query heads
    that saw each entry. sums: (h, n) of the importances; None where nobody asks. measured: (m,) of the layer's
    preference; None where nobody asks.
    """

    reduced: HeadScores
    counts: Int[Tensor, "*h n"] | Float[Tensor, "*h n"]
    sums: HeadScores | None
    measured: Float[Tensor, " m"] | None

    @classmethod
    def of_heads(cls, parts: list["Evidence"]) -> "Evidence":
        """That of some heads after the other, as of all heads."""
        counts, sums = parts[0].counts, [part.sums for part in parts if part.sums is not None]
        measured = [part.measured for part in parts if part.measured is not None]
        return cls(
            torch.cat([part.reduced for part in parts]),
            counts if counts.dim() == 1 else torch.cat([part.counts for part in parts]),
            torch.cat(sums) if sums else None,
            torch.stack(measured).sum(0) if measured else None,
        )

    @property
    def num_scored(self) -> int:
        """Slots that queries are asked about: all but the window's."""
        return int(self.reduced.shape[-1])

    @property
    def means(self) -> HeadScores | None:
        """Mean importances, (h, n)."""
        return None if self.sums is None else self.sums / self.counts.clamp_min(1)

    def merge(self, other: "Evidence", aggregation: Aggregation) -> "Evidence":
        """Both together."""
        return Evidence(
            aggregation.merge(self.reduced, other.reduced),
            self.counts + other.counts,
            None if self.sums is None or other.sums is None else self.sums + other.sums,
            None if self.measured is None or other.measured is None else self.measured + other.measured,
        )


def observe(
    row: Observation,
    window_size: int,
    *,
    scorer: Scorer,
    aggregation: Aggregation,
    preference: Preference | None,
    with_means: bool,
) -> Evidence:
    """The evidence of one row's queries, made some heads at a time, so that few importances are held at once."""
    fused = None if preference is not None else window_scores(row, window_size, scorer, aggregation)
    if fused is not None:
        reduced, sums = fused
        seen = row.num_groups * min(window_size, row.num_tokens)
        counts = torch.full(reduced.shape[1:], seen, device=reduced.device)
        return Evidence(reduced, counts, sums if with_means else None, None)
    n = row.num_prompt_tokens - (min(window_size, row.num_tokens) if scorer.has_window else 0)
    per_head = row.num_groups * min(window_size, row.queries.shape[2]) * row.num_tokens
    is_cpu = row.keys.device.type == "cpu"
    step = max(1, (_HEAD_CHUNK_ELEMENTS if is_cpu else _HEAD_CHUNK_ELEMENTS_GPU) // per_head)
    gathered = []
    for start in range(0, row.num_heads, step):
        heads = row.heads(start, min(start + step, row.num_heads))
        merged = None
        for part in scorer(heads, window_size):
            _check_part(part, heads, n, scorer)
            one = _of_part(part, n, heads.layout, aggregation, preference, with_means)
            merged = one if merged is None else merged.merge(one, aggregation)
        if merged is None:
            raise InvalidInputError(f"{type(scorer).__name__} gave no importances")
        gathered.append(merged)
    return Evidence.of_heads(gathered)


def _of_part(
    part: Part,
    n: int,
    layout: Layout | None,
    aggregation: Aggregation,
    preference: Preference | None,
    with_means: bool,
) -> Evidence:
    importance = part.importance
    _, g, w, m = importance.shape
    places = None if layout is None else layout.first_positions(part.start + m)
    reduced = aggregation.reduce(importance, None if places is None else places[:, part.start :])
    sums = importance.sum(dim=(1, 2)) if with_means else None
    counts = torch.full((m,), g * w, device=importance.device)
    if m < n:
        around = (part.start, n - part.start - m)
        reduced = torch.nn.functional.pad(reduced, around)
        counts = torch.nn.functional.pad(counts, around)
        sums = None if sums is None else torch.nn.functional.pad(sums, around)
    return Evidence(reduced, counts, sums, None if preference is None else preference.measure(importance))


def _check_part(part: Part, heads: Observation, n: int, scorer: Scorer) -> None:
    shape, dtype = tuple(part.importance.shape), part.importance.dtype
    if (
        len(shape) != 4
        or shape[0] != heads.num_heads
        or not 0 <= part.start <= n - shape[3]
        or not dtype.is_floating_point
    ):
        raise InvalidInputError(
            f"{type(scorer).__name__} gave {shape} {dtype} from entry {part.start} on: a scorer gives floating (heads, "
            f"groups, queries, entries) of {heads.num_heads} heads and {n} entries"
        )
