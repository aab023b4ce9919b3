import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.cache import RaggedPrefix
from defensivekv.cache import prefix as prefix_module
from tests.kernels.cuda_compile import SHARED_BYTES, compile_calls
from tests.kernels.interpreter import DEVICE, needs_kernels, without_gpu

pytestmark = needs_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def dense(b: int, h: int, t: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(b, h, t, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def masks(b: int, h: int, t: int, shares: Tensor, seed: int = 0) -> Tensor:
    """Of each head, (b, h), a share of its entries."""
    drawn = torch.rand(b, h, t, generator=torch.Generator().manual_seed(seed))
    return (drawn < shares[..., None]).to(DEVICE)


def check(keys: Tensor, values: Tensor, kept: Tensor) -> None:
    """Head by head, the rows that the mask names."""
    from defensivekv.kernels.compaction import compact

    found = compact(keys, values, kept, int(kept.sum()))
    parts: list[list[Tensor]] = [[], [], []]
    offset = 0
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            tokens = [token for token, stays in enumerate(kept[row, head].tolist()) if stays]
            assert int(found.lengths[row, head]) == len(tokens)
            assert int(found.offsets[row, head]) == offset
            offset += len(tokens)
            rows = (keys[row, head, tokens], values[row, head, tokens], torch.tensor(tokens, dtype=torch.int32))
            for part, one in zip(parts, rows, strict=True):
                part.append(one.to(DEVICE))
    for one, other in zip(found[:3], parts, strict=True):
        assert torch.equal(one, torch.cat(other))


@settings(max_examples=40)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 3),
    t=st.integers(1, 200),
    sizes=st.tuples(st.sampled_from([1, 5, 16, 64]), st.sampled_from([1, 3, 64, 80])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_rows_are_those_that_the_mask_names(
    b: int, h: int, t: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Of heads, some keep nothing and some everything.
    shares = torch.tensor([0.0, 0.05, 0.5, 1.0])[torch.randint(0, 4, (b, h), generator=generator)]
    check(
        dense(b, h, t, sizes[0], dtype, seed), dense(b, h, t, sizes[1], dtype, seed + 1), masks(b, h, t, shares, seed)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_every_head_size(d: int, dtype: torch.dtype) -> None:
    kept = masks(1, 2, 67, torch.tensor([[0.3, 0.9]]))
    check(dense(1, 2, 67, d, dtype), dense(1, 2, 67, 320 - d, dtype, seed=1), kept)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything(share: float) -> None:
    check(dense(2, 2, 130, 16), dense(2, 2, 130, 8, seed=1), masks(2, 2, 130, torch.full((2, 2), share)))


def test_one_giant_head_among_tiny_ones() -> None:
    t = 2500
    check(dense(1, 4, t, 4), dense(1, 4, t, 4, seed=1), masks(1, 4, t, torch.tensor([[0.001, 1.0, 0.0, 0.002]])))


def test_rows_of_the_batch_that_keep_nothing() -> None:
    shares = torch.tensor([[0.0, 0.0], [0.4, 0.1], [0.0, 0.0]])
    check(dense(3, 2, 70, 8), dense(3, 2, 70, 8, seed=1), masks(3, 2, 70, shares))


def test_tensors_of_any_strides() -> None:
    t, shares = 90, torch.tensor([[0.2, 0.7, 0.0], [0.5, 1.0, 0.1]])
    keys = dense(2, t, 3, 16).transpose(1, 2)
    values = dense(2, 3, 2 * t, 32, seed=1)[:, :, 11 : 11 + t, ::2]
    kept = masks(2, 3, t, shares)
    check(keys, values, kept.transpose(1, 2).contiguous().transpose(1, 2))
    check(keys[:, :1], values[:, :1], kept[:, :1])
    check(keys[:1].expand(2, -1, -1, -1), values, kept)


def test_of_too_many_the_first_are_copied_and_lengths_say_so() -> None:
    from defensivekv.kernels.compaction import compact

    keys, values = dense(1, 3, 100, 8), dense(1, 3, 100, 8, seed=1)
    kept = masks(1, 3, 100, torch.tensor([[0.5, 0.5, 0.5]]))
    first, second, _ = kept.sum(-1)[0].tolist()
    total = first + second // 2
    found = compact(keys, values, kept, total)
    assert found.lengths.tolist() == [[first, second // 2, 0]]
    assert found.offsets.tolist() == [[0, first, total]]
    assert torch.equal(found.keys, keys[kept][:total])


def test_of_too_few_what_is_held_is_right() -> None:
    from defensivekv.kernels.compaction import compact

    keys, values = dense(1, 2, 100, 8), dense(1, 2, 100, 8, seed=1)
    kept = masks(1, 2, 100, torch.tensor([[0.5, 0.5]]))
    count = int(kept.sum())
    found = compact(keys, values, kept, count + 7)
    assert len(found.keys) == count + 7
    assert int(found.lengths.sum()) == count
    assert torch.equal(found.values[:count], values[kept])


def test_a_prefix_is_the_same_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = dense(2, 3, 120, 16), dense(2, 3, 120, 8, seed=1)
    kept = masks(2, 3, 120, torch.tensor([[0.1, 0.9, 0.0], [0.3, 1.0, 0.2]]))
    prefixes = []
    for with_kernel in (True, False):
        monkeypatch.setattr(prefix_module, "runs_kernels", lambda _, answer=with_kernel: answer)
        prefixes.append(RaggedPrefix.gather(keys, values, kept))
    one, other = prefixes
    assert one.lengths == other.lengths
    assert one.positions.dtype == other.positions.dtype == torch.int32
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(one, name), getattr(other, name))


CALLS = """
import torch
from defensivekv.kernels.compaction import compact
for dtype, d in {cases}:
    entries = torch.zeros(2, 2, 1000, d, dtype=getattr(torch, dtype))
    compact(entries, entries, torch.ones(2, 2, 1000, dtype=torch.bool), 100)
"""


@without_gpu
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_a_gpu(capability: int) -> None:
    cases = [("float32", 256), ("bfloat16", 80), ("bfloat16", 128)]
    compiled = compile_calls(CALLS.format(cases=cases), capability)
    assert len(compiled) == 2 * len(cases)
    for kernel in compiled:
        assert kernel.shared <= SHARED_BYTES
        assert kernel.spilled == 0
    assert all("ld.global.v4" in kernel.ptx for kernel in compiled[1::2]), "sixteen bytes at a time"
