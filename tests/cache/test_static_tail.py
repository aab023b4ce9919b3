import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import CacheError
from defensivekv.cache import PrefixView, RaggedLayer, RaggedPrefix, StaticTail, Tail

CAPACITY = 12


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, count, 8, generator=generator), torch.randn(2, 3, count, 4, generator=generator)


def static_tail() -> StaticTail:
    return StaticTail.empty((2, 3, CAPACITY), (8, 4), torch.zeros(1))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8))
def test_it_holds_what_a_growing_tail_holds_until_it_is_full(steps: list[tuple[int, int]]) -> None:
    static, growing = static_tail(), Tail.of(*tokens(0))
    addresses = (static.key_buffer.data_ptr(), static.value_buffer.data_ptr(), static.count.data_ptr())
    for number, (added, dropped) in enumerate(steps):
        keys, values = tokens(added, number)
        if growing.used + added > CAPACITY:
            with pytest.raises(CacheError, match="room for 12 tokens after its prompt"):
                static.append(keys, values)
            break
        for tail in (static, growing):
            tail.append(keys, values)
            tail.drop_last(min(dropped, tail.used))
        assert static.used == growing.used == int(static.count)
        assert torch.equal(static.keys, growing.keys)
        assert torch.equal(static.values, growing.values)
    assert addresses == (static.key_buffer.data_ptr(), static.value_buffer.data_ptr(), static.count.data_ptr())


def test_it_can_be_written_inside_and_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        tail = static_tail()
        tail.append(*tokens(2))
        twins = [tail.clone(), tail.select_rows(torch.tensor([1, 0]))]
    for held in (tail, *twins):
        held.append(*tokens(1))
        assert held.used == 3


def test_copies_go_on_by_themselves() -> None:
    tail = static_tail()
    tail.append(*tokens(2))
    twin, turned = tail.clone(), tail.select_rows(torch.tensor([1, 1]))
    tail.append(*tokens(1, seed=5))
    assert (twin.used, turned.used, tail.used) == (2, 2, 3)
    assert torch.equal(turned.keys[0], tail.keys[1, :, :2])
    assert not torch.equal(twin.key_buffer[:, :, 2], tail.key_buffer[:, :, 2])


def test_its_bytes_are_those_of_the_buffers() -> None:
    assert static_tail().nbytes == 2 * 3 * CAPACITY * (8 + 4) * 4 + 8


def view(rows: int = 2) -> PrefixView:
    keys, values = tokens(5)
    kept = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    return PrefixView(RaggedPrefix.gather(keys, values, kept), tuple(range(rows)))


def test_a_static_layer_has_a_static_tail_once_it_has_a_prefix() -> None:
    layer = RaggedLayer(static_tokens=CAPACITY)
    layer.append(*tokens(5))
    assert layer.static_tail is None
    layer.compact(torch.ones(2, 3, 5, dtype=torch.bool))
    tail = layer.static_tail
    assert tail is not None
    assert (layer.seen, layer.tail_length, tail.capacity) == (5, 0, CAPACITY)
    layer.append(*tokens(2))
    assert (layer.seen, layer.tail_length) == (7, 2)
    # As compiled code does: nobody is told.
    tail.write(*tokens(1))
    assert (layer.seen, layer.tail_length) == (8, 3)
    layer.crop(2)
    assert (layer.seen, layer.fork().seen) == (6, 6)


def test_a_new_prefix_of_the_same_batch_keeps_the_buffers() -> None:
    layer = RaggedLayer(static_tokens=CAPACITY)
    layer.start_from(view(), 5)
    tail = layer.static_tail
    layer.append(*tokens(2))
    layer.start_from(view(), 9)
    assert layer.static_tail is tail
    assert (layer.seen, layer.tail_length) == (9, 0)
    layer.start_from(view(1), 9)
    assert layer.static_tail is not tail
