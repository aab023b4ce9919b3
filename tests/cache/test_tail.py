import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.cache import Tail
from defensivekv.cache.tail import MIN_CAPACITY


def tokens(count: int, start: int = 0, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Keys (rows, 3, count, 2) and values (rows, 3, count, 1), every number different."""
    numbers = torch.arange(start, start + count, dtype=torch.float32)
    heads = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3, 1) * 1e4 + numbers
    return torch.stack((heads, -heads), -1), heads.unsqueeze(-1) + 0.5


def pointers(tail: Tail) -> tuple[int, int]:
    return tail.key_buffer.data_ptr(), tail.value_buffer.data_ptr()


@given(first=st.integers(0, 80), counts=st.lists(st.integers(0, 50), max_size=12))
def test_a_tail_holds_what_was_appended(first: int, counts: list[int]) -> None:
    tail, seen = Tail.of(*tokens(first)), first
    for count in counts:
        tail.append(*tokens(count, seen))
        seen += count
        keys, values = tokens(seen)
        assert tail.used == seen
        assert torch.equal(tail.keys, keys)
        assert torch.equal(tail.values, values)


def test_a_token_within_capacity_is_written_in_place_and_moves_nothing() -> None:
    tail = Tail.of(*tokens(40))
    tail.append(*tokens(1, 40))
    before, address = tail.key_buffer.clone(), pointers(tail)
    assert tail.key_buffer.shape[2] == 80
    for position in range(41, 80):
        tail.append(*tokens(1, position))
        assert pointers(tail) == address
    assert torch.equal(tail.key_buffer[:, :, :41], before[:, :, :41])


def test_buffers_double_so_that_a_token_costs_two_copies_on_average() -> None:
    tail, copied, moves = Tail.of(*tokens(1)), 0, 0
    for position in range(1, 2000):
        held, address = tail.used, pointers(tail)
        tail.append(*tokens(1, position))
        if pointers(tail) != address:
            copied, moves = copied + held, moves + 1
    assert moves <= 8
    assert copied < 2 * 2000
    assert tail.key_buffer.shape[2] < 2 * 2000 + MIN_CAPACITY


def test_bytes_are_those_of_the_buffers_with_their_unused_part() -> None:
    tail = Tail.of(*tokens(5))
    assert tail.nbytes == 2 * 3 * 5 * (2 + 1) * 4
    tail.append(*tokens(1, 5))
    assert tail.nbytes == 2 * 3 * MIN_CAPACITY * (2 + 1) * 4
    storages = tail.key_buffer.untyped_storage().nbytes() + tail.value_buffer.untyped_storage().nbytes()
    assert storages == tail.nbytes


def test_tensors_that_were_given_are_held_and_not_copied() -> None:
    keys, values = tokens(5)
    assert pointers(Tail.of(keys, values)) == (keys.data_ptr(), values.data_ptr())


def test_a_view_of_something_larger_is_copied_and_does_not_keep_it_alive() -> None:
    fused = torch.randn(2, 3, 5, 30)  # as a fused projection gives queries, keys and values
    tail = Tail.of(fused[..., 20:25], fused[..., 25:])
    assert torch.equal(tail.keys, fused[..., 20:25])
    assert tail.key_buffer.untyped_storage().nbytes() == tail.key_buffer.nbytes


def test_what_was_given_is_never_written() -> None:
    keys, values = tokens(5)
    tail = Tail.of(keys, values)
    tail.drop_last(2)
    tail.append(*tokens(2, 100))
    assert torch.equal(keys, tokens(5)[0])
    assert torch.equal(values, tokens(5)[1])
    assert torch.equal(tail.keys, torch.cat((tokens(3)[0], tokens(2, 100)[0]), dim=2))


def test_expanded_keys_can_be_cropped_and_appended_to() -> None:
    keys, values = tokens(5, rows=1)
    tail = Tail.of(keys.expand(4, -1, -1, -1), values.expand(4, -1, -1, -1))
    tail.drop_last(1)
    tail.append(*tokens(1, 9, rows=4))
    assert torch.equal(tail.keys[:, :, :4], keys[:, :, :4].expand(4, -1, -1, -1))


def test_a_crop_forgets_the_last_tokens_and_keeps_the_buffers() -> None:
    tail = Tail.of(*tokens(40))
    tail.append(*tokens(10, 40))
    address = pointers(tail)
    tail.drop_last(15)
    assert torch.equal(tail.keys, tokens(35)[0])
    tail.append(*tokens(5, 35))
    assert pointers(tail) == address
    assert torch.equal(tail.keys, tokens(40)[0])


@given(index=st.lists(st.integers(0, 1), min_size=1, max_size=5), used=st.integers(0, 10))
def test_selected_rows_are_copies(index: list[int], used: int) -> None:
    tail = Tail.of(*tokens(used))
    chosen = tail.select_rows(torch.tensor(index))
    assert torch.equal(chosen.keys, tokens(used)[0][index])
    assert torch.equal(chosen.values, tokens(used)[1][index])
    chosen.key_buffer.zero_()
    assert torch.equal(tail.keys, tokens(used)[0])


def test_a_clone_goes_on_by_itself() -> None:
    tail = Tail.of(*tokens(5))
    tail.append(*tokens(1, 5))
    twin = tail.clone()
    twin.append(*tokens(1, 100))
    tail.append(*tokens(1, 200))
    assert torch.equal(twin.keys, torch.cat((tokens(6)[0], tokens(1, 100)[0]), dim=2))
    assert torch.equal(tail.keys, torch.cat((tokens(6)[0], tokens(1, 200)[0]), dim=2))


@pytest.mark.parametrize("count", [1, 100])
def test_a_tail_begun_in_inference_mode_can_be_continued_outside_and_back(count: int) -> None:
    with torch.inference_mode():
        tail = Tail.of(*tokens(5))
        tail.append(*tokens(1, 5))
    tail.append(*tokens(count, 6))
    with torch.inference_mode():
        tail.append(*tokens(1, 6 + count))
    assert torch.equal(tail.keys, tokens(7 + count)[0])
