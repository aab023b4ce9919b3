"""Kernels: in Triton for GPUs, in C++ for CPUs (`native`). They know no cache and no policy.

Importing this package imports no Triton. Each module with kernels in it imports it at its own head, so they are
imported where they are called, once `is_available` said that they can be.
"""

# mypy: disable-error-code="import-untyped"

from importlib.util import find_spec

import torch

__all__ = ["is_available"]


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on this device: CUDA with Triton installed; a CPU only in Triton's interpreter.

    The interpreter, for tests and debugging, is chosen by TRITON_INTERPRET=1 before Triton is first imported.
    """
    if device.type not in ("cuda", "cpu") or find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return True
    from triton import knobs

    return bool(knobs.runtime.interpret)
