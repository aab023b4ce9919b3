from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.cache import PageLayout

_BLOCKS = 12


@st.composite
def layouts(draw: st.DrawFn) -> tuple[PageLayout, int, int]:
    """A layout, how many layers and how many rows its tensor has for `_BLOCKS` blocks."""
    heads, block_size, layers = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 16])), draw(st.integers(1, 3))
    first, gap = draw(st.sampled_from([0, 7])), draw(st.sampled_from([0, 3]))
    page = 2 * heads * block_size + gap
    strides = draw(st.sampled_from([(page * layers, page), (page, page * _BLOCKS)]))
    packed = draw(st.sampled_from([1, layers]))
    return PageLayout(heads, block_size, *strides, first, packed), layers, first + page * layers * _BLOCKS


def rows_of(layout: PageLayout, layers: int, blocks: Tensor, slots: int, tokens: int) -> Tensor:
    """Rows of all keys of a sequence, of every layer and head."""
    rows = []
    kept = layout.kept(torch.arange(slots * layout.heads * layout.packed_layers), slots)
    for layer in range(layers):
        # Kept rows that layers share are the same for each of them.
        if layout.packed_layers == 1 or layer == 0:
            rows.append(layout.rows(blocks, kept, layer))
        rows.append(layout.rows(blocks, layout.tokens(torch.arange(tokens), slots), layer).flatten())
    return torch.cat(rows)


@settings(max_examples=300)
@given(layouts(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=3), st.randoms())
def test_every_entry_has_a_row_of_its_own(
    made: tuple[PageLayout, int, int], sequences: list[tuple[int, int]], order: Random
) -> None:
    layout, layers, num_rows = made
    free = list(range(_BLOCKS))
    order.shuffle(free)
    rows, entries = [torch.empty(0, dtype=torch.long)], 0
    for slots, tokens in sequences:
        count = -(-(slots + tokens) // layout.block_size)
        if count <= len(free):
            blocks = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
            rows.append(rows_of(layout, layers, blocks, slots, tokens))
            entries += layers * layout.heads * (slots + tokens)
    keys = torch.cat(rows)
    both = torch.cat((keys, keys + layout.page_rows))
    assert len(both.unique()) == len(both) == 2 * entries
    assert bool(((both >= layout.first) & (both < num_rows)).all())


def test_tokens_of_a_head_lie_side_by_side_within_a_block() -> None:
    layout = PageLayout(heads=2, block_size=4, block_stride=16)
    rows = layout.rows(torch.tensor([3, 1], dtype=torch.int32), layout.tokens(torch.arange(6), 1), 0)
    # The first block's first slot, two rows, is kept rows'.
    assert rows[:, 0].tolist() == [50, 51, 52, 16, 17, 18]
    assert rows[:, 1].tolist() == [53, 54, 55, 20, 21, 22]


def test_layers_that_share_kept_rows_follow_each_other_within_a_block() -> None:
    layout = PageLayout(heads=1, block_size=2, block_stride=8, layer_stride=4, packed_layers=2)
    # Three slots: a full block of four rows, and a slot of each layer.
    rows = layout.rows(torch.tensor([1, 0], dtype=torch.int32), layout.kept(torch.arange(6), 3), layer=1)
    assert rows.tolist() == [8, 9, 12, 13, 0, 4]
