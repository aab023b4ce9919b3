from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from defensivekv.attention import Backend, attend, causal_mask, native, ragged
from defensivekv.cache import PrefixView
from tests.attention.cases import Sizes, sizes

BACKENDS: list[Backend] = ["auto", "native", "flash-cpu", "matmul"]
LARGE = Sizes(
    seed=0,
    groups=4,
    key_size=16,
    value_size=16,
    num_queries=1,
    tail=9,
    prompt=3000,
    lengths=[[3000, 2, 0], [130, 2999, 1]],
    rows=[0, 1],
    mask=None,
    scaling=0.25,
    softcap=None,
    with_sinks=False,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=150)
@given(sizes(hiding=False))
def test_the_chosen_backend_equals_dense_attention(dtype: torch.dtype, size: Sizes) -> None:
    case = size.case(dtype)
    torch.testing.assert_close(case.attend("auto").float(), case.expected(), rtol=0, atol=case.tolerance())


@settings(max_examples=50)
@given(sizes(flash=True, hiding=False))
def test_a_prefix_read_by_products_merges_with_a_tail_read_by_flash(size: Sizes) -> None:
    case = size.case(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "supports", lambda *_: False)
        patch.setattr(ragged, "_suits_matmul", lambda *_: True)
        output = case.attend("auto")
    torch.testing.assert_close(output, case.expected(), rtol=0, atol=case.tolerance())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rows", [[0, 1], [1, 1, 0], [1], [0] * 20])
@pytest.mark.parametrize("num_queries", [1, 9])
def test_large_prefixes_on_several_threads_equal_dense_attention(
    backend: Backend, groups: int, rows: list[int], num_queries: int
) -> None:
    case = replace(LARGE, groups=groups, rows=rows, num_queries=num_queries).case(torch.float32)
    torch.testing.assert_close(case.attend(backend), case.expected(), rtol=0, atol=case.tolerance())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_gradient_mode_reads_the_same_and_no_gradient_flows(backend: Backend, mode: type[torch.no_grad]) -> None:
    case = LARGE.case(torch.float32)
    expected = case.attend(backend)
    with mode():
        if mode is torch.enable_grad:
            case.queries.requires_grad_()
        output = case.attend(backend)
    assert not output.requires_grad
    assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_rows_do_not_influence_each_other(backend: Backend) -> None:
    case = replace(LARGE, rows=[0, 1, 1]).case(torch.float32)
    together = case.attend(backend)
    assert case.view is not None
    for row, source in enumerate(case.view.rows):
        one = slice(row, row + 1)
        view = PrefixView(case.view.prefix, (source,))
        alone = attend(
            case.queries[one], view, case.tail_keys[one], case.tail_values[one], scaling=case.scaling, backend=backend
        )
        torch.testing.assert_close(together[one], alone, rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_read_is_not_written(backend: Backend) -> None:
    case = replace(LARGE, num_queries=3, mask=(True, True), with_sinks=True).case(torch.float32)
    assert case.view is not None
    read = [case.queries, case.tail_keys, case.tail_values, case.view.prefix.keys, case.view.prefix.values]
    assert case.visible is not None
    assert case.sinks is not None
    read += [case.visible, case.sinks]
    before = [tensor.clone() for tensor in read]
    case.attend(backend)
    assert all(torch.equal(now, then) for now, then in zip(read, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_that_is_a_view_of_a_larger_buffer_is_read_in_place(backend: Backend) -> None:
    case = LARGE.case(torch.float32)
    buffers = [torch.nn.functional.pad(tail, (0, 0, 0, 50), value=1e4) for tail in (case.tail_keys, case.tail_values)]
    views = replace(case, tail_keys=buffers[0][:, :, :9], tail_values=buffers[1][:, :, :9])
    torch.testing.assert_close(views.attend(backend), case.expected(), rtol=0, atol=case.tolerance())


def test_in_the_causal_mask_the_last_query_sees_all_and_the_ones_before_one_less_each() -> None:
    mask = causal_mask(3, 5, torch.device("cpu"))
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_without_a_mask_several_queries_are_causal() -> None:
    case = replace(LARGE, num_queries=3).case(torch.float32)
    masked = replace(case, visible=causal_mask(3, 9, torch.device("cpu")))
    for backend in BACKENDS:
        torch.testing.assert_close(case.attend(backend), masked.attend(backend), rtol=0, atol=case.tolerance())


@pytest.mark.parametrize("with_prefix", [True, False])
def test_a_tail_of_no_tokens_is_read_as_nothing(with_prefix: bool) -> None:
    case = replace(LARGE, tail=0, prompt=3000 if with_prefix else 0).case(torch.float32)
    torch.testing.assert_close(case.attend("matmul"), case.expected(), rtol=0, atol=case.tolerance())
