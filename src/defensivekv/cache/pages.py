"""Pages of rows, one head's key or value each: ragged heads inside blocks that an engine hands out.

An engine with a paged cache gives a sequence blocks, and a block has a page in every layer. Nothing asks for a page to
hold `block_size` tokens of every head: it has `heads * block_size` rows of keys and as many of values, and heads of
any length fit into them, so long as their sum does.

    page             [ keys: heads * block_size rows | values: as many ]
    sequence         [ kept: slot after slot, full ......... | tokens: slot after slot ............ ]
    its blocks       [ block 0      | block 1      | block 2        | block 3       | ... ]
                                                     ^ `rest` slots of kept rows, then tokens

A slot is room for one row of every head, in every layer. What stays of a prompt is packed head after head into its
`kept` slots, `kept * heads` rows of each layer; where layers share one budget they share these rows too, the first
layer's pages of a block before the second's. The tokens that follow have a slot each, and within a block those of one
head lie side by side.

Knows no policy, no model and no engine.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Rows = Int[Tensor, "..."]


@dataclass(frozen=True)
class PageLayout:
    """Where pages lie in a tensor of rows.

    heads: key-value heads. block_size: slots of a block. first: the row where block 0 of layer 0 begins.
    layer_stride, block_stride: rows from a page to that of the next layer, and of the next block.
    packed_layers: layers that share the kept rows; 1: each has its own.
    """

    heads: int
    block_size: int
    block_stride: int
    layer_stride: int = 0
    first: int = 0
    packed_layers: int = 1

    @property
    def page_rows(self) -> int:
        """Rows of keys in a page; those of values follow, as many."""
        return self.heads * self.block_size

    def rows(self, blocks: Int[Tensor, " n"], page: "Places", layer: int) -> Rows:
        """The rows of keys at these places of a sequence; a value lies `page_rows` further.

        blocks: the sequence's. layer: whose entries they are.
        """
        return self.rows_in(blocks[page.blocks], page, layer)

    def rows_in(self, ids: Rows, page: "Places", layer: int) -> Rows:
        """The same of any sequences. ids: of each place's block."""
        layers = layer if page.layers is None else page.layers
        return ids.long() * self.block_stride + layers * self.layer_stride + self.first + page.rows

    def kept(self, numbers: Int[Tensor, "..."], slots: int) -> "Places":
        """Places of kept rows, by number, of a sequence that keeps `slots` slots."""
        full, rest = divmod(slots, self.block_size)
        in_full = numbers < full * self.packed_layers * self.page_rows
        # The last block has kept rows in its first slots alone.
        width = torch.where(in_full, self.page_rows, max(1, rest * self.heads))
        within = torch.where(in_full, numbers, numbers - full * self.packed_layers * self.page_rows)
        page = within // width
        blocks = torch.where(in_full, page // self.packed_layers, full)
        layers = None
        if self.packed_layers > 1:
            layers = torch.where(in_full, page % self.packed_layers, page)
        return Places(blocks, layers, within % width)

    def tokens(self, numbers: Int[Tensor, " x"], slots: int | Int[Tensor, " x"]) -> "Places":
        """Places of tokens, by number after the kept slots of their sequences: (x, h)."""
        full, rest = slots // self.block_size, slots % self.block_size
        slot = slots + numbers
        block, place = slot // self.block_size, slot % self.block_size
        before = torch.where(block == full, rest, 0)
        heads = torch.arange(self.heads, device=numbers.device)
        rows = (before * self.heads + place - before)[:, None] + heads * (self.block_size - before)[:, None]
        return Places(block[:, None].expand_as(rows), None, rows)


@dataclass(frozen=True, eq=False)
class Places:
    """Rows of a sequence: which of its blocks, whose layer's page (None: the asking layer's), and where in it."""

    blocks: Rows
    layers: Rows | None
    rows: Rows


@dataclass(frozen=True, eq=False)
class PageTable:
    """Sequences of one step that read pages, and their new queries.

    blocks: (r, n) int32, each sequence's, in order; what lies beyond its own is not read.
    kept: (r,) int32, slots that hold what stayed of its prompt. tokens: (r,) int32, tokens stored after those, the
    queries' own included. first_query: (r + 1,) int32, where each sequence's queries begin among all: they are those
    of its last tokens, and each reads up to its own.
    most_queries: of a sequence.
    """

    blocks: Int[Tensor, "r n"]
    kept: Int[Tensor, " r"]
    tokens: Int[Tensor, " r"]
    first_query: Int[Tensor, " r1"]
    most_queries: int
