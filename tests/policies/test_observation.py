from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv import InvalidInputError, Observation
from tests.policies.cases import Shape, observation, padded

SHAPE = Shape(h=2, g=3, w=4, t=10, d=5, v=7)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(6, 4, 5)}, "queries must have 4 dimensions"),
        ({"keys": torch.zeros(2, 10, 5)}, "keys must have 4 dimensions"),
        ({"values": torch.zeros(1, 2, 10, 7, 1)}, "values must have 4 dimensions"),
        ({"queries": torch.zeros(2, 6, 4, 5)}, "differ in batch or head size"),
        ({"queries": torch.zeros(1, 6, 4, 6)}, "differ in batch or head size"),
        ({"values": torch.zeros(1, 2, 9, 7)}, "differ in batch, heads or tokens"),
        ({"values": torch.zeros(1, 1, 10, 7)}, "differ in batch, heads or tokens"),
        ({"queries": torch.zeros(1, 5, 4, 5)}, "5 query heads are not a multiple of 2"),
        ({"queries": torch.zeros(1, 6, 0, 5)}, "queries of 0 positions"),
        ({"queries": torch.zeros(1, 6, 11, 5)}, "queries of 11 positions: pass those of the last 1 to 10 tokens"),
        ({"output_projection": torch.zeros(12, 41)}, r"must be \(hidden, 42\)"),
        ({"valid": torch.ones(1, 9, dtype=torch.bool)}, r"must be \(batch, tokens\) = \(1, 10\)"),
        ({"keys": torch.zeros(1, 2, 0, 5), "values": torch.zeros(1, 2, 0, 7)}, "a prompt of no tokens"),
        ({"keys": torch.zeros(1, 0, 10, 5), "values": torch.zeros(1, 0, 10, 7)}, "not a multiple of 0"),
    ],
)
def test_wrong_shapes_are_refused_and_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(observation(SHAPE, 0), **changes)


def test_sizes_are_read_from_the_tensors() -> None:
    layer = observation(SHAPE, 0)
    assert (layer.num_heads, layer.num_groups, layer.num_tokens) == (2, 3, 10)
    assert layer.softmax_scaling == 5**-0.5
    assert replace(layer, scaling=0.25).softmax_scaling == 0.25


@given(masks=st.lists(st.lists(st.booleans(), min_size=14, max_size=14).filter(any), min_size=1, max_size=3))
def test_rows_come_alone_and_without_their_pads(masks: list[list[bool]]) -> None:
    valid = torch.tensor(masks)
    alone = [observation(replace_tokens(int(count)), seed) for seed, count in enumerate(valid.sum(-1).tolist())]
    rows = list(padded(alone, valid, junk=float("nan")).rows())
    assert len(rows) == len(alone)
    for row, expected in zip(rows, alone, strict=True):
        assert row.valid is None
        assert torch.equal(row.queries, expected.queries)
        assert torch.equal(row.keys, expected.keys)
        assert torch.equal(row.values, expected.values)


def replace_tokens(count: int) -> Shape:
    return Shape(2, 3, min(4, count), count, 5, 7)


def test_rows_without_gaps_share_the_storage() -> None:
    batch = observation(SHAPE, 0, rows=3)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1, :3] = False
    storage = batch.keys.untyped_storage().data_ptr()
    for layer in (batch, replace(batch, valid=valid)):
        assert [row.keys.untyped_storage().data_ptr() for row in layer.rows()] == [storage] * 3


def test_a_row_of_pads_only_is_refused_by_its_number() -> None:
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(InvalidInputError, match="row 1 of the batch holds pads only"):
        list(replace(observation(SHAPE, 0, rows=3), valid=valid).rows())


def test_heads_come_with_their_own_query_heads_and_sinks() -> None:
    layer = replace(observation(SHAPE, 0), sinks=torch.arange(6.0))
    second = layer.heads(1, 2)
    assert torch.equal(second.queries, layer.queries[:, 3:6])
    assert torch.equal(second.keys, layer.keys[:, 1:2])
    assert torch.equal(second.values, layer.values[:, 1:2])
    assert second.sinks is not None
    assert second.sinks.tolist() == [3.0, 4.0, 5.0]
    assert layer.heads(0, 1).sinks is not None


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_nan_or_infinity_is_found_and_named(name: str, bad: float, dtype: torch.dtype) -> None:
    layer = observation(SHAPE, 0)
    layer = Observation(queries=layer.queries.to(dtype), keys=layer.keys.to(dtype), values=layer.values.to(dtype))
    layer.check_finite()
    getattr(layer, name)[0, 1, 3, 2] = bad
    with pytest.raises(InvalidInputError, match=f"{name} hold NaN"):
        layer.check_finite()


def test_large_half_precision_numbers_are_finite() -> None:
    big = torch.full((1, 2, 200, 5), 60000.0, dtype=torch.float16)  # the sum would overflow float16
    Observation(queries=big[:, :, :4], keys=big, values=big).check_finite()
