"""One layer's cache: an immutable ragged prefix, shared by all that was forked from it, and a tail of its own.

prefix  ████████░░░ rows share it by index      tail  [b, h, capacity, d], used 3
              evicted and freed                        grows, is cropped, is reordered
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.cache.prefix import RaggedPrefix
from defensivekv.cache.static_tail import StaticTail
from defensivekv.cache.tail import Tail
from defensivekv.errors import CacheError
from defensivekv.types import Kept


@dataclass(frozen=True, eq=False)
class PrefixIndex:
    """Where a prefix's segments lie and who reads them, as int64 CPU tensors.

    offsets: (rows * heads + 1,) where each head of each row of the prefix begins; the last is where all end.
    first_reader, readers: the batch rows that read row `i` of the prefix are those of `readers` from
    `first_reader[i]` up to `first_reader[i + 1]`.
    """

    offsets: Int[Tensor, " segments"]
    first_reader: Int[Tensor, " rows"]
    readers: Int[Tensor, " b"]


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

    @cached_property
    def index(self) -> PrefixIndex:
        """The same for a kernel."""
        starts = [start for row in self.prefix.offsets for start in row]
        readers = dict(self.sharers)
        of_rows = [readers.get(row, []) for row in range(len(self.prefix.lengths))]
        counts = torch.tensor([0, *(len(rows) for rows in of_rows)])
        return PrefixIndex(
            torch.tensor([*starts, len(self.prefix.keys)]),
            counts.cumsum(0),
            torch.tensor([row for rows in of_rows for row in rows], dtype=torch.long),
        )

    @property
    def is_identity(self) -> bool:
        """Whether every batch row reads the prefix's row of the same number, and none is left out."""
        return self.rows == tuple(range(len(self.prefix.lengths)))


