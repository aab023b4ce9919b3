"""Where the entries of one row stand, once heads hold different numbers of them.

    head 0   . . . a b c|w w      slots; heads that hold fewer entries leave the first ones empty
    head 1   a b c d e f|w w      the latest tokens, which stay, are in the last slots of every head

A prompt that nothing was evicted from fills every slot, slot by slot its tokens.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Int
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
