"""The kernel compiled for GPUs that are not there: what the interpreter lets pass, a compiler may not."""

import re

import pytest
import torch

from tests.kernels.cuda_compile import SHARED_BYTES, Compiled, compile_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled and run by the other tests")

CALL = """
import torch
from defensivekv.kernels.ragged_attention import Segments, ragged_attention
from defensivekv.kernels.work import Work

def call(dtype, key_size, value_size, has_all):
    b, h, g, x, capacity = (3, 2, 16, 3, 100) if has_all else (1, 2, 4, 1, 64)
    lengths, rows = [[300, 2], [0, 100]], [0, 0, 1] if has_all else [1]
    keys, values = (torch.zeros(402, size, dtype=dtype) for size in (key_size, value_size))
    ragged_attention(
        torch.zeros(b, h * g, x, key_size, dtype=dtype),
        Segments(keys, values, Work.of(lengths, rows, torch.device("cpu"))),
        *(torch.zeros(b, h, capacity, size, dtype=dtype) for size in (key_size, value_size)),
        torch.tensor(7) if has_all else 7,
        visible=torch.ones(1, 1, x, capacity, dtype=torch.bool).expand(b, h * g, -1, -1) if has_all else None,
        scaling=0.1,
        softcap=30.0 if has_all else None,
        sinks=torch.zeros(h * g) if has_all else None,
    )

"""
ALL_SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (16, 16), (3, 1)]


def _compiled(capability: int, calls: list[str]) -> list[Compiled]:
    kernels = compile_calls(CALL + "\n".join(f"call({arguments})" for arguments in calls), capability)
    assert [kernel.name for kernel in kernels] == ["attend_splits", "merge_splits"] * len(calls)
    return kernels


def _check(kernels: list[Compiled]) -> None:
    for kernel in kernels:
        assert kernel.shared < SHARED_BYTES
        assert kernel.spilled <= 64


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_within_shared_memory_and_registers(capability: int) -> None:
    kernels = _compiled(capability, ["torch.float16, 128, 128, False", "torch.float32, 256, 256, True"])
    _check(kernels)
    copies = re.findall(r"cp\.async\.c[ag].*", kernels[0].ptx)
    assert copies
    assert all("0x10" in copy for copy in copies), "keys and values come 16 bytes at a time"
    assert "mma.sync" in kernels[0].ptx, "tensor cores multiply"
    assert "tf32" not in kernels[2].ptx, "float32 is exact"


def test_it_compiles_without_prefix_and_tail() -> None:
    code = """
nothing = torch.zeros(1, 2, 0, 64, dtype=torch.bfloat16)
ragged_attention(torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16), None, nothing, nothing, 0, scaling=1)
"""
    _check(compile_calls(CALL + code, 90))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_sizes_and_dtypes_compile_within_shared_memory_and_registers(capability: int) -> None:
    calls = [
        f"{dtype}, {key_size}, {value_size}, {has_all}"
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for key_size, value_size in ALL_SIZES
        for has_all in (False, True)
    ]
    _check(_compiled(capability, calls))
