from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import defensivekv as dkv
from defensivekv import Observation
from defensivekv.policies import fused, weighting
from tests.kernels.cuda_compile import SHARED_BYTES, compile_calls
from tests.kernels.interpreter import DEVICE, needs_kernels, teach_bfloat16, without_gpu

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A layer's window: sizes in the letters of the package, n the scored tokens."""

    h: int = 2
    g: int = 2
    w: int = 4
    n: int = 50
    d: int = 64
    kernel_size: int = 5
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        queries = 2 * torch.randn(self.h * self.g, self.w, self.d, generator=generator)
        keys = torch.randn(self.h, self.n + self.w, self.d, generator=generator)
        return queries.to(DEVICE, self.dtype), keys.to(DEVICE, self.dtype)

    def sink_logits(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return 2 * torch.randn(self.h * self.g, generator=generator).to(DEVICE, self.dtype) if self.sinks else None


def reference(queries: Tensor, keys: Tensor, case: Case, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Head by head and row by row, as the method's formulas say it; float32, rounded where the model would round."""
    h, t, d = keys.shape
    q, w, _ = queries.shape
    n, group, dtype = t - w, q // h, keys.dtype
    scores, sums = torch.zeros(h, n), torch.zeros(h, n)
    for query_head in range(q):
        head = query_head // group
        scaled = (queries[query_head] * d**-0.5).float().cpu()
        for number in range(w):
            logits = (keys[head].float().cpu() @ scaled[number]).to(dtype).float()
            if case.softcap is not None:
                logits = torch.tanh(logits / case.softcap) * case.softcap
            seen = logits[: n + number + 1]
            if sinks is not None:
                seen = torch.cat((seen, sinks[query_head].float().cpu()[None]))
            weights = seen.softmax(0)[:n].to(dtype).float()
            reach = case.kernel_size // 2
            smooth = F.pad(weights, (reach, reach)).unfold(0, case.kernel_size, 1).mean(-1) if n else weights
            smooth = smooth * (weights.sum() / (smooth.sum() + 1e-12))
            scores[head] = torch.maximum(scores[head], smooth)
            sums[head] += weights
    return scores, sums


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Nearly all to the rounding of a weight, since a product that is rounded up instead of down moves a few more."""
    found = found.cpu()
    assert found.shape == expected.shape
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-9)
        return
    tight, loose = (0.02, 0.2) if dtype == torch.bfloat16 else (2e-3, 0.02)
    torch.testing.assert_close(found, expected, rtol=loose, atol=1e-5)
    near = (found - expected).abs() <= tight * expected + 1e-6
    assert near.float().mean() > 0.95 or int((~near).sum()) <= 2


def check(case: Case, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    from defensivekv.kernels.window_scores import window_scores

    teach_bfloat16()
    (queries, keys), sinks = case.queries_and_keys(), case.sink_logits()
    found = window_scores(
        change(queries),
        change(keys),
        scaling=case.d**-0.5,
        kernel_size=case.kernel_size,
        softcap=case.softcap,
        sinks=sinks,
    )
    for one, other in zip(found, reference(queries, keys, case, sinks), strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, case.dtype)


CASES = st.builds(
    Case,
    h=st.integers(1, 3),
    g=st.sampled_from([1, 2, 3, 5, 8]),
    w=st.integers(1, 7),
    n=st.integers(0, 150),
    d=st.sampled_from([3, 16, 40, 64]),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    softcap=st.sampled_from([None, 1.0, 20.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(case=CASES)
@example(case=Case(n=0))
@example(case=Case(n=1, w=1, g=1))
@example(case=Case(n=1, kernel_size=7))
@example(case=Case(n=3, kernel_size=7))
@example(case=Case(n=64 - 4, kernel_size=5))
@example(case=Case(n=2 * 60 + 1, kernel_size=5))
@example(case=Case(n=511, w=1))
@example(case=Case(n=70, kernel_size=31))
def test_scores_and_sums_are_those_of_the_formulas(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_every_head_size(d: int, dtype: torch.dtype) -> None:
    check(Case(h=1, w=3, d=d, dtype=dtype, sinks=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [1, 4, 7, 16])
def test_groups_of_every_size_fill_more_or_less_than_a_tile(g: int, dtype: torch.dtype) -> None:
    check(Case(h=1, g=g, w=9, n=70, d=16, dtype=dtype, softcap=5.0))


def test_prompts_of_several_splits() -> None:
    check(Case(h=1, g=1, w=2, n=1100, d=16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_strides(dtype: torch.dtype) -> None:
    def of_tokens_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def of_a_buffer(tensor: Tensor) -> Tensor:
        junk = torch.full((tensor.shape[0] + 1, tensor.shape[1] + 9, 2 * tensor.shape[2]), 1e4)
        buffer = junk.to(tensor.device, tensor.dtype)
        buffer[1:, 4 : 4 + tensor.shape[1], ::2] = tensor
        return buffer[1:, 4 : 4 + tensor.shape[1], ::2]

    for change in (of_tokens_first, of_a_buffer):
        check(Case(dtype=dtype, n=33), change)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_and_weights_are_rounded_as_the_model_rounds_them(dtype: torch.dtype) -> None:
    from defensivekv.kernels.window_scores import window_scores

    teach_bfloat16()
    case = Case(g=1, w=1, n=300, dtype=dtype)
    queries, keys = case.queries_and_keys()
    _, weights = window_scores(queries, keys, scaling=case.d**-0.5, kernel_size=5)
    _, expected = reference(queries, keys, case, None)
    assert (weights.cpu() == expected).float().mean() > 0.9, "to the bit, but where a sum was rounded otherwise"


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_logits_that_overflow_are_nan_and_not_lost() -> None:
    from defensivekv.kernels.window_scores import window_scores

    queries, keys = Case(h=2, dtype=torch.float16).queries_and_keys()
    keys[1, 7] = 6e4
    scores, sums = window_scores(100 * queries.abs(), keys, scaling=1.0, kernel_size=5)
    assert bool(torch.isnan(scores[1]).all())
    assert bool(torch.isnan(sums[1]).all())
    assert bool(torch.isfinite(scores[0]).all())


def _observation(dtype: torch.dtype, seed: int) -> Observation:
    h, g, w, t, d = 2, 3, 8, 150 + 7 * seed, 16
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return Observation(
        queries=2 * draw(2, h * g, w, d),
        keys=draw(2, h, t, d),
        values=draw(2, h, t, d),
        output_projection=draw(24, h * g * d),
        valid=torch.arange(t, device=DEVICE).expand(2, t) >= torch.tensor([[0], [5]], device=DEVICE),
        softcap=30.0 if seed % 2 else None,
        sinks=draw(h * g) if seed % 3 else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_with_kernels_is_what_is_kept_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16()
    policy = dkv.policy("layer-defensivekv", 0.3, window_size=8)
    asked = []

    def kept(seed: int, with_kernels: bool) -> Tensor:
        def runs_kernels(device: torch.device) -> bool:
            asked.append(device)
            return with_kernels

        monkeypatch.setattr(fused, "runs_kernels", runs_kernels)
        monkeypatch.setattr(weighting, "runs_kernels", runs_kernels)
        return policy.select([_observation(dtype, seed)])[0]

    differing = total = 0
    for seed in range(8):
        one, other = kept(seed, with_kernels=True), kept(seed, with_kernels=False)
        assert int(one.sum()) == int(other.sum())
        differing += int((one != other).sum()) // 2
        total += int(one.sum())
    assert len(asked) == 8 * 2 * 2 * 2, "scores and value norms of every row"
    # Near ties: of float32 none was seen.
    assert differing <= {torch.float32: 0, torch.float16: 2, torch.bfloat16: 0.01 * total}[dtype]


def test_other_parts_and_rows_are_asked_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from defensivekv.policies.aggregation import Defensive, Mean
    from defensivekv.policies.layout import Layout
    from defensivekv.policies.scoring import PromptAttention, WindowAttention

    row = next(iter(_observation(torch.float32, 0).rows()))
    if DEVICE.type == "cpu":
        assert fused.window_scores(row, 8, WindowAttention(), Defensive()) is None, "the interpreter is for tests"
    monkeypatch.setattr(fused, "runs_kernels", lambda _: True)
    assert fused.window_scores(row, 8, WindowAttention(), Defensive()) is not None
    assert fused.window_scores(row, 8, WindowAttention(remembers=False), Defensive()) is not None
    assert fused.window_scores(row, 8, WindowAttention(), Mean()) is None
    assert fused.window_scores(row, 8, PromptAttention(), Defensive()) is None
    assert fused.window_scores(row, 9, WindowAttention(), Defensive()) is None, "fewer queries than the window"
    assert fused.window_scores(row, 8, WindowAttention(), Defensive(33)) is None

    class Own(Defensive):
        """May do anything."""

    assert fused.window_scores(row, 8, WindowAttention(), Own()) is None
    laid_out = dkv.Observation(
        queries=row.queries, keys=row.keys, values=row.values, layout=Layout(row.num_tokens, row.num_tokens)
    )
    assert fused.window_scores(laid_out, 8, WindowAttention(), Defensive()) is None


CALLS = """
import torch
from defensivekv.kernels.window_scores import window_scores
for dtype, d in {cases}:
    for g, cap, sinks in ((4, None, None), (1, 30.0, torch.zeros(2))):
        queries = torch.zeros(2 * g, 32, d, dtype=getattr(torch, dtype))
        keys = torch.zeros(2, 1000, d, dtype=getattr(torch, dtype))
        window_scores(queries, keys, scaling=0.1, kernel_size=5, softcap=cap, sinks=sinks)
"""


def _compile(cases: list[tuple[str, int]], capability: int) -> None:
    compiled = compile_calls(CALLS.format(cases=cases), capability)
    assert len(compiled) == 3 * 2 * len(cases)
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES, kernel.name
        assert kernel.spilled <= 64, kernel.name
        assert "mma" in kernel.ptx or "fma.rn.f32" in kernel.ptx


@without_gpu
def test_it_compiles_for_a_gpu() -> None:
    _compile([("bfloat16", 128)], 90)


@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_of_it_compiles_for_a_gpu(capability: int) -> None:
    _compile(
        [(f"{name}", d) for name in ("float16", "bfloat16", "float32") for d in (64, 80, 96, 128, 256)], capability
    )
