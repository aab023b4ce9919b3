import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.budget import entry_bytes
from defensivekv.cache import PrefixView, RaggedPrefix


@st.composite
def dense_layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (b, h, t, d), values (b, h, t, v) and what stays, some heads of it empty or full."""
    b, h, t = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    d, v = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    shares = torch.tensor([0.0, 0.3, 1.0])[torch.randint(0, 3, (b, h, 1), generator=generator)]
    kept = torch.rand(b, h, t, generator=generator) < shares
    return torch.randn(b, h, t, d, generator=generator), torch.randn(b, h, t, v, generator=generator), kept


@given(dense_layers())
def test_every_head_holds_its_kept_entries_in_order(layer: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, values, kept = layer
    prefix = RaggedPrefix.gather(keys, values, kept)
    end = 0
    for row, head in np.ndindex(*kept.shape[:2]):
        where = prefix.segment(row, head)
        positions = kept[row, head].nonzero().squeeze(-1)
        assert where.start == end
        assert where.stop - where.start == prefix.lengths[row][head] == len(positions)
        assert prefix.offsets[row][head] == where.start
        assert prefix.kept_positions(row, head).tolist() == positions.tolist()
        assert torch.equal(prefix.keys[where], keys[row, head, positions])
        assert torch.equal(prefix.values[where], values[row, head, positions])
        end = where.stop
    assert end == len(prefix.keys) == len(prefix.values) == len(prefix.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(layer=dense_layers())
def test_bytes_are_those_of_the_entries_kept(dtype: torch.dtype, layer: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, values, kept = layer
    prefix = RaggedPrefix.gather(keys.to(dtype), values.to(dtype), kept)
    assert prefix.positions.dtype == torch.int32
    assert prefix.nbytes == int(kept.sum()) * entry_bytes(keys.shape[-1], values.shape[-1], dtype.itemsize)
    storages = [tensor.untyped_storage().nbytes() for tensor in (prefix.keys, prefix.values, prefix.positions)]
    assert sum(storages) == prefix.nbytes


def watched(*shape: int) -> tuple[Tensor, weakref.ref[np.ndarray]]:
    """A tensor, and a reference that dies with its storage: with the last view of it, whoever holds that."""
    memory = np.random.default_rng(0).random(shape, dtype=np.float32)
    return torch.from_numpy(memory), weakref.ref(memory)


def test_the_dense_tensors_are_freed_while_the_prefix_lives() -> None:
    keys, key_storage = watched(2, 2, 50, 4)
    values, value_storage = watched(2, 2, 50, 4)
    kept = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(0)) < 0.2
    prefix = RaggedPrefix.gather(keys, values, kept)
    view = keys[0]
    del keys, values
    gc.collect()
    assert value_storage() is None
    assert key_storage() is not None  # the view holds it: the reference tells storage from tensor
    del view
    assert key_storage() is None
    assert len(prefix.keys) == int(kept.sum())


def test_batch_rows_that_read_one_prefix_row_are_told_together() -> None:
    prefix = RaggedPrefix.gather(
        torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2), torch.ones(3, 1, 4, dtype=torch.bool)
    )
    assert PrefixView(prefix, (0, 1, 2)).is_identity
    assert not PrefixView(prefix, (0, 1)).is_identity
    assert not PrefixView(prefix, (1, 0, 2)).is_identity
    assert not PrefixView(prefix, (0, 1, 2, 2)).is_identity
    assert PrefixView(prefix, (2, 0, 2, 2)).sharers == ((2, [0, 2, 3]), (0, [1]))
