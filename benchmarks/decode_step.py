"""A whole decoding step of a model, with transformers' own cache and with ours."""

from functools import partial

import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from defensivekv.bench.caches import filled_evicting, filled_stock
from defensivekv.bench.timing import Samples, medians, seconds
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

_STOCK, _EVICTED = "stock cache", "evicted cache"


@torch.inference_mode()
def step(model: PreTrainedModel, cache: object) -> None:
    """One token in, its logits out; the cache grows by one token."""
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model(token, use_cache=True, **{CACHE_ARGUMENT: cache})


def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result: both caches hold the same prompt, ours at the budget."""
    model = random_model(settings, device)
    generator = torch.Generator().manual_seed(0)
    stock = filled_stock(model, settings.tokens, generator)
    evicted = filled_evicting(model, settings.tokens, settings.budget, settings.tokens, generator)
    nothing = filled_evicting(model, 8, 1.0, 8, generator)
    samples: Samples = {_STOCK: [], _EVICTED: [], "no cache to speak of (8 tokens)": []}
    for repetition in range(-2, settings.medium):
        for name, cache in zip(samples, (stock, evicted, nothing), strict=True):
            # Switched in every round, outside the clock: the stock cache is read by the stock attention.
            if cache is stock:
                dkv.disable(model)
            else:
                dkv.enable(model)
            elapsed = seconds(partial(step, model, cache), device)
            if repetition >= 0:
                samples[name].append(elapsed)
    times = medians(samples)
    ratio = times[_STOCK] / times[_EVICTED]
    figures = {"evicted against stock": ratio}
    described = {
        "dtype": settings.model_dtype,
        "tokens": settings.tokens,
        "budget": settings.budget,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evicted_bytes": evicted.nbytes,
    }
    targets = (Target("decode step against the stock cache", ratio, at_least=3.3),) if settings.has_targets else ()
    return [Result("decode-step", described, samples, figures, targets if device.type == "cpu" else ())]
