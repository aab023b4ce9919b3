"""Value norms of a layer's entries, beside the same in plain operations, and a product of the same operations."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.result import Result, Target
from benchmarks.settings import Settings, dtype_of
from defensivekv import Observation
from defensivekv.bench.caches import dense_entries
from defensivekv.bench.timing import interleaved, medians
from defensivekv.policies.weighting import value_norms

_OURS, _PLAIN = "value norms", "plain operations"
_PROJECTION, _PRODUCTS = "the output projection itself", "products of the heads alone"


def plain(values: Tensor, projection: Tensor) -> Tensor:
    """(h, t, v) values and a (hidden, h * g * v) projection to norms, (h, t), query head by query head."""
    h, _, v = values.shape
    blocks = projection.view(len(projection), h, -1, v)
    norms = []
    for head in range(h):
        products = (values[head] @ blocks[:, head, group].mT for group in range(blocks.shape[2]))
        norms.append(torch.stack([product.abs().sum(-1, dtype=torch.float32) for product in products]).mean(0))
    return torch.stack(norms)


@torch.inference_mode()
def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result. The floor is a product of the same operations: what the projection makes of all tokens' heads."""
    dtype, generator = dtype_of(settings.model_dtype), torch.Generator().manual_seed(0)
    h, g, v, t = settings.heads, settings.groups, settings.head_size, settings.scored
    keys, values = dense_entries(h, t, v, dtype, device, generator)
    drawn = torch.randn(settings.hidden, h * g * v, generator=generator) / (h * g * v) ** 0.5
    projection = drawn.to(device, dtype)
    row = Observation(queries=keys.repeat(1, g, 1, 1)[:, :, :1], keys=keys, values=values, output_projection=projection)
    outputs = torch.randn(t, h * g * v, generator=generator).to(device, dtype)
    projected = outputs.new_empty(t, settings.hidden)
    # Of few tokens at a time, so that what they make stays in a cache, as the norms' own do.
    step = max(1, min(t, 2**20 * torch.get_num_threads() // (g * settings.hidden))) if device.type == "cpu" else t
    weights = projection.view(settings.hidden, h, g, v).permute(1, 2, 0, 3).reshape(h, g * settings.hidden, v)
    product = outputs.new_empty(step, g * settings.hidden)

    def products() -> None:
        for head in range(h):
            for part in values[0, head].split(step):
                torch.mm(part, weights[head].mT, out=product[: len(part)])

    rivals: dict[str, Callable[[], object]] = {
        _OURS: partial(value_norms, row),
        _PLAIN: partial(plain, values[0], projection),
        _PROJECTION: partial(torch.mm, outputs, projection.mT, out=projected),
        _PRODUCTS: products,
    }
    samples = interleaved(rivals, settings.long, device)

    times = medians(samples)
    operations = 2 * t * h * g * v * settings.hidden
    figures = {
        "value norms, TFLOP/s": operations / times[_OURS] / 1e12,
        "projection, TFLOP/s": operations / times[_PROJECTION] / 1e12,
        "value norms / projection": times[_PROJECTION] / times[_OURS],
        "value norms / products": times[_PRODUCTS] / times[_OURS],
        "against plain operations": times[_PLAIN] / times[_OURS],
    }
    described = {
        "dtype": settings.model_dtype,
        "tokens": t,
        "heads": h,
        "groups": g,
        "head_size": v,
        "hidden": settings.hidden,
    }
    floor = min(times[_PROJECTION], times[_PRODUCTS])
    targets = (Target("time against a product's of the same operations", times[_OURS] / floor, at_most=1.3),)
    return [Result("value-norm", described, samples, figures, targets if settings.has_targets else ())]