class RaggedLayer:
    """Keys and values of one layer.

    before: tokens that went in before those of the tail. reserve: tokens that a tail has room for from the start, so
    that it need not grow; one that starts with more is as it comes. static_tokens: of the tail after a prefix, whose
    buffers then never move; None: they grow.
    """

    def __init__(self, reserve: int = 0, static_tokens: int | None = None) -> None:
        self.view: PrefixView | None = None
        self.tail: Tail | StaticTail | None = None
        self.before = 0
        self.reserve = reserve
        self.static_tokens = static_tokens

    @property
    def seen(self) -> int:
        """Tokens that went in, pads and evicted ones counted: the logical length."""
        return self.before + self.tail_length

    @property
    def static_tail(self) -> StaticTail | None:
        """The tail, where its buffers never move."""
        return self.tail if isinstance(self.tail, StaticTail) else None

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
        if self.tail is None and keys.shape[2] <= self.reserve:
            self.tail = Tail.empty(keys, values, self.reserve)
        if self.tail is None:
            self.tail = Tail.of(keys, values)
        else:
            self.tail.append(keys, values, self.reserve)
        return self.tail.keys, self.tail.values

    @property
    def num_slots(self) -> int:
        """Entries of the longest head, with the tail."""
        lengths = [] if self.view is None else [self.view.prefix.lengths[row] for row in self.view.rows]
        return max((length for row in lengths for length in row), default=0) + self.tail_length

    def compact(self, kept: Kept, facts: Float[Tensor, "b h t f"] | None = None) -> None:
        """Makes what is kept of prefix and tail the prefix, and frees the rest. A shared prefix is left as it is.

        kept: (b, h, num_slots); the last slots are the tail's, those before them the prefix's, each head's in the last
        of them. facts: of all slots; None: those of a prefix without a tail stay as they are.
        """
        if self.tail is None and self.view is None:
            raise CacheError("only a layer that holds tokens can be compacted")
        if self.view is None:
            assert self.tail is not None
            prefix = RaggedPrefix.gather(self.tail.keys, self.tail.values, kept)
            if facts is not None:
                prefix = replace(prefix, facts=facts[kept])
        else:
            prefix = self._recompacted(self.view, kept, facts)
        self.start_from(PrefixView(prefix, tuple(range(kept.shape[0]))), self.seen)

    def start_from(self, view: PrefixView, seen: int) -> None:
        """Holds a prefix of a text of `seen` tokens, and nothing after it."""
        before, self.view, self.tail, self.before = self.static_tail, view, None, seen
        if self.static_tokens is None:
            return
        prefix, shape = view.prefix, (len(view.rows), len(view.prefix.lengths[0]), self.static_tokens)
        if before is not None and before.key_buffer.shape[:3] == shape:
            before.count.zero_()
            self.tail = before
        else:
            self.tail = StaticTail.empty(shape, (prefix.keys.shape[-1], prefix.values.shape[-1]), prefix.keys)

    def narrow(self, kept: Kept) -> None:
        """Evicts from the prefix alone; the tail stays as it is. A prefix of which all stays is shared.

        kept: (b, h, p), of the slots of the prefix, each head's entries in the last of them.
        """
        if self.view is None:
            raise CacheError("only a prefix can be evicted from: run the prompt through the model first")
        old, rows = self.view.prefix, self.view.rows
        counts: list[list[int]] = kept.sum(-1).tolist()
        lengths = tuple(tuple(row) for row in counts)
        if lengths == tuple(old.lengths[row] for row in rows):
            return
        self.view = PrefixView(old.take(old.slots(rows)[kept], lengths), tuple(range(len(rows))))

    def _recompacted(self, view: PrefixView, kept: Kept, facts: Float[Tensor, "b h t f"] | None) -> RaggedPrefix:
        slots, old = view.prefix.slots(view.rows), view.prefix
        start = slots.shape[-1]
        chosen = slots[kept[..., :start]]
        is_old = (torch.arange(kept.shape[-1], device=kept.device) < start).expand(kept.shape)[kept]
        from_tail = kept[..., start:]

        def gathered(prefix: Tensor, tail: Tensor | None) -> Tensor:
            if tail is None:
                return prefix[chosen]
            whole = prefix.new_empty(len(is_old), *prefix.shape[1:])
            whole[is_old] = prefix[chosen]
            whole[~is_old] = tail[from_tail]
            return whole

        tail, positions = self.tail, None
        if tail is not None:
            numbers = torch.arange(self.seen - tail.used, self.seen, dtype=torch.int32, device=kept.device)
            positions = numbers.expand(from_tail.shape)
        counts: list[list[int]] = kept.sum(-1).tolist()
        known = None if facts is None else facts[kept]
        if facts is None and tail is None and old.facts is not None:
            known = old.facts[chosen]
        return RaggedPrefix(
            gathered(old.keys, None if tail is None else tail.keys),
            gathered(old.values, None if tail is None else tail.values),
            gathered(old.positions, positions),
            tuple(tuple(row) for row in counts),
            known,
        )

    def forget_facts(self) -> None:
        """Drops what was known of the entries: nothing will be decided of them any more."""
        if self.view is not None and self.view.prefix.facts is not None:
            self.view = PrefixView(replace(self.view.prefix, facts=None), self.view.rows)

    def release_rows(self, rows: Collection[int] = ()) -> None:
        """Frees what the prefix holds of these rows of the batch, which stay in it with nothing, and of rows of the
        prefix that no row of the batch reads.
        """
        if self.view is None:
            return
        prefix = self.view.prefix
        places: dict[int, int] = {}
        lengths: list[tuple[int, ...]] = []
        view_rows: list[int] = []
        for number, source in enumerate(self.view.rows):
            if number not in rows and source in places:
                view_rows.append(places[source])
                continue
            view_rows.append(len(lengths))
            if number not in rows:
                places[source] = len(lengths)
            lengths.append((0,) * len(prefix.lengths[source]) if number in rows else prefix.lengths[source])
        if len(places) == len(prefix.lengths) and not rows:
            return
        self.view = PrefixView(replace(prefix.select_rows(tuple(places)), lengths=tuple(lengths)), tuple(view_rows))

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens. Raises CacheError where they reach into the prefix."""
        if count > self.tail_length:
            raise CacheError(
                f"cannot crop {count} tokens: only the last {self.tail_length} came after the eviction; "
                "make a new cache, or fork this one before going on"
            )
        if self.tail is not None and count:
            self.tail.drop_last(count, self.reserve)

    def select_rows(self, index: Int[Tensor, " rows"]) -> None:
        """Makes the batch the rows of `index`, which may repeat. The prefix is not copied."""
        if self.view is not None:
            chosen = tuple(self.view.rows[row] for row in index.tolist())
            self.view = PrefixView(self.view.prefix, chosen)
        if self.tail is not None:
            self.tail = self.tail.select_rows(index.to(self.tail.key_buffer.device))

    def fork(self) -> "RaggedLayer":
        """A layer that goes on by itself from here, sharing the prefix."""
        twin = RaggedLayer(self.reserve, self.static_tokens)
        twin.view, twin.before = self.view, self.before
        twin.tail = None if self.tail is None else self.tail.clone()
        return twin
