"""One layer's cache: an immutable ragged prefix, shared by all that was forked from it, and a tail of its own.

prefix  ████████░░░ rows share it by index      tail  [b, h, capacity, d], used 3
              evicted and freed                        grows, is cropped, is reordered
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.cache.prefix import RaggedPrefix
from defensivekv.cache.tail import Tail
from defensivekv.errors import CacheError
from defensivekv.types import Kept


@dataclass(frozen=True, eq=False)
class PrefixView:
    """A prefix as the rows of a batch see it: batch row `i` reads the prefix's row `rows[i]`."""

    prefix: RaggedPrefix
    rows: tuple[int, ...]

    @cached_property
    def sharers(self) -> tuple[tuple[int, list[int]], ...]:
        """The prefix's rows in use, each with the batch rows that read it."""
        readers: dict[int, list[int]] = {}
        for batch_row, prefix_row in enumerate(self.rows):
            readers.setdefault(prefix_row, []).append(batch_row)
        return tuple(readers.items())

    @property
    def is_identity(self) -> bool:
        """Whether every batch row reads the prefix's row of the same number, and none is left out."""
        return self.rows == tuple(range(len(self.prefix.lengths)))


class RaggedLayer:
    """Keys and values of one layer.

    seen: tokens that went in, pads and evicted ones counted: the logical length.
    """

    def __init__(self) -> None:
        self.view: PrefixView | None = None
        self.tail: Tail | None = None
        self.seen = 0

    @property
    def tail_length(self) -> int:
        """Tokens in the tail."""
        return 0 if self.tail is None else self.tail.used

    @property
    def dtype(self) -> torch.dtype | None:
        """Of keys; None before the first token."""
        if self.tail is not None:
            return self.tail.key_buffer.dtype
        return None if self.view is None else self.view.prefix.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of prefix and tail buffers; a prefix shared with forks counts in each of them."""
        prefix = 0 if self.view is None else self.view.prefix.nbytes
        return prefix + (0 if self.tail is None else self.tail.nbytes)

    def append(
        self, keys: Float[Tensor, "b h x d"], values: Float[Tensor, "b h x v"]
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t v"]]:
        """Adds `x` tokens; gives the whole tail of `t`, as views."""
        if self.tail is None:
            self.tail = Tail.of(keys, values)
        else:
            self.tail.append(keys, values)
        self.seen += keys.shape[2]
        return self.tail.keys, self.tail.values

    def compact(self, kept: Kept) -> None:
        """Turns the tail into the prefix: what is not kept is freed. Once in a layer's life."""
        if self.tail is None or self.view is not None:
            raise CacheError("only a layer that holds a prompt and no prefix can be compacted")
        self.view = PrefixView(RaggedPrefix.gather(self.tail.keys, self.tail.values, kept), tuple(range(kept.shape[0])))
        self.tail = None

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens. Raises CacheError where they reach into the prefix."""
        if count > self.tail_length:
            raise CacheError(
                f"cannot crop {count} tokens: only the last {self.tail_length} came after the eviction; "
                "make a new cache, or fork this one before going on"
            )
        if self.tail is not None and count:
            self.tail.drop_last(count)
            self.seen -= count

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Makes the batch the rows of `index`, which may repeat. The prefix is not copied."""
        if self.view is not None:
            chosen = tuple(self.view.rows[row] for row in index.tolist())
            self.view = PrefixView(self.view.prefix, chosen)
        if self.tail is not None:
            self.tail = self.tail.select_rows(index.to(self.tail.key_buffer.device))

    def fork(self) -> "RaggedLayer":
        """A layer that goes on by itself from here, sharing the prefix."""
        twin = RaggedLayer()
        twin.view, twin.seen = self.view, self.seen
        twin.tail = None if self.tail is None else self.tail.clone()
        return twin
