"""Value norms, without ever writing what the output projection makes of every token.

    norms[h, t] = mean over g of Σ_j |values[h, t] · projection[j, (h, g)]|        j: the hidden size

                    hidden ──▶
              ┌────┬────┬────┬────┐      one program: BLOCK_T tokens of one head under one query head's block of the
    values    │ P  │ P  │ P  │ P  │      projection, BLOCK_J of the hidden size at a time. P is a product of tensor
    BLOCK_T × ├────┼────┼────┼────┤      cores that stays in registers, is rounded, and is added up by rows. Programs
    v         │    │    │    │    │      of one block of the projection run beside each other and find it in the L2.
              └────┴────┴────┴────┘      Query heads are added up at the end, in one order whatever the tokens are.

A product of the same operations is the floor. Products are made in float32 and rounded to the values' dtype before
they are added up in float32, as those of the model itself are. Source: CriticalKV, arXiv 2502.03805, section 4.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def _absolute_sums(  # type: ignore[no-untyped-def]
    values,  # (h, t, v)
    projection,  # (hidden, h * g * v)
    sums,  # (g, h, t) float32
    num_tokens,
    hidden,
    value_head,  # strides, in elements
    value_token,
    value_channel,
    projection_hidden,
    projection_channel,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Sums of the absolute products of some tokens of one head with one query head's block of the projection."""
    head, query = tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_heads, num_groups = tl.num_programs(1), tl.num_programs(2)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    inner = tl.arange(0, CHUNK)
    line = values + head * value_head + tokens.to(tl.int64)[:, None] * value_token
    block = projection + (head * num_groups + query) * SIZE * projection_channel
    # Of all channels at once, loaded before the loop; of some at a time, again in each round.
    value = tl.load(line + inner[None, :] * value_channel, mask=is_token[:, None] & (inner < SIZE)[None, :], other=0.0)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, hidden, BLOCK_J):
        outer = first + tl.arange(0, BLOCK_J)
        is_outer = outer < hidden
        column = block + outer.to(tl.int64)[None, :] * projection_hidden
        product = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        for start in range(0, SIZE, CHUNK):
            channels = start + inner
            is_channel = channels < SIZE
            if SIZE > CHUNK:
                shown = is_token[:, None] & is_channel[None, :]
                value = tl.load(line + channels[None, :] * value_channel, mask=shown, other=0.0)
            shown = is_channel[:, None] & is_outer[None, :]
            weight = tl.load(column + channels[:, None] * projection_channel, mask=shown, other=0.0)
            product = tl.dot(value, weight, product, input_precision="ieee")
        rounded = product.to(values.dtype.element_ty).to(tl.float32)
        total += tl.sum(tl.abs(rounded), 1)
    tl.store(sums + (query * num_heads + head) * num_tokens + tokens, total, mask=is_token)


def value_norms(values: Float[Tensor, "h t v"], projection: Float[Tensor, "hidden qv"]) -> Float[Tensor, "h t"]:
    """Value norms in float32. Both of one of `DTYPES` and of any strides; query heads in order, `h * g * v` channels.

    What is held beside the result is a number for each token and query head.
    """
    (h, t, v), (hidden, channels) = values.shape, projection.shape
    g = channels // (h * v)
    sums = torch.empty(g, h, t, dtype=torch.float32, device=values.device)
    if t:
        tiles = _Tiles.of(v, values.dtype)
        # Triton launches on the current device, which need not be that of the layer.
        with torch.cuda.device_of(values):
            _absolute_sums[(triton.cdiv(t, tiles.tokens), h, g)](
                values, projection, sums, t, hidden, *values.stride(), *projection.stride(),
                SIZE=v, CHUNK=tiles.chunk, BLOCK_T=tiles.tokens, BLOCK_J=tiles.hidden,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return sums.mean(0)


@dataclass(frozen=True)
class _Tiles:
    """Of a program, powers of two: tokens, hidden size, and channels of a product at a time."""

    tokens: int
    hidden: int
    chunk: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, size: int, dtype: torch.dtype) -> "_Tiles":
        """Two programs at least fit a multiprocessor, so that one adds up while the other multiplies."""
        chunk = max(16, triton.next_power_of_2(size))
        if dtype == torch.float32:
            # Without tensor cores, operands of all channels would not fit.
            return cls(64, 64, min(chunk, 32), 8, 2)
        if chunk <= 64:
            return cls(128, 128, chunk, 4, 3)
        if chunk <= 128:
            return cls(128, 128, chunk, 8, 2)
        return cls(64, 64, min(chunk, 256), 4, 2)
