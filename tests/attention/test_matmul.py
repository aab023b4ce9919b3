import pytest
import torch
from hypothesis import given, settings

from defensivekv.attention import matmul
from tests.attention.cases import Sizes, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=150)
@given(sizes())
def test_matrix_products_equal_dense_attention(dtype: torch.dtype, size: Sizes) -> None:
    case = size.case(dtype)
    output = case.attend("matmul")
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), case.expected(), rtol=0, atol=case.tolerance())


@settings(max_examples=50)
@given(sizes())
def test_some_queries_at_a_time_give_the_same(size: Sizes) -> None:
    case = size.case(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "_CHUNK_ELEMENTS", 1)
        output = case.attend("matmul")
    torch.testing.assert_close(output, case.attend("matmul"), rtol=0, atol=case.tolerance())


def test_softcaps_are_applied_before_the_mask() -> None:
    queries, keys, values = torch.full((1, 1, 4), 100.0), torch.ones(1, 3, 4), torch.tensor([[[1.0], [2.0], [4.0]]])
    visible = torch.tensor([[[True, True, False]]])
    output, log_sum = matmul.entries_partial(queries, keys, values, 1.0, 5.0, visible)
    assert float(output) == pytest.approx(1.5)
    assert float(log_sum) == pytest.approx(5.0 + 0.6931472)
