import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.attention import masked_attention, scatter_prefix
from defensivekv.cache import PrefixView, RaggedPrefix


def _loops(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """One number at a time, at scaling 0.5."""
    b, q, x, _ = queries.shape
    group, t = q // keys.shape[1], keys.shape[2]
    output = torch.zeros(b, q, x, values.shape[-1], dtype=torch.float64)
    for row, head, position in np.ndindex(b, q, x):
        kv = head // group
        weights = {}
        for entry in range(t):
            if visible[row, kv, position, entry]:
                logit = 0.5 * float(queries[row, head, position].double() @ keys[row, kv, entry].double())
                weights[entry] = math.exp(logit if softcap is None else softcap * math.tanh(logit / softcap))
        total = sum(weights.values()) + (0.0 if sinks is None else math.exp(float(sinks[head])))
        for entry, weight in weights.items():
            output[row, head, position] += weight / total * values[row, kv, entry].double()
    return output


@settings(max_examples=40)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    x=st.integers(1, 3),
    t=st.integers(0, 6),
    seed=st.integers(0, 2**31 - 1),
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
)
def test_the_oracle_equals_the_loops(
    heads: tuple[int, int], x: int, t: int, seed: int, softcap: float | None, with_sinks: bool
) -> None:
    (h, g), generator = heads, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    queries, keys, values = normal(2, h * g, x, 4), normal(2, h, t, 4), normal(2, h, t, 3)
    visible = torch.rand(2, h, x, t, generator=generator) < 0.5
    sinks = normal(h * g) if with_sinks else None
    result = masked_attention(queries, keys, values, visible, 0.5, softcap, sinks)
    expected = _loops(queries, keys, values, visible, softcap, sinks).float()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_the_oracle_equals_pytorch() -> None:
    queries, keys, values = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    visible = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, enable_gqa=True)
    result = masked_attention(queries, keys, values, visible.expand(2, 3, 5, 9), 8**-0.5)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    visible = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    visible[0, 0, 1, 2] = True
    result = masked_attention(torch.ones(1, 2, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), visible, 1.0)
    assert result[0, :, 0].abs().max() == 0
    assert result[0, :, 1].min() == 1


def test_a_prefix_is_laid_out_densely_where_its_entries_were() -> None:
    keys, values = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 2)
    kept = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = [1, 1, 0]
    dense_keys, dense_values, there = scatter_prefix(PrefixView(RaggedPrefix.gather(keys, values, kept), (1, 1, 0)), 9)
    assert there.shape == (3, 3, 9)
    assert torch.equal(there[..., :7], kept[rows])
    assert not bool(there[..., 7:].any())
    assert torch.equal(dense_keys[..., :7, :], keys[rows] * kept[rows].unsqueeze(-1))
    assert torch.equal(dense_values[..., :7, :], values[rows] * kept[rows].unsqueeze(-1))
