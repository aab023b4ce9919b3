"""The kernel against dense attention in float32 and against gathered copies."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.attention import masked_attention
from defensivekv.attention.paged import gathered_attention
from defensivekv.cache import PageLayout, PageTable
from tests.attention.pages import PageCase, PageSizes, Sequence, page_sizes
from tests.kernels.interpreter import DEVICE, needs_kernels, teach_bfloat16

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXAMPLES = 8 if DEVICE.type == "cpu" else 5
"""Each of them is likely to be compiled on a GPU."""

teach_bfloat16()
pytestmark = needs_kernels
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter cannot show this")

SMALL = PageSizes(
    seed=0,
    heads=2,
    group=2,
    size=32,
    block_size=16,
    layers=2,
    packed=False,
    layer=1,
    sequences=[
        Sequence([[40, 0], [300, 0]], 5, 1),
        Sequence([[9, 2], [7, 129]], 20, 3),
        Sequence([[0, 1], [0, 0]], 0, 0),
    ],
)


def on_device(case: PageCase, device: torch.device = DEVICE) -> PageCase:
    table = PageTable(
        case.table.blocks.to(device),
        case.table.kept.to(device),
        case.table.tokens.to(device),
        case.table.first_query.to(device),
        case.table.most_queries,
    )
    return replace(
        case,
        queries=case.queries.to(device),
        pages=case.pages.to(device),
        table=table,
        starts=case.starts.to(device),
    )


def attend(case: PageCase, splits: int | None = None) -> Tensor:
    """splits: of a head; None: what suits the device."""
    from defensivekv.kernels import paged_attention as module

    with pytest.MonkeyPatch.context() as patch:
        if splits is not None:
            patch.setattr(module, "num_splits", lambda *_: splits)
        return module.paged_attention(
            case.queries, case.pages, case.layout, case.layer, case.table, case.starts, scaling=case.scaling
        )


def gathered(case: PageCase) -> Tensor:
    return gathered_attention(
        case.queries, case.pages, case.layout, case.layer, case.table, case.starts, scaling=case.scaling
    )


def check(size: PageSizes, dtype: torch.dtype = torch.float32, splits: int | None = None) -> None:
    case = on_device(size.case(dtype))
    output = attend(case, splits)
    assert output.dtype == dtype
    torch.testing.assert_close(output.cpu().float(), case.expected, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES)
@given(page_sizes(), st.integers(1, 5))
def test_the_kernel_equals_dense_attention(dtype: torch.dtype, size: PageSizes, splits: int) -> None:
    check(size, dtype, splits)


@settings(max_examples=EXAMPLES)
@given(page_sizes())
def test_the_kernel_equals_gathered_copies(size: PageSizes) -> None:
    case = on_device(size.case(torch.float32))
    torch.testing.assert_close(attend(case), gathered(case), rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 64, 80, 96, 128, 192, 256])
def test_head_sizes(size: int, dtype: torch.dtype) -> None:
    check(replace(SMALL, size=size), dtype, 2)


@pytest.mark.parametrize("group", range(1, 17))
def test_group_sizes(group: int) -> None:
    check(replace(SMALL, group=group), torch.float16, 2)


@pytest.mark.parametrize(
    "counts", [[70], [1, 90, 1], [0, 33, 0, 16, 17], [8] * 5, [4, 0, 4]], ids=lambda counts: "+".join(map(str, counts))
)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_of_many_queries(counts: list[int], splits: int, dtype: torch.dtype) -> None:
    sequences = [Sequence([[7, 150]], count + 130 * (count % 2), count) for count in counts]
    check(replace(SMALL, group=3, layers=1, layer=0, sequences=sequences), dtype, splits)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("splits", [None, 1, 2, 40])
def test_long_heads_beside_empty_ones(packed: bool, splits: int | None) -> None:
    empty, long = [0, 0, 0, 0], [0, 3000, 0, 129]
    sequences = [
        Sequence([empty, empty], 1, 1),
        Sequence([[17, 0, 0, 3], long], 1, 1),
        Sequence([long, [0, 0, 0, 31]], 150, 1),
    ]
    check(replace(SMALL, heads=4, size=16, packed=packed, sequences=sequences), splits=splits)


@pytest.mark.parametrize("blocks_first", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_kept_rows_that_end_within_a_block(packed: bool, block_size: int, blocks_first: bool) -> None:
    for rows in range(0, 12, 3):
        kept = [[rows, 1], [2, 3 * rows]]
        size = replace(SMALL, block_size=block_size, packed=packed, blocks_first=blocks_first)
        for layer in range(2):
            check(replace(size, layer=layer, sequences=[Sequence(kept, 7, 2)]))


@pytest.mark.parametrize("splits", [1, 3])
def test_queries_that_see_nothing_get_zero(splits: int) -> None:
    sequences = [Sequence([[0, 300]], 1, 1), Sequence([[0, 3]], 2, 2)]
    case = on_device(replace(SMALL, layers=1, layer=0, sequences=sequences).case(torch.float32))
    table = replace(case.table, tokens=torch.zeros_like(case.table.tokens))
    output = attend(replace(case, table=table), splits)
    assert output[:, :2].abs().max() == 0
    assert output[:, 2:].abs().min() > 0


def test_a_step_without_sequences_or_queries_gives_nothing() -> None:
    case = on_device(replace(SMALL, sequences=[Sequence([[4, 3], [1, 2]], 5, 0)]).case(torch.float32))
    assert attend(case).shape == (0, 4, 32)
    nothing = PageTable(
        case.table.blocks[:0], case.table.kept[:0], case.table.tokens[:0], case.table.first_query[:1], 0
    )
    assert attend(replace(case, table=nothing, starts=case.starts[:0])).shape == (0, 4, 32)


@pytest.mark.parametrize("splits", [1, 2])
def test_queries_may_be_fewer_than_there_is_room_for(splits: int) -> None:
    case = SMALL.case(torch.float32)
    room = torch.full((30, *case.queries.shape[1:]), float("nan"))
    queries = torch.cat((case.queries, room))
    table = replace(case.table, most_queries=20)
    output = attend(on_device(replace(case, queries=queries, table=table)), splits)
    torch.testing.assert_close(output[: len(case.queries)].cpu(), case.expected, rtol=0, atol=case.tolerance)


def test_any_strides_and_integers_are_read() -> None:
    case = on_device(SMALL.case(torch.float32))
    table = PageTable(
        case.table.blocks.long().t().contiguous().t(),
        case.table.kept.long(),
        torch.stack((case.table.tokens, case.table.tokens), 1)[:, 0],
        case.table.first_query.long(),
        case.table.most_queries,
    )
    starts = torch.stack((case.starts, case.starts), 1).long()[:, 0]
    for queries in (
        torch.stack((case.queries, case.queries), -1)[..., 0],
        case.queries.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        output = attend(replace(case, queries=queries, table=table, starts=starts), 2)
        torch.testing.assert_close(output.cpu(), case.expected, rtol=0, atol=case.tolerance)


def test_what_is_read_is_not_written() -> None:
    case = on_device(SMALL.case(torch.float16))
    read = [case.queries, case.pages, case.starts]
    read += [case.table.blocks, case.table.kept, case.table.tokens, case.table.first_query]
    before = [tensor.clone() for tensor in read]
    attend(case, 2)
    for now, then in zip(read, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def test_pages_beyond_the_reach_of_32_bits_are_read() -> None:
    layout = PageLayout(heads=1, block_size=16, block_stride=32)
    far, size = 2**22 + 5, 16
    pages = torch.empty(((far + 1) * 32, size), dtype=torch.float16, device=DEVICE)
    assert pages.numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    page = torch.randn(2, 16, size, generator=generator).half()
    queries = torch.randn(1, 1, size, generator=generator).half()
    pages[far * 32 :] = page.flatten(0, 1).to(DEVICE)
    blocks, kept, tokens, first_query = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ([[far]], [8], [8], [0, 1])
    )
    table = PageTable(blocks, kept, tokens, first_query, 1)
    starts = torch.tensor([[0, 8]], dtype=torch.int32, device=DEVICE)
    case = PageCase(queries.to(DEVICE), pages, layout, 0, table, starts, 0.3, torch.empty(0), tolerance=1e-2)
    visible = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    expected = masked_attention(queries[None], page[None, :1], page[None, 1:], visible, 0.3)[0]
    torch.testing.assert_close(attend(case).cpu().float(), expected, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize(
    ("programs", "most_entries", "splits"), [(1, 10_000, 8), (3, 10_000, 3), (1, 129, 2), (100, 10_000, 1), (1, 0, 1)]
)
def test_heads_are_cut_for_few_programs_alone(programs: int, most_entries: int, splits: int) -> None:
    from defensivekv.kernels.paged_attention import num_splits

    assert num_splits(programs, most_entries, torch.device("cpu")) == splits


def test_the_launch_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from defensivekv.kernels import paged_attention as module

    launched = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: launched.append(grid)

    monkeypatch.setattr(module, "_attend_chunks", Recorded())
    monkeypatch.setattr(module, "_merge_chunks", Recorded())
    case = SMALL.case(torch.float32)
    # A tensor without storage has no numbers to give.
    assert attend(on_device(case, torch.device("meta")), 2).shape == case.queries.shape
    assert launched == [(3, 2, 2), (3, 2, 6)]


@needs_gpu
def test_a_captured_graph_is_replayed_with_other_sequences() -> None:
    size = replace(SMALL, size=128)
    turned = replace(size, seed=1, sequences=size.sequences[1:] + size.sequences[:1])
    case, other = on_device(size.case(torch.float16)), on_device(turned.case(torch.float16))
    assert case.pages.shape == other.pages.shape

    def numbers(case: PageCase) -> list[Tensor]:
        table = case.table
        return [case.queries, case.pages, case.starts, table.blocks, table.kept, table.tokens, table.first_query]

    attend(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend(case)
    for expected in (case.expected, other.expected):
        graph.replay()
        torch.testing.assert_close(output.cpu().float(), expected, rtol=0, atol=max(case.tolerance, other.tolerance))
        for held, new in zip(numbers(case), numbers(other), strict=True):
            held.copy_(new)
