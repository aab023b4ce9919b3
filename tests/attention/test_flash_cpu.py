import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from defensivekv import InvalidInputError
from defensivekv.attention import attend, flash_cpu
from tests.attention.cases import Sizes, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=150)
@given(sizes(flash=True, hiding=False))
def test_the_flash_kernel_equals_dense_attention(dtype: torch.dtype, size: Sizes) -> None:
    case = size.case(dtype)
    output = case.attend("flash-cpu")
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), case.expected(), rtol=0, atol=case.tolerance())


def test_a_query_that_sees_nothing_of_the_tail_reads_the_prefix_alone() -> None:
    size = Sizes(0, 1, 8, 8, 2, 3, 20, [[20]], [0], None, 1.0, None, False)
    case = size.case(torch.float32)
    assert case.view is not None
    keys, values = case.tail_keys, case.tail_values
    hidden = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    output = attend(case.queries, case.view, keys, values, visible=hidden, scaling=1.0, backend="flash-cpu")
    weights = (case.queries[0, 0] @ case.view.prefix.keys.mT).softmax(-1)
    torch.testing.assert_close(output[0, 0], weights @ case.view.prefix.values, rtol=1e-5, atol=1e-6)


_EMPTY_TAIL = """
import torch
from defensivekv.attention import attend, causal_mask
from defensivekv.cache import PrefixView, RaggedPrefix
held, none = torch.randn(1, 1, 9, 8), torch.zeros(1, 1, 0, 8)
view = PrefixView(RaggedPrefix.gather(held, held, torch.ones(1, 1, 9, dtype=torch.bool)), (0,))
queries = torch.randn(1, 2, 1, 8)
output = attend(queries, view, none, none, scaling=1.0, backend="flash-cpu")
expected = (queries @ held.mT).softmax(-1) @ held
torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
assert attend(queries, None, none, none, scaling=1.0, backend="flash-cpu").abs().max() == 0
"""


def test_a_tail_of_no_tokens_is_read_as_nothing() -> None:
    # In a process of its own: the kernel ends the process when it is given no keys.
    result = subprocess.run([sys.executable, "-c", _EMPTY_TAIL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr)


def test_the_kernel_serves_cpu_tensors_of_one_head_size_without_softcap() -> None:
    queries, values = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8)
    assert flash_cpu.supports(queries, values, None)
    assert not flash_cpu.supports(queries, values, 30.0)
    assert not flash_cpu.supports(queries, torch.zeros(1, 1, 3, 4), None)
    assert not flash_cpu.supports(queries.to("meta"), values.to("meta"), None)


@pytest.mark.parametrize(("value_size", "softcap"), [(4, None), (8, 30.0)])
def test_what_the_kernel_cannot_serve_is_refused_when_it_is_asked_for(value_size: int, softcap: float | None) -> None:
    queries, keys, values = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, value_size)
    with pytest.raises(InvalidInputError, match="backend 'flash-cpu' needs CPU tensors"):
        attend(queries, None, keys, values, scaling=1.0, softcap=softcap, backend="flash-cpu")
    assert attend(queries, None, keys, values, scaling=1.0, softcap=softcap).shape == (1, 1, 1, value_size)
