"""Where kernels are tried: on DEFENSIVEKV_TEST_DEVICE, or on a CPU in Triton's interpreter, taught some arithmetic."""

# mypy: disable-error-code="import-untyped"

import os
from typing import Any

import numpy as np
import pytest
import torch

from defensivekv.kernels import is_available

DEVICE = torch.device(os.environ.get("DEFENSIVEKV_TEST_DEVICE", "cpu"))

needs_kernels = pytest.mark.skipif(not is_available(DEVICE), reason="no Triton for this device (TRITON_INTERPRET=1?)")

without_gpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled by the other tests, for the GPU that there is")


def teach_bfloat16() -> None:
    """Makes the interpreter calculate in bfloat16 as a GPU does.

    Up to Triton 3.7 it multiplies matrices of the bits as if they were integers, and cuts off where it should round.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if DEVICE.type != "cpu" or hasattr(InterpreterBuilder, "knows_bfloat16"):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, handle: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16 or handle.dtype.scalar == tl.bfloat16:
            return cast(self, handle, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(handle.data, np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dtype.scalar)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return dot(self, widened(left), widened(right), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.knows_bfloat16 = True
