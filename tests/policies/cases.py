"""Random prompts for the tests of policies."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import defensivekv as dkv
from defensivekv import Observation, Policy
from defensivekv.policies.aggregation import Aggregation
from defensivekv.policies.scoring import Scorer

HIDDEN = 12

GENERIC = [name for name in dkv.policies() if name not in ("full", "duo-attention", "kvzip")]
"""Policies that evict on what one reading of any prompt shows."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, in the letters of the package: heads, groups, window, tokens, key and value size."""

    h: int
    g: int
    w: int
    t: int
    d: int
    v: int


def shapes(max_tokens: int = 40, min_surplus: int = 1) -> st.SearchStrategy[Shape]:
    """Odd sizes, with at least `min_surplus` tokens before the window."""
    return st.builds(
        lambda h, g, w, extra, d, v: Shape(h, g, w, w + extra, d, v),
        h=st.integers(1, 3),
        g=st.sampled_from([1, 2, 3, 5, 8]),
        w=st.integers(1, 6),
        extra=st.integers(min_surplus, max_tokens),
        d=st.integers(1, 7),
        v=st.integers(1, 7),
    )


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observation(shape: Shape, seed: int, rows: int = 1) -> Observation:
    """A layer of `rows` prompts without pads."""
    s, generator = shape, torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Observation(
        queries=2 * draw(rows, s.h * s.g, s.w, s.d),
        keys=draw(rows, s.h, s.t, s.d),
        values=draw(rows, s.h, s.t, s.v),
        output_projection=draw(HIDDEN, s.h * s.g * s.v),
    )


def policy_of(name: str, budget: float | int | str | Fraction, window_size: int = 4, **options: Any) -> Policy:
    """The policy with that window, where it has one."""
    if name not in ("full", "duo-attention") and dkv.policy(name, 1.0).scorer.has_window:
        options["window_size"] = window_size
    return dkv.policy(name, budget, **options)


def observation_for(name: str, shape: Shape, seed: int, rows: int = 1) -> Observation:
    """A layer with all that the policy wants to see of it."""
    return showing(name, observation(shape, seed, rows), seed)


def showing(name: str, layer: Observation, seed: int) -> Observation:
    """The same with queries of the whole prompt, where the policy asks for them."""
    if name == "full" or dkv.policy(name, 1.0).scorer.sees != "prompt":
        return layer
    b, q, _, d = layer.queries.shape
    queries = 2 * normal(seed + 1, b, q, layer.num_tokens, d)
    return replace(layer, queries=queries, rotary=Turning(torch.arange(layer.num_tokens)))


@dataclass(frozen=True)
class Turning:
    """Rotation in the plane of the first two channels, one radian for ten positions; fewer channels do not turn."""

    positions: Tensor

    def unrotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        return self._turn(vectors, -positions / 10)

    def rotate_mean(self, vectors: Tensor, positions: Tensor) -> Tensor:
        return torch.stack([self._turn(vectors, angle.expand(vectors.shape[1])) for angle in positions / 10]).mean(0)

    def row(self, row: int, valid: Tensor | None) -> "Turning":
        return self if valid is None else Turning(torch.arange(int(valid.sum())))

    def _turn(self, vectors: Tensor, angles: Tensor) -> Tensor:
        turned = vectors.clone()
        if vectors.shape[-1] > 1:
            first, second, cos, sin = vectors[..., 0], vectors[..., 1], angles.cos(), angles.sin()
            turned[..., 0], turned[..., 1] = first * cos - second * sin, first * sin + second * cos
        return turned


def importances(scorer: Scorer, row: Observation, window_size: int) -> Tensor:
    """Those of a scorer, of queries in parts put together again; of one that sees all entries at once."""
    return torch.cat([part.importance for part in scorer(row, window_size)], dim=2)


def aggregate(aggregation: Aggregation, importance: Tensor) -> Tensor:
    """The scores of queries that are all there at once, (h, g, w, n) to (h, n)."""
    _, g, w, n = importance.shape
    return aggregation.finish(aggregation.reduce(importance), torch.full((n,), g * w))


def count_kept(kept: list[Tensor]) -> int:
    """Entries kept, over all layers and heads."""
    return sum(int(layer.sum()) for layer in kept)


def padded(rows: list[Observation], valid: Tensor, junk: float) -> Observation:
    """One batch of prompts of different lengths: row i's tokens lie where `valid[i]` is true, the rest is junk."""
    first = rows[0]
    w = max(row.queries.shape[2] for row in rows)
    queries = torch.full((len(rows), first.queries.shape[1], w, first.queries.shape[3]), junk)
    keys = torch.full((len(rows), first.num_heads, valid.shape[1], first.keys.shape[3]), junk)
    values = torch.full((len(rows), first.num_heads, valid.shape[1], first.values.shape[3]), junk)
    for number, row in enumerate(rows):
        queries[number, :, w - row.queries.shape[2] :] = row.queries[0]
        keys[number][:, valid[number]] = row.keys[0]
        values[number][:, valid[number]] = row.values[0]
    return replace(first, queries=queries, keys=keys, values=values, valid=valid)
