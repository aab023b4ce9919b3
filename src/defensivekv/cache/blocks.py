"""A ragged prefix cut into blocks of one size, so that one batched kernel reads all heads at once.

    entries    a a a a a b b c c c c c c c      of three segments, one after the other
    blocks    [a a a a|a b b c|c c c c|c c      a view: nothing is copied
    mixed              ^^^^^^^                   entries of several segments: read as pieces instead
    pieces    [a · · ·][b b · ·][c · · ·][c c · ·]  copied when read; the last one lies past the whole blocks

All blocks are of equal work, whatever the lengths are: threads and multiprocessors share them evenly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int

BLOCK_SIZE = 128
"""Entries. Half of it is lost to the unused part of a piece, for each segment; less than 64 slows CPU kernels."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where the blocks and pieces of a prefix lie. A segment is one head of one row, `row * heads + head`.

    count: whole blocks, from the first entry on. owners: (count + pieces,) segments of the blocks, then of the
    pieces; a mixed block's is that of its first entry. mixed: (m,) blocks to be left out.
    piece_rows: (pieces * size,) entries of the pieces; unused places repeat the last. piece_visible: (pieces, size).
    """

    size: int
    count: int
    owners: Int[torch.Tensor, " n"]
    mixed: Int[torch.Tensor, " m"]
    piece_rows: Int[torch.Tensor, " e"]
    piece_visible: Bool[torch.Tensor, "p size"]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, size: int = BLOCK_SIZE) -> "Blocks":
        """The blocks of segments of these lengths, stored one after the other."""
        count = sum(lengths) // size
        ends = torch.tensor(lengths).cumsum(0)
        firsts = torch.arange(count) * size
        owners = torch.searchsorted(ends, firsts, right=True)
        is_mixed = ends[owners] < firsts + size
        pieces = list(_pieces(lengths, is_mixed.tolist(), size))
        starts = torch.tensor([start for _, start, _ in pieces], dtype=torch.long)
        used = torch.tensor([used for _, _, used in pieces], dtype=torch.long)
        places = torch.arange(size)
        rows = starts[:, None] + torch.minimum(places, used[:, None] - 1)
        piece_owners = torch.tensor([segment for segment, _, _ in pieces], dtype=torch.long)
        return cls(
            size,
            count,
            torch.cat((owners, piece_owners)).to(device),
            is_mixed.nonzero().squeeze(-1).to(device),
            rows.flatten().to(device),
            (places < used[:, None]).to(device),
        )


def _pieces(lengths: list[int], is_mixed: list[bool], size: int) -> list[tuple[int, int, int]]:
    """(segment, first entry, entries) of what the unmixed blocks leave out; never across a block's border."""
    pieces, start = [], 0
    for segment, length in enumerate(lengths):
        end = start + length
        for block in range(start // size, -(-end // size)):
            if block >= len(is_mixed) or is_mixed[block]:
                first, last = max(start, block * size), min(end, (block + 1) * size)
                if last > first:
                    pieces.append((segment, first, last - first))
        start = end
    return pieces
