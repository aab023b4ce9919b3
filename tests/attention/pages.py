"""Random sequences in pages, and what dense attention in float32 says of them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.attention import masked_attention
from defensivekv.cache import PageLayout, PageTable


@dataclass(frozen=True)
class Sequence:
    """kept: what each head of each packed layer keeps. tokens: after those. queries: of the last tokens."""

    kept: list[list[int]]
    tokens: int
    queries: int


@dataclass(frozen=True, eq=False)
class PageCase:
    """Arguments of `attend_pages`, and what is expected: dense attention in float32.

    tolerance: what rounding to the dtype may change.
    """

    queries: Tensor
    pages: Tensor
    layout: PageLayout
    layer: int
    table: PageTable
    starts: Tensor
    scaling: float
    expected: Tensor
    tolerance: float


@dataclass(frozen=True)
class PageSizes:
    """A case in numbers: hypothesis draws and shrinks these; the tensors follow from the seed.

    layers: of a block's pages. packed: whether they share the kept rows. layer: whose entries are read.
    spare: slots that are kept room and hold nothing, of each sequence.
    """

    seed: int
    heads: int
    group: int
    size: int
    block_size: int
    layers: int
    packed: bool
    layer: int
    sequences: list[Sequence]
    spare: int = 0
    blocks_first: bool = True

    @property
    def layout(self) -> PageLayout:
        """Pages of a block side by side, or all pages of a layer."""
        page, count = 2 * self.heads * self.block_size, self.num_blocks
        strides = (page * self.layers, page) if self.blocks_first else (page, page * count)
        packed = self.layers if self.packed else 1
        return PageLayout(self.heads, self.block_size, strides[0], strides[1], first=3, packed_layers=packed)

    @property
    def slots(self) -> list[int]:
        """Kept slots of each sequence: as many as its fullest layer needs, or all layers together."""
        rows = []
        for sequence in self.sequences:
            layers = [sum(heads) for heads in sequence.kept]
            rows.append(sum(layers) / self.layers if self.packed else max(layers))
        return [-int(-count // self.heads) + self.spare for count in rows]

    @property
    def num_blocks(self) -> int:
        return 2 + sum(map(len, self._blocks()))

    def _blocks(self) -> list[range]:
        """Numbers of blocks for each sequence, in order."""
        blocks, first = [], 1
        for slots, sequence in zip(self.slots, self.sequences, strict=True):
            count = -(-(slots + sequence.tokens) // self.block_size)
            blocks.append(range(first, first + count))
            first += count
        return blocks

    def case(self, dtype: torch.dtype) -> PageCase:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        layout, h = self.layout, self.heads
        pages = torch.full((3 + 2 * h * self.block_size * self.layers * self.num_blocks, self.size), torch.nan).to(
            dtype
        )
        shuffled = torch.randperm(self.num_blocks, generator=generator)
        most = max(map(len, self._blocks()), default=0)
        # What lies beyond a sequence's blocks is not read, nor between the rows of the table.
        table = torch.full((len(self.sequences), most + 2), 2**30, dtype=torch.int32)
        queries = normal(sum(sequence.queries for sequence in self.sequences), h * self.group, self.size)
        expected = torch.zeros(queries.shape)
        starts, first, scaling, largest = [], 0, self.size**-0.5, 0.0
        for row, (sequence, slots, blocks) in enumerate(zip(self.sequences, self.slots, self._blocks(), strict=True)):
            table[row, : len(blocks)] = shuffled[list(blocks)]
            own = table[row, :most]
            before = sum(map(sum, sequence.kept[: self.layer])) if self.packed else 0
            lengths = sequence.kept[self.layer]
            bounds = torch.tensor([before, *lengths]).cumsum(0)
            starts.append(bounds)
            seen = torch.arange(sequence.tokens) <= (
                sequence.tokens - sequence.queries + torch.arange(sequence.queries)[:, None]
            )
            last = first + sequence.queries
            for head, length in enumerate(lengths):
                keys, values = (normal(length + sequence.tokens, self.size) for _ in range(2))
                kept = layout.rows(own, layout.kept(torch.arange(*bounds[head : head + 2].tolist()), slots), self.layer)
                tokens = layout.rows(own, layout.tokens(torch.arange(sequence.tokens), slots), self.layer)[:, head]
                rows = torch.cat((kept, tokens))
                pages[rows], pages[rows + layout.page_rows] = keys, values
                visible = torch.cat((seen.new_ones(len(seen), length), seen), 1)
                heads = slice(head * self.group, (head + 1) * self.group)
                asked = queries[first:last, heads].transpose(0, 1)[None]
                dense = masked_attention(asked, keys[None, None], values[None, None], visible[None, None], scaling)
                expected[first:last, heads] = dense[0].transpose(0, 1)
                if len(rows) and len(seen):
                    logit = float(queries.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max()) * scaling
                    largest = max(largest, (1 + logit) * float(values.abs().max()))
            first = last
        counts = [sequence.queries for sequence in self.sequences]
        return PageCase(
            queries=queries,
            pages=pages,
            layout=layout,
            layer=self.layer,
            table=PageTable(
                table[:, :most],
                torch.tensor(self.slots, dtype=torch.int32),
                torch.tensor([sequence.tokens for sequence in self.sequences], dtype=torch.int32),
                torch.tensor([0, *counts]).cumsum(0).int(),
                max(counts),
            ),
            starts=torch.stack(starts).int(),
            scaling=scaling,
            expected=expected,
            tolerance=torch.finfo(dtype).eps * largest,
        )


@st.composite
def page_sizes(draw: st.DrawFn, *, size: int | None = None) -> PageSizes:
    """Odd lengths, empty heads and sequences, blocks in any order."""
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = st.sampled_from([0, 0, 1, 5, 31, 130, 400])
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.sampled_from([1, 1, 0, 2, 5, 33, 70]))
        kept = [[draw(length) for _ in range(heads)] for _ in range(layers)]
        sequences.append(Sequence(kept, count + draw(st.sampled_from([0, 1, 7, 40])), count))
    return PageSizes(
        seed=draw(st.integers(0, 2**31 - 1)),
        heads=heads,
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        size=draw(st.sampled_from([16, 48, 64, 80, 128])) if size is None else size,
        block_size=draw(st.sampled_from([1, 4, 16, 48, 128])),
        layers=layers,
        packed=draw(st.booleans()),
        layer=draw(st.integers(0, layers - 1)),
        sequences=sequences,
        spare=draw(st.sampled_from([0, 0, 1, 9])),
        blocks_first=draw(st.booleans()),
    )
