"""Value norms on CPUs with wide registers, their products never written."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.kernels.native.library import DTYPES, find_library


class _Arguments(ctypes.Structure):
    """`ValueNorms` of value_norm.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "threads", "heads", "group", "tokens", "size", "hidden")),
        ("values", c_void_p),
        ("value_strides", c_int64 * 2),
        ("projection", c_void_p),
        ("projection_stride", c_int64),
        ("norms", c_void_p),
    ]


def supports(values: Tensor, projection: Tensor) -> bool:
    """Whether `value_norms` serves these; compiles it if need be. Without AVX-512 it is not there."""
    if values.device.type != "cpu" or values.dtype not in DTYPES or values.dtype != projection.dtype:
        return False
    functions = find_library().functions
    return functions is not None and bool(functions.defensivekv_makes_value_norms()) and values.shape[-1] % 2 == 0


def value_norms(values: Float[Tensor, "h t v"], projection: Float[Tensor, "j hgv"]) -> Float[Tensor, "h t"]:
    """`mean over g of ‖values[h, t] · projection[:, (h, g)]‖₁` in float32, of tensors that `supports` agreed to.

    Products are made and added up in float32.
    """
    (h, t, v), (hidden, columns) = values.shape, projection.shape
    values, projection = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (values, projection))
    norms = torch.empty(h, t, dtype=torch.float32)
    call = _Arguments(
        dtype=DTYPES[values.dtype],
        threads=torch.get_num_threads(),
        heads=h,
        group=columns // (h * v),
        tokens=t,
        size=v,
        hidden=hidden,
        values=values.data_ptr(),
        value_strides=values.stride()[:2],
        projection=projection.data_ptr(),
        projection_stride=projection.stride(0),
        norms=norms.data_ptr(),
    )
    functions = find_library().functions
    assert functions is not None
    if functions.defensivekv_value_norms(ctypes.byref(call)):
        raise MemoryError("no memory for the packed output projection")
    return norms
