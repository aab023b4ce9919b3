"""Random prompts for the tests of policies."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import Observation

HIDDEN = 12


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
