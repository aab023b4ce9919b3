"""The kernel compiled for GPUs that are not there: what the interpreter lets pass, a compiler may not."""

import re

import pytest
import torch

from tests.kernels.cuda_compile import SHARED_BYTES, Compiled, compile_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled and run by the other tests")

CALL = """
import torch
from defensivekv.cache import PageLayout, PageTable
from defensivekv.kernels import paged_attention as module

def call(dtype, size, most_queries, splits, packed_layers):
    module.num_splits = lambda *_: splits
    heads, group, r, x = 8, 4, 3, most_queries + 2
    layout = PageLayout(heads, 16, 256, 25600, packed_layers=packed_layers)
    blocks, kept, tokens, first_query, starts = (
        torch.zeros(shape, dtype=torch.int32) for shape in ((r, 7), r, r, r + 1, (r, heads + 1))
    )
    module.paged_attention(
        torch.zeros(x, heads * group, size, dtype=dtype),
        torch.zeros(256, size, dtype=dtype),
        layout,
        1,
        PageTable(blocks, kept, tokens, first_query, most_queries),
        starts,
        scaling=0.1,
    )

"""
ALL_SIZES = [3, 64, 80, 128, 256]


def _compiled(capability: int, calls: list[str]) -> list[Compiled]:
    """Kernels of calls with more than one split: two of each."""
    kernels = compile_calls(CALL + "\n".join(f"call({arguments})" for arguments in calls), capability)
    assert [kernel.name for kernel in kernels] == ["_attend_chunks", "_merge_chunks"] * len(calls)
    return kernels


def _check(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.shared < SHARED_BYTES
        assert kernel.spilled <= 64


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_within_shared_memory_and_registers(capability: int) -> None:
    kernels = _compiled(capability, ["torch.bfloat16, 128, 1, 5, 1", "torch.float32, 256, 70, 5, 3"])
    _check(kernels)
    copies = re.findall(r"cp\.async\.c[ag].*", kernels[0].ptx)
    # The rest are numbers of blocks.
    assert sum("0x10" in copy for copy in copies) > len(copies) / 2, "keys and values come 16 bytes at a time"
    assert "mma.sync" in kernels[0].ptx, "tensor cores multiply"
    assert "tf32" not in kernels[2].ptx, "float32 is exact"


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_a_merge(capability: int) -> None:
    kernels = compile_calls(CALL + "call(torch.float16, 128, 70, 1, 2)", capability)
    assert [kernel.name for kernel in kernels] == ["_attend_chunks"]
    _check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_sizes_and_dtypes_compile_within_shared_memory_and_registers(capability: int) -> None:
    calls = [
        f"{dtype}, {size}, {most_queries}, 5, {packed_layers}"
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for size in ALL_SIZES
        for most_queries in (1, 8, 70)
        for packed_layers in (1, 3)
    ]
    _check(_compiled(capability, calls))
