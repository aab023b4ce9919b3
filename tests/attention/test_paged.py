from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from defensivekv.attention import attend_pages, native_pages
from defensivekv.attention.paged import gathered_attention
from tests.attention.pages import PageCase, PageSizes, Sequence, page_sizes
from tests.kernels.native.library import needs_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native(case: PageCase) -> Tensor:
    assert native_pages.supports(case.queries, case.pages)
    return attend_pages(
        case.queries, case.pages, case.layout, case.layer, case.table, case.starts, scaling=case.scaling
    )


def gathered(case: PageCase) -> Tensor:
    return gathered_attention(
        case.queries, case.pages, case.layout, case.layer, case.table, case.starts, scaling=case.scaling
    )


def check(output: Tensor, case: PageCase) -> None:
    assert output.dtype == case.queries.dtype
    torch.testing.assert_close(output.float(), case.expected, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50)
@given(page_sizes())
def test_gathered_copies_equal_dense_attention(dtype: torch.dtype, size: PageSizes) -> None:
    case = size.case(dtype)
    check(gathered(case), case)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150)
@given(page_sizes())
def test_the_kernel_equals_dense_attention(dtype: torch.dtype, size: PageSizes) -> None:
    case = size.case(dtype)
    check(native(case), case)


@needs_library
@settings(max_examples=50)
@given(page_sizes())
def test_threads_share_the_work_and_change_nothing_beyond_rounding(size: PageSizes) -> None:
    longer = [replace(sequence, tokens=sequence.tokens + 700) for sequence in size.sequences]
    case = replace(size, sequences=longer).case(torch.float32)
    alone = native(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 5)
        shared = native(case)
    torch.testing.assert_close(shared, alone, rtol=0, atol=case.tolerance)
    check(shared, case)


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 65])
def test_long_heads_beside_empty_ones(dtype: torch.dtype, group: int) -> None:
    long = Sequence([[0, 5000, 0, 33]], 1, 1)
    sequences = [Sequence([[0, 0, 0, 0]], 1, 1), long, Sequence([[0, 0, 0, 31]], 90, 1)]
    case = PageSizes(0, 4, group, 64, 16, 1, False, 0, sequences).case(dtype)
    check(native(case), case)


@needs_library
def test_queries_that_see_nothing_get_zero() -> None:
    case = PageSizes(0, 2, 2, 16, 8, 1, False, 0, [Sequence([[0, 3]], 0, 0), Sequence([[0, 3]], 1, 1)]).case(DTYPES[0])
    table = replace(case.table, tokens=torch.zeros(2, dtype=torch.int32))
    for output in (native(replace(case, table=table)), gathered(replace(case, table=table))):
        assert output[:, :2].abs().max() == 0
        assert output[:, 2:].abs().min() > 0


@needs_library
def test_a_step_without_sequences_or_queries_gives_nothing() -> None:
    case = PageSizes(0, 2, 2, 16, 8, 1, False, 0, [Sequence([[4, 3]], 5, 0)]).case(DTYPES[0])
    assert native(case).shape == gathered(case).shape == (0, 4, 16)


@needs_library
def test_strided_queries_and_other_integers_are_served() -> None:
    case = PageSizes(0, 2, 2, 16, 8, 1, False, 0, [Sequence([[4, 3]], 5, 2)]).case(DTYPES[0])
    table = replace(case.table, blocks=case.table.blocks.long().t().contiguous().t(), kept=case.table.kept.long())
    for queries in (
        torch.stack((case.queries, case.queries), -1)[..., 0],
        torch.stack((case.queries, case.queries), 1)[:, 0],
    ):
        check(native(replace(case, queries=queries, table=table, starts=case.starts.long())), case)


def test_what_the_kernel_cannot_serve_is_gathered() -> None:
    case = PageSizes(0, 2, 2, 24, 8, 1, False, 0, [Sequence([[4, 3]], 5, 2)]).case(DTYPES[0])
    assert not native_pages.supports(case.queries, case.pages)
    assert not native_pages.supports(case.queries.to("meta"), case.pages.to("meta"))
    output = attend_pages(
        case.queries, case.pages, case.layout, case.layer, case.table, case.starts, scaling=case.scaling
    )
    check(output, case)
