import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.cache import Blocks, RaggedPrefix


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([4, 8, 16]))
def test_blocks_and_pieces_hold_every_entry_of_a_segment_once(lengths: list[int], size: int) -> None:
    blocks = Blocks.of(lengths, torch.device("cpu"), size)
    held: list[list[int]] = [[] for _ in lengths]
    owners = blocks.owners.tolist()
    for block in range(blocks.count):
        if block not in blocks.mixed.tolist():
            held[owners[block]] += range(block * size, (block + 1) * size)
    rows = blocks.piece_rows.view(-1, size)
    for piece, visible in enumerate(blocks.piece_visible):
        held[owners[blocks.count + piece]] += rows[piece][visible].tolist()
    starts = [sum(lengths[:segment]) for segment in range(len(lengths))]
    expected = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    assert [sorted(entries) for entries in held] == expected


def test_every_piece_has_an_entry_and_reads_inside_the_prefix() -> None:
    blocks = Blocks.of([3, 0, 130, 1], torch.device("cpu"), 64)
    assert bool(blocks.piece_visible.any(-1).all())
    assert int(blocks.piece_rows.max()) == 133


def test_a_prefix_numbers_its_segments_row_by_row() -> None:
    kept = torch.tensor([[[True, False], [True, True]], [[False, False], [True, True]]])
    prefix = RaggedPrefix.gather(torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 3), kept)
    assert prefix.blocks.count == 0
    assert prefix.blocks.owners.tolist() == [0, 1, 3]
    assert prefix.blocks is prefix.blocks
