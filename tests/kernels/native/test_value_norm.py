import ctypes

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.kernels.native import library, value_norm
from tests.kernels.native.library import needs_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SIZES = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 16]),
    st.integers(1, 1000),
    st.sampled_from([2, 6, 16, 34, 64, 80, 96]),
    st.sampled_from([1, 12, 63, 64, 130]),
)


def is_wide() -> bool:
    functions = library.find_library().functions
    return functions is not None and bool(functions.defensivekv_makes_value_norms())


pytestmark = [needs_library, pytest.mark.skipif(not is_wide(), reason="needs AVX-512")]


def reference(values: Tensor, projection: Tensor) -> Tensor:
    """As the formula says it, in float64."""
    h, t, v = values.shape
    blocks = projection.double().view(len(projection), h, -1, v)
    norms = [
        torch.stack([(values[head].double() @ block.mT).abs().sum(-1) for block in blocks[:, head].unbind(1)]).mean(0)
        for head in range(h)
    ]
    return torch.stack(norms).view(h, t)


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(values: Tensor, projection: Tensor) -> None:
    assert value_norm.supports(values, projection)
    found = value_norm.value_norms(values, projection)
    assert found.dtype == torch.float32
    # Of what is added up: a product of one column may cancel to next to nothing.
    error = (found.double() - reference(values, projection)).abs()
    assert (error <= 5e-7 * reference(values.abs(), projection.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(sizes=SIZES)
@example(sizes=(1, 1, 1, 2, 1))
@example(sizes=(2, 1, 6, 64, 64))
@example(sizes=(2, 2, 385, 66, 65))
@example(sizes=(3, 1, 955, 80, 1))
def test_norms_are_those_of_the_formula(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    h, g, t, v, hidden = sizes
    check(draw(dtype, h, t, v), draw(dtype, hidden, h * g * v, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    values = draw(dtype, 70, 3, 16).transpose(0, 1)
    projection = draw(dtype, 20, 2 * 3 * 2 * 16, seed=1)[:, : 3 * 2 * 16]
    check(values, projection)
    check(draw(dtype, 3, 16, 70).mT, draw(dtype, 3 * 2 * 16, 20, seed=1).mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_norm_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    values, projection = draw(dtype, 2, 500, 64), draw(dtype, 48, 2 * 2 * 64, seed=1)
    whole = value_norm.value_norms(values, projection)
    assert torch.equal(value_norm.value_norms(values[:, 130:163], projection), whole[:, 130:163])


def test_one_thread_and_several_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, projection = draw(torch.bfloat16, 3, 1000, 64), draw(torch.bfloat16, 48, 3 * 2 * 64, seed=1)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(value_norm.value_norms(values, projection))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_values_that_are_not_finite_stay_so() -> None:
    values = draw(torch.bfloat16, 1, 8, 16)
    values[0, 3, 5], values[0, 6, 0] = float("inf"), float("nan")
    norms = value_norm.value_norms(values, draw(torch.bfloat16, 10, 16, seed=1))
    assert norms[0].isfinite().tolist() == [True] * 3 + [False] + [True] * 2 + [False, True]
    assert norms[0, 6].isnan()


@pytest.mark.parametrize("size", [1, 15])
def test_odd_sizes_are_left_to_others(size: int) -> None:
    assert not value_norm.supports(draw(torch.float32, 1, 4, size), draw(torch.float32, 3, size))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_builds_without_products_of_bfloat16_and_without_threads_give_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_ATTEMPTS", (("-march=skylake-avx512",),))
    built = library._find()
    assert isinstance(built.functions, ctypes.CDLL), built.reason
    monkeypatch.setattr(value_norm, "find_library", lambda: built)
    check(draw(dtype, 2, 385, 66), draw(dtype, 65, 2 * 2 * 66, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-march=haswell", "-fopenmp"), ()])
def test_narrow_processors_are_left_to_others(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_ATTEMPTS", (flags,))
    built = library._find()
    monkeypatch.setattr(value_norm, "find_library", lambda: built)
    assert not value_norm.supports(draw(torch.float32, 1, 4, 16), draw(torch.float32, 3, 16))
