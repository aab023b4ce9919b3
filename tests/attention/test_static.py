"""The operator that compiled code calls, beside the oracle and beside `attend`."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from defensivekv import InvalidInputError
from defensivekv.attention.static import StaticReads, attend_static, check_served
from defensivekv.cache import StaticTail
from tests.attention.cases import Case, Sizes, sizes
from tests.kernels.native.library import needs_library

pytestmark = needs_library

CASE = Sizes(0, 4, 64, 48, 2, 9, 300, [[300, 0], [7, 120]], [1, 0, 1], None, 0.2, None, True)


def static_tail(case: Case, room: int) -> StaticTail:
    """The case's tail, and NaN in the room after it."""
    buffers = [
        torch.nn.functional.pad(tail, (0, 0, 0, room), value=math.nan) for tail in (case.tail_keys, case.tail_values)
    ]
    return StaticTail(buffers[0], buffers[1], torch.tensor(case.tail_keys.shape[2]))


def attend_case(case: Case, room: int = 13) -> torch.Tensor:
    assert case.view is not None
    visible = None if case.visible is None else torch.nn.functional.pad(case.visible, (0, room), value=True)
    tail, reads = static_tail(case, room), StaticReads.of(case.view)
    return attend_static(
        case.queries,
        reads,
        tail,
        visible=visible,
        scaling=case.scaling,
        softcap=case.softcap,
        sinks=case.sinks,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=50)
@given(sizes(native=True))
def test_the_operator_equals_dense_attention_and_reads_nothing_beyond_the_count(
    dtype: torch.dtype, size: Sizes
) -> None:
    case = replace(size, prompt=max(1, size.prompt)).case(dtype)
    torch.testing.assert_close(attend_case(case).float(), case.expected(), rtol=0, atol=case.tolerance())


def test_the_operator_is_registered_as_compilers_expect() -> None:
    case = CASE.case(torch.float32)
    assert case.view is not None
    reads, tail = StaticReads.of(case.view), static_tail(case, 3)
    arguments = (case.queries, reads.keys, reads.values, reads.plan, reads.sizes, tail.key_buffer, tail.value_buffer)
    torch.library.opcheck(
        torch.ops.defensivekv.ragged_attention.default,
        (*arguments, tail.count, None, case.scaling, None, case.sinks),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.usefixtures("unchecked_shapes")
def test_one_compiled_function_serves_prefixes_of_all_lengths_and_a_growing_tail() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend_static, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([[300, 5], [9, 120]], [[20, 5], [11, 299]], [[3, 250], [13, 2]]):
            case = replace(CASE, lengths=lengths, num_queries=1).case(torch.float32)
            assert case.view is not None
            tail, reads = static_tail(case, 13), StaticReads.of(case.view)
            for _ in range(3):
                held = replace(case, tail_keys=tail.keys.clone(), tail_values=tail.values.clone())
                output = compiled(case.queries, reads, tail, scaling=case.scaling, sinks=case.sinks)
                torch.testing.assert_close(output, held.attend("native"), rtol=1e-6, atol=1e-6)
                tail.write(case.tail_keys[:, :, :1], case.tail_values[:, :, :1])


def test_what_no_kernel_serves_is_refused() -> None:
    keys = torch.randn(1, 1, 9, 24)
    with pytest.raises(InvalidInputError, match=r"torch.float32 heads of 24 and 24 on cpu: .* multiples of 16"):
        check_served(keys, keys)
