import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from defensivekv import InvalidInputError
from defensivekv.attention import attend, masked_attention, native, scatter_prefix
from defensivekv.cache import PrefixView, RaggedPrefix
from tests.attention.cases import Sizes, sizes
from tests.kernels.native.library import needs_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

pytestmark = needs_library


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=200)
@given(sizes(native=True))
def test_the_kernel_equals_dense_attention(dtype: torch.dtype, size: Sizes) -> None:
    case = size.case(dtype)
    output = case.attend("native")
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), case.expected(), rtol=0, atol=case.tolerance())


@pytest.mark.usefixtures("two_threads")
@settings(max_examples=50)
@given(sizes(native=True))
def test_threads_share_the_work_and_change_nothing_beyond_rounding(size: Sizes) -> None:
    case = replace(size, prompt=max(size.prompt, 700), lengths=[[700, 0, 3]] * 3, rows=[0, 2, 1, 1]).case(torch.float32)
    torch.testing.assert_close(case.attend("native"), case.expected(), rtol=0, atol=case.tolerance())


def read(
    lengths: list[list[int]], *, group: int, size: int, dtype: torch.dtype, rows: list[int], tail: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's and the oracle's outputs of one query for each row."""
    h, t, b = len(lengths[0]), max(map(max, lengths)), len(rows)
    kept = torch.arange(t) < torch.tensor(lengths)[..., None]
    keys, values = (torch.randn(*kept.shape, size).to(dtype) for _ in range(2))
    view = PrefixView(RaggedPrefix.gather(keys, values, kept), tuple(rows))
    queries = torch.randn(b, h * group, 1, size).to(dtype)
    tails = [torch.randn(b, h, tail, size).to(dtype) for _ in range(2)]
    output = attend(queries, view, *tails, scaling=size**-0.5, backend="native")
    dense_keys, dense_values, there = scatter_prefix(view, t)
    visible = torch.cat((there, there.new_ones(b, h, tail)), -1)[:, :, None]
    expected = masked_attention(
        queries, torch.cat((dense_keys, tails[0]), 2), torch.cat((dense_values, tails[1]), 2), visible, size**-0.5
    )
    return output.float(), expected


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_one_giant_head_among_tiny_and_empty_ones(dtype: torch.dtype, size: int, group: int) -> None:
    torch.manual_seed(group)
    output, expected = read([[5000, 0, 1, 33], [0, 0, 0, 31]], group=group, size=size, dtype=dtype, rows=[0, 1])
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_forks_of_one_prefix(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, expected = read([[900, 40]], group=4, size=64, dtype=dtype, rows=[0] * 64)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCES[dtype])


def test_a_batch_of_many_rows_without_a_prefix_is_read_from_its_tails() -> None:
    queries, keys, values = (torch.randn(16, heads, n, 64) for heads, n in ((8, 1), (2, 9), (2, 9)))
    output = attend(queries, None, keys, values, scaling=0.1, backend="native")
    expected = masked_attention(queries, keys, values, torch.ones(16, 2, 1, 9, dtype=torch.bool), 0.1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_beyond_a_head_or_the_used_part_of_a_tail(dtype: torch.dtype) -> None:
    """What lies there is NaN, and one NaN that was read would show."""
    size = Sizes(0, 2, 64, 64, 1, 5, 50, [[33, 7]], [0], None, 0.2, None, False)
    case = size.case(dtype)
    assert case.view is not None
    prefix = case.view.prefix
    around = [torch.full((len(held) + 200, 64), math.nan, dtype=dtype) for held in (prefix.keys, prefix.values)]
    inside = [buffer[100:-100].copy_(held) for buffer, held in zip(around, (prefix.keys, prefix.values), strict=True)]
    tails = [torch.full((1, 2, 64, 64), math.nan, dtype=dtype) for _ in range(2)]
    for buffer, held in zip(tails, (case.tail_keys, case.tail_values), strict=True):
        buffer[:, :, :5] = held
    view = PrefixView(replace(prefix, keys=inside[0], values=inside[1]), (0,))
    hidden = replace(case, view=view, tail_keys=tails[0][:, :, :5], tail_values=tails[1][:, :, :5])
    assert torch.equal(hidden.attend("native"), case.attend("native"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_that_is_read_is_not_hidden(dtype: torch.dtype) -> None:
    case = Sizes(0, 2, 64, 64, 1, 5, 50, [[33, 7]], [0], None, 0.2, None, False).case(dtype)
    case.tail_keys[0, 0, 2, 5] = math.nan
    output = case.attend("native")
    assert bool(output[0, :2].isnan().all())
    assert bool(output[0, 2:].isfinite().all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_logits_of_any_size_give_finite_outputs(scale: float) -> None:
    case = Sizes(0, 4, 64, 64, 1, 5, 300, [[300, 17]], [0], None, 1.0, None, False).case(torch.float32)
    large = replace(case, queries=case.queries * scale)
    expected = large.expected()
    torch.testing.assert_close(large.attend("native"), expected, rtol=1e-3, atol=1e-3 if scale > 1 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_half_precision_type_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers)).view(1, -1, 1, 64)
    h = numbers.shape[1]
    # One entry with all the weight: the output is its value.
    output = attend(numbers, None, torch.zeros_like(numbers), numbers, scaling=1.0, backend="native")
    assert torch.equal(output, numbers), h


def test_the_result_is_the_same_every_time() -> None:
    case = Sizes(0, 4, 128, 128, 1, 5, 3000, [[3000, 17], [1, 999]], [0, 1], None, 0.1, None, False).case(
        torch.bfloat16
    )
    first = case.attend("native")
    assert all(torch.equal(case.attend("native"), first) for _ in range(5))


def test_what_the_kernel_cannot_serve_is_refused_when_it_is_asked_for_and_served_otherwise() -> None:
    odd = Sizes(0, 2, 24, 24, 1, 3, 20, [[20]], [0], None, 0.2, None, False)
    many = replace(odd, key_size=64, value_size=64, num_queries=40, tail=40)
    for case in (odd.case(torch.float32), many.case(torch.float32), odd.case(torch.float64)):
        with pytest.raises(
            InvalidInputError, match="backend 'native' cannot serve these tensors: the CPU kernel needs"
        ):
            case.attend("native")
        assert case.attend("auto").shape == case.queries.shape
    meta = torch.zeros(1, 2, 1, 64, device="meta")
    assert not native.supports(meta, meta, meta)


_WITHOUT = """
import torch
from defensivekv.attention import attend
from defensivekv.errors import InvalidInputError
from defensivekv.kernels.native import find_library
queries = torch.randn(1, 4, 1, 64)
keys = torch.randn(1, 2, 9, 64)
output = attend(queries, None, keys, keys, scaling=0.1)
expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, scale=0.1, enable_gqa=True)
torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
try:
    attend(queries, None, keys, keys, scaling=0.1, backend="native")
except InvalidInputError as error:
    print(error)
print(find_library().reason)
"""


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("DEFENSIVEKV_NATIVE", "0", "switched off by DEFENSIVEKV_NATIVE=0"),
        ("CXX", "no-such-compiler", "no C++ compiler"),
        ("CXX", "false", "not compiled"),
    ],
)
def test_without_the_library_everything_works_and_says_why(variable: str, value: str, reason: str) -> None:
    environment = os.environ | {variable: value}
    run = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(reason) == 2
    assert run.stderr == ""
