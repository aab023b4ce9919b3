"""The hyperbolic tangent, for kernels that cap logits."""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """By a series where `1 - e^-2x` would cancel; libdevice's is not there in the interpreter. Within 2e-7."""
    magnitude = tl.abs(x)
    shrunk = tl.exp(-2.0 * magnitude)
    far = (1.0 - shrunk) / (1.0 + shrunk)
    square = x * x
    near = magnitude * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    )
    result = tl.where(magnitude < 0.25, near, far)
    return tl.where(x < 0, -result, result)
