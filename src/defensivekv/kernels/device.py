"""Where kernels in Triton are used by themselves."""

import torch

from defensivekv.kernels import is_available


def runs_kernels(device: torch.device) -> bool:
    """Whether they are used on this device without being asked for: on CUDA, since the interpreter is for tests."""
    return device.type == "cuda" and is_available(device)
