"""The compacted part of a layer's cache: ragged, flat, never written again.

    row 0, head 0   k k k k k          keys, values, positions lie one after the other,
    row 0, head 1   k k                row by row and head by head:
    row 1, head 0   k k k k            offsets = 0, 5, 7, 11, 14
    row 1, head 1   k k k

Knows no policy and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.cache.blocks import Blocks
from defensivekv.kernels.device import runs_kernels
from defensivekv.types import Kept, Keys, Positions, Values


def filled_slots(counts: Int[Tensor, "b h"]) -> Bool[Tensor, "b h p"]:
    """Which slots hold an entry, where each head has its `counts` entries in the last of as many as the longest has."""
    longest = int(counts.max()) if counts.numel() else 0
    return torch.arange(longest, device=counts.device) >= longest - counts.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class RaggedPrefix:
    """Entries that stayed, for each row and key-value head as many as were kept.

    keys: (s, d).  values: (s, v).  positions: (s,) int32, ascending within a head.
    lengths: entries of each head of each row, lengths[row][head].
    facts: (s, f) float32, what is known of the entries for later decisions; None: nothing. They are not read here.
    """

    keys: Float[Tensor, "s d"]
    values: Float[Tensor, "s v"]
    positions: Positions
    lengths: tuple[tuple[int, ...], ...]
    facts: Float[Tensor, "s f"] | None = None

    @classmethod
    def gather(cls, keys: Keys, values: Values, kept: Kept) -> "RaggedPrefix":
        """Copies the kept entries of a dense layer. The dense tensors are not referred to afterwards.

        On a GPU, the lengths are waited for, once.
        """
        counts: list[list[int]] = kept.sum(-1).tolist()
        lengths = tuple(tuple(row) for row in counts)
        if runs_kernels(keys.device):
            from defensivekv.kernels.compaction import compact

            copied = compact(keys, values, kept, sum(map(sum, lengths)))
            return cls(copied.keys, copied.values, copied.positions, lengths)
        positions = kept.nonzero()[:, -1]
        parts = positions.split([length for row in lengths for length in row])
        return cls(_gathered(keys, parts), _gathered(values, parts), positions.to(torch.int32), lengths)

    def entries_of(self, rows: tuple[int, ...]) -> Int[Tensor, " n"]:
        """Where the entries of these rows lie, one row after the other; rows may repeat."""
        device = self.keys.device
        if rows == tuple(range(len(self.lengths))):
            return torch.arange(len(self.keys), device=device)
        starts = [heads[0] if heads else 0 for heads in self.offsets]
        sizes = [sum(heads) for heads in self.lengths]
        parts = [torch.arange(starts[row], starts[row] + sizes[row], device=device) for row in rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)

    def select_rows(self, rows: tuple[int, ...]) -> "RaggedPrefix":
        """A copy that holds these rows alone."""
        return self.take(self.entries_of(rows), tuple(self.lengths[row] for row in rows))

    def take(
        self, entries: Int[Tensor, " n"] | Bool[Tensor, " s"], lengths: tuple[tuple[int, ...], ...]
    ) -> "RaggedPrefix":
        """A copy of these entries alone, by number or as a mask. lengths: of them, lengths[row][head]."""
        facts = None if self.facts is None else self.facts[entries]
        return RaggedPrefix(self.keys[entries], self.values[entries], self.positions[entries], lengths, facts)

    def slots(self, rows: tuple[int, ...]) -> Int[Tensor, "b h p"]:
        """Numbers of the entries of these rows, those of each head in its last slots; -1 in slots that stay empty."""
        entries = self.entries_of(rows)
        filled = filled_slots(torch.tensor([self.lengths[row] for row in rows], device=self.keys.device))
        slots = entries.new_full(filled.shape, -1)
        slots[filled] = entries
        return slots

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Where each head's entries start, offsets[row][head]."""
        starts, start = [], 0
        for row in self.lengths:
            row_starts = []
            for length in row:
                row_starts.append(start)
                start += length
            starts.append(tuple(row_starts))
        return tuple(starts)

    @cached_property
    def blocks(self) -> Blocks:
        """How a batched kernel reads the entries."""
        return Blocks.of([length for row in self.lengths for length in row], self.keys.device)

    def segment(self, row: int, head: int) -> slice:
        """Where the entries of one head lie."""
        start = self.offsets[row][head]
        return slice(start, start + self.lengths[row][head])

    def kept_positions(self, row: int, head: int) -> Int[Tensor, " n"]:
        """Positions in the prompt of one head's entries, pads counted; ascending int32."""
        return self.positions[self.segment(row, head)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, positions and facts."""
        facts = 0 if self.facts is None else self.facts.nbytes
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes + facts


def _gathered(entries: Keys | Values, parts: Sequence[Int[Tensor, "_"]]) -> Float[Tensor, "s d"]:
    """Entries of each head, by number. Whole rows are copied, where a mask would be looked up for every channel."""
    copies = entries.new_empty(sum(map(len, parts)), entries.shape[-1])
    heads = (head for row in entries for head in row)
    for target, head, part in zip(copies.split([len(part) for part in parts]), heads, parts, strict=True):
        target.copy_(head.index_select(0, part))
    return copies
