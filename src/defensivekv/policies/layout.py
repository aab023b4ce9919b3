"""Where the entries of one row stand, once heads hold different numbers of them.

    head 0   . . . a b c|w w      slots; heads that hold fewer entries leave the first ones empty
    head 1   a b c d e f|w w      the latest tokens, which stay, are in the last slots of every head

A prompt that nothing was evicted from fills every slot, slot by slot its tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ABSENT = -(2**30)
"""The position of a slot that is empty: far from any token."""


@dataclass(frozen=True)
class Layout:
    """The slots of one row.

    num_slots: of every head. num_tokens: of the text so far, evicted ones counted, pads not.
    positions: (h, num_slots) each entry's token, the row's first being 0, ascending; `ABSENT` where there is none.
    None: every slot its own token.
    """

    num_slots: int
    num_tokens: int
    positions: Int[Tensor, "h m"] | None = None

    @property
    def absent(self) -> Bool[Tensor, "h m"] | None:
        """Which slots are empty; None: none of them."""
        return None if self.positions is None else self.positions < 0

    def first_positions(self, count: int) -> Int[Tensor, "h n"] | None:
        """Positions of the first `count` slots."""
        return None if self.positions is None else self.positions[:, :count]


def align_right(flat: Float[Tensor, "s *f"], lengths: list[int], fill: float) -> Float[Tensor, "h m *f"]:
    """What lies one head after the other, each head's in the last slots of its row."""
    longest = max(lengths, default=0)
    slots = flat.new_full((len(lengths), longest, *flat.shape[1:]), fill)
    slots[filled(lengths, longest, flat.device)] = flat
    return slots


def filled(lengths: list[int], num_slots: int, device: torch.device) -> Bool[Tensor, "h m"]:
    """Which of the slots hold an entry."""
    first = num_slots - torch.tensor(lengths, device=device)
    return torch.arange(num_slots, device=device) >= first[:, None]
