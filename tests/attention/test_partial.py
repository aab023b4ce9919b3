import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.attention.partial import Partial, merge, pack, unpack

INFINITY = float("inf")


def partial(logits: Tensor, values: Tensor) -> Partial:
    """Attention by the definition: logits (b, h, r, t), values (b, h, t, v)."""
    return Partial(logits.softmax(-1).nan_to_num(0.0) @ values, logits.logsumexp(-1))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1.0, 30.0, 1000.0]),
    offset=st.sampled_from([0.0, -500.0, 500.0]),
    with_sinks=st.booleans(),
)
def test_merged_parts_equal_the_whole(
    sizes: list[int], seed: int, scale: float, offset: float, with_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = sum(sizes)
    logits = torch.randn(2, 3, 4, t, generator=generator) * scale + offset
    logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.3, -INFINITY)
    values = torch.randn(2, 3, t, 5, generator=generator)
    sinks = torch.randn(3, 4, generator=generator) if with_sinks else None
    parts = [partial(part, held) for part, held in zip(logits.split(sizes, -1), values.split(sizes, 2), strict=True)]
    if sinks is None:
        expected = partial(logits, values).output
    else:
        everything = torch.cat((logits, sinks[None, :, :, None].expand(2, -1, -1, 1)), -1)
        expected = everything.softmax(-1)[..., :t] @ values
    # float32 resolves logits of a thousand to 1e-4.
    torch.testing.assert_close(merge(parts, sinks), expected, rtol=1e-3, atol=1e-3)
    if scale == 1.0 and offset == 0.0:
        torch.testing.assert_close(merge(parts, sinks), expected, rtol=1e-5, atol=1e-6)


def test_parts_without_an_entry_change_nothing_and_alone_give_zero() -> None:
    empty = Partial(torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -INFINITY))
    whole = partial(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 4, 3))
    assert torch.equal(merge([whole]), whole.output)
    torch.testing.assert_close(merge([empty, whole, empty]), whole.output)
    assert merge([empty, empty]).abs().max() == 0
    assert merge([empty], torch.zeros(1, 2)).abs().max() == 0


def test_a_sink_as_strong_as_an_entry_halves_its_weight() -> None:
    one = Partial(torch.full((1, 1, 1, 1), 8.0), torch.tensor([[[2.0]]]))
    assert float(merge([one], torch.tensor([[2.0]]))) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parts_are_merged_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        Partial(torch.randn(1, 2, 50, 8, generator=generator).to(dtype), torch.randn(1, 2, 50, generator=generator))
        for _ in range(3)
    ]
    exact = merge([Partial(part.output.float(), part.log_sum) for part in parts])
    merged = merge(parts)
    assert merged.dtype == dtype
    assert torch.equal(merged, exact.to(dtype))


@given(b=st.integers(1, 3), h=st.integers(1, 4), g=st.integers(1, 8), x=st.integers(1, 5), size=st.integers(1, 3))
def test_packed_queries_lie_with_their_key_value_head_and_come_back(b: int, h: int, g: int, x: int, size: int) -> None:
    queries = torch.arange(b * h * g * x * size, dtype=torch.float32).view(b, h * g, x, size)
    packed = pack(queries, h)
    for head in range(h):
        assert torch.equal(packed[:, head], queries[:, head * g : (head + 1) * g].flatten(1, 2))
    assert torch.equal(unpack(packed, x), queries)
