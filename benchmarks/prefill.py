"""What scoring and compaction add to a prefill."""

from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from benchmarks.timing import Samples, medians, seconds
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

_POLICIES = ("snapkv", "layer-defensivekv")
_TARGETED = "layer-defensivekv"


class TimedCache(dkv.EvictingCache):
    """Adds up the wall time of its decisions: scoring, selection and compaction."""

    decided_s = 0.0

    def decide(self, layer: EvictedLayer) -> None:
        """As the base class, timed."""
        self.decided_s += seconds(lambda: super(TimedCache, self).decide(layer), layer.store.tail.keys.device)  # type: ignore[union-attr]


@torch.inference_mode()
def _prefill(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> None:
    model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})


def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result: the stock prefill, the prefill with eviction, and the decisions' share of it."""
    model = random_model(settings, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, settings.prompt), generator=generator).to(device)
    samples: Samples = {"stock prefill": []}
    for policy in _POLICIES:
        samples |= {f"prefill with {policy}": [], f"of it scoring and compaction ({policy})": []}

    def timed(call: Callable[[], object], name: str, count: bool) -> None:
        elapsed = seconds(call, device)
        if count:
            samples[name].append(elapsed)

    for repetition in range(-1, settings.long):
        count = repetition >= 0
        dkv.disable(model)
        timed(lambda: _prefill(model, ids, DynamicCache(config=model.config)), "stock prefill", count)
        dkv.enable(model)
        for policy in _POLICIES:
            cache = TimedCache(model, policy, settings.budget)
            timed(lambda cache=cache: _prefill(model, ids, cache), f"prefill with {policy}", count)  # type: ignore[misc]
            if count:
                samples[f"of it scoring and compaction ({policy})"].append(cache.decided_s)

    times = medians(samples)
    stock = times["stock prefill"]
    figures = {}
    for policy in _POLICIES:
        figures[f"scoring and compaction / stock prefill ({policy})"] = (
            times[f"of it scoring and compaction ({policy})"] / stock
        )
        figures[f"prefill against stock, less one ({policy})"] = times[f"prefill with {policy}"] / stock - 1
    described = {
        "dtype": settings.model_dtype,
        "prompt": settings.prompt,
        "budget": settings.budget,
        "layers": model.config.num_hidden_layers,
    }
    share = figures[f"scoring and compaction / stock prefill ({_TARGETED})"]
    target = Target("scoring and compaction's share of the prefill", share, at_most=0.09)
    is_held = settings.has_targets and device.type == "cpu"
    return [Result("prefill", described, samples, figures, (target,) if is_held else ())]
