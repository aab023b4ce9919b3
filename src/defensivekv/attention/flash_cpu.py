"""Partial attention by PyTorch's CPU flash kernel, which returns the log-sum-exp that merging needs.

A kernel call on one head runs on one thread, so the heads of a ragged prefix are spread over a pool of
threads; heads of one length go into a single call. A group's query heads are query rows of their
key-value head, so that its entries are read once.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.attention.partial import Partial
from defensivekv.cache import PrefixView

_THREADED_ENTRIES = 4096
_MAX_PACKED_ROWS = 64


def supports(queries: Tensor, values: Tensor, softcap: float | None) -> bool:
    """Whether the kernel can serve these tensors."""
    return queries.device.type == "cpu" and queries.shape[-1] == values.shape[-1] and softcap is None


def _kernel(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None) -> Partial:
    output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, attn_mask=mask, scale=scaling
    )
    return Partial(output, log_sum)


def tail_partial(
    queries: Float[Tensor, "b h r d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t v"],
    scaling: float,
    mask: Tensor | None,
) -> Partial:
    """Packed queries over a dense tail; mask: additive, (b or 1, h or 1, r, t), -inf where hidden; or None."""
    part = _kernel(queries, keys, values, scaling, mask)
    if mask is None:
        return part
    empty = ~torch.isfinite(part.log_sum)
    return Partial(part.output.masked_fill(empty.unsqueeze(-1), 0.0), part.log_sum.masked_fill(empty, float("-inf")))


def prefix_partial(queries: Float[Tensor, "b h r d"], view: PrefixView, scaling: float) -> Partial:
    """Packed queries over a ragged prefix."""
    prefix = view.prefix
    b, h, r, d = queries.shape
    if prefix.uniform_length and view.is_identity:
        shape = (b, h, prefix.uniform_length, d)
        return _kernel(queries, prefix.keys.view(shape), prefix.values.view(shape), scaling, None)
    output = queries.new_zeros(b, h, r, d)
    log_sum = torch.full((b, h, r), float("-inf"), dtype=torch.float32)

    def attend(source: int, head: int, readers: list[int]) -> None:
        where = prefix.segment(source, head)
        packed = queries[readers, head].view(1, 1, -1, d)
        part = _kernel(packed, prefix.keys[None, None, where], prefix.values[None, None, where], scaling, None)
        output[readers, head] = part.output.view(-1, r, d)
        log_sum[readers, head] = part.log_sum.view(-1, r)

    jobs = [
        (prefix.lengths[source][head], source, head, readers)
        for source, readers in view.sharers
        for head in range(h)
        if prefix.lengths[source][head]
    ]
    threads = torch.get_num_threads()
    small = sum(job[0] for job in jobs) < _THREADED_ENTRIES or r > _MAX_PACKED_ROWS
    if threads == 1 or len(jobs) == 1 or small:
        for _, source, head, readers in jobs:
            attend(source, head, readers)
        return Partial(output, log_sum)

    def attend_all(share: list[tuple[int, int, int, list[int]]], inference: bool) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for _, source, head, readers in share:
                attend(source, head, readers)

    shares = _balance(jobs, threads)
    inference = torch.is_inference_mode_enabled()
    others = [_pool(threads).submit(attend_all, share, inference) for share in shares[1:]]
    attend_all(shares[0], inference)
    for other in others:
        other.result()
    return Partial(output, log_sum)


def _balance(jobs: list[tuple[int, int, int, list[int]]], threads: int) -> list[list[tuple[int, int, int, list[int]]]]:
    """The jobs in `threads` shares of about equal entries: the longest first, each to the smallest share."""
    shares: list[list[tuple[int, int, int, list[int]]]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for job in sorted(jobs, key=lambda job: job[0], reverse=True):
        least = loads.index(min(loads))
        shares[least].append(job)
        loads[least] += job[0] * len(job[3])
    return shares


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="defensivekv-attention")
