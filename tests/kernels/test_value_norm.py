import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv import Observation
from defensivekv.policies import weighting
from tests.kernels.cuda_compile import SHARED_BYTES, compile_calls
from tests.kernels.interpreter import DEVICE, needs_kernels, teach_bfloat16, without_gpu

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def reference(values: Tensor, projection: Tensor) -> Tensor:
    """Head by head, as the formula says it; float32, products rounded as the model would round them."""
    (h, t, v), dtype = values.shape, values.dtype
    g = projection.shape[1] // (h * v)
    values, projection, norms = values.float().cpu(), projection.float().cpu(), torch.zeros(h, t)
    for query_head in range(h * g):
        product = values[query_head // g] @ projection[:, query_head * v : (query_head + 1) * v].T
        norms[query_head // g] += product.to(dtype).float().abs().sum(-1) / g
    return norms


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(values: Tensor, projection: Tensor) -> None:
    from defensivekv.kernels.value_norm import value_norms

    teach_bfloat16()
    found = value_norms(values, projection)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), reference(values, projection), rtol=TOLERANCES[values.dtype], atol=1e-6)


SIZES = st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 16]),
    st.integers(1, 140),
    st.sampled_from([1, 5, 16, 33, 64]),
    st.sampled_from([1, 12, 64, 130]),
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12)
@given(sizes=SIZES)
@example(sizes=(1, 1, 1, 1, 1))
@example(sizes=(2, 1, 128, 64, 128))
@example(sizes=(2, 2, 129, 65, 129))
def test_norms_are_those_of_the_formula(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    h, g, t, v, hidden = sizes
    check(draw(dtype, h, t, v), draw(dtype, hidden, h * g * v, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [64, 80, 96, 128, 256])
def test_every_head_size(v: int, dtype: torch.dtype) -> None:
    check(draw(dtype, 2, 70, v), draw(dtype, 40, 2 * 2 * v, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_strides(dtype: torch.dtype) -> None:
    values, projection = draw(dtype, 2, 31, 48), draw(dtype, 50, 2 * 3 * 48, seed=1)
    buffer = torch.full((3, 60, 2 * 48), 1e4).to(DEVICE, dtype)
    buffer[1:, 7:38, ::2] = values
    of_tokens_first = values.transpose(0, 1).contiguous().transpose(0, 1)
    for changed in (of_tokens_first, buffer[1:, 7:38, ::2]):
        check(changed, projection)
    check(values, projection.T.contiguous().T)


def test_a_token_scores_the_same_in_whatever_company() -> None:
    from defensivekv.kernels.value_norm import value_norms

    values, projection = draw(torch.float32, 1, 200, 64), draw(torch.float32, 130, 2 * 64, seed=1)
    whole = value_norms(values, projection)
    # In the interpreter, NumPy multiplies, and some of its kernels round a row by where it stands.
    rtol = 0.0 if DEVICE.type == "cuda" else 1e-6
    torch.testing.assert_close(value_norms(values[:, 130:163], projection), whole[:, 130:163], rtol=rtol, atol=0)


def test_no_tokens_have_no_norms() -> None:
    from defensivekv.kernels.value_norm import value_norms

    assert value_norms(draw(torch.float32, 2, 0, 8), draw(torch.float32, 4, 32)).shape == (2, 0)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_products_that_overflow_are_infinite_as_in_the_model() -> None:
    from defensivekv.kernels.value_norm import value_norms

    values = draw(torch.float16, 1, 3, 8)
    values[0, 1] = 6e4
    norms = value_norms(values, torch.ones(4, 8, dtype=torch.float16, device=DEVICE))
    assert torch.isinf(norms[0]).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weighting_measures_the_same_with_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16()
    values = draw(dtype, 1, 2, 90, 64)
    row = Observation(
        queries=draw(dtype, 1, 6, 1, 64),
        keys=values,
        values=values,
        output_projection=draw(torch.float32, 50, 6 * 64),
    )
    measured = []
    for with_kernel in (True, False):
        monkeypatch.setattr(weighting, "runs_kernels", lambda _, answer=with_kernel: answer)
        measured.append(weighting.value_norms(row))
    torch.testing.assert_close(*measured, rtol=TOLERANCES[dtype], atol=1e-6)


CALLS = """
import torch
from defensivekv.kernels.value_norm import value_norms
for dtype, v in {cases}:
    values, projection = (torch.zeros(*shape, dtype=getattr(torch, dtype)) for shape in ((2, 500, v), (2048, 8 * v)))
    value_norms(values, projection)
"""


def _compile(cases: list[tuple[str, int]], capability: int) -> None:
    compiled = compile_calls(CALLS.format(cases=cases), capability)
    assert len(compiled) == len(cases)
    for (dtype, _), kernel in zip(cases, compiled, strict=True):
        assert kernel.shared <= SHARED_BYTES, dtype
        assert kernel.spilled <= 64, dtype
        assert ("mma" in kernel.ptx) == (dtype != "float32"), "tensor cores, but not in TF32"


@without_gpu
def test_it_compiles_for_a_gpu() -> None:
    _compile([("bfloat16", 64), ("float32", 64)], 90)


@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_of_it_compiles_for_a_gpu(capability: int) -> None:
    _compile([(name, v) for name in ("float16", "bfloat16", "float32") for v in (64, 80, 96, 128, 256)], capability)
