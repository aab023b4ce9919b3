"""What scoring and compaction add to a prefill."""

from dataclasses import replace
from functools import partial
from statistics import median

import torch
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from defensivekv.bench.timing import Samples, medians, seconds
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

_POLICY = "layer-defensivekv"
_STOCK, _EVICTING, _DECIDING = "stock prefill", f"prefill with {_POLICY}", "of it scoring and compaction"


class TimedCache(dkv.EvictingCache):
    """Adds up the wall time of its decisions: scoring, selection and compaction."""

    decided_s = 0.0

    def decide(self, layer: EvictedLayer) -> None:
        """As the base class, timed."""
        tail = layer.store.tail
        assert tail is not None
        self.decided_s += seconds(partial(super().decide, layer), tail.keys.device)


@torch.inference_mode()
def _prefill(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> None:
    model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})


def run(settings: Settings, device: torch.device) -> list[Result]:
    """One result: the stock prefill, the prefill with eviction, and the decisions' share of it.

    On the first `prefill_layers` of the model: its layers are alike, and all cost what one costs.
    """
    shortened = replace(settings, model=(*settings.model, ("num_hidden_layers", settings.prefill_layers)))
    model = random_model(shortened, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, settings.prompt), generator=generator).to(device)
    samples: Samples = {_STOCK: [], _EVICTING: [], _DECIDING: []}
    for repetition in range(-1, settings.long):
        dkv.disable(model)
        stock = seconds(partial(_prefill, model, ids, DynamicCache(config=model.config)), device)
        dkv.enable(model)
        cache = TimedCache(model, _POLICY, settings.budget)
        evicting = seconds(partial(_prefill, model, ids, cache), device)
        if repetition >= 0:
            for name, elapsed in zip(samples, (stock, evicting, cache.decided_s), strict=True):
                samples[name].append(elapsed)

    times = medians(samples)
    # Against the rest of the same run, which the same neighbours disturbed.
    pairs = zip(samples[_DECIDING], samples[_EVICTING], strict=True)
    share = median(deciding / (evicting - deciding) for deciding, evicting in pairs)
    figures = {
        "scoring and compaction / rest of the same prefill": share,
        "scoring and compaction / stock prefill": times[_DECIDING] / times[_STOCK],
        "prefill against stock, less one": times[_EVICTING] / times[_STOCK] - 1,
    }
    described = {
        "dtype": settings.model_dtype,
        "prompt": settings.prompt,
        "budget": settings.budget,
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "heads": f"{model.config.num_attention_heads} on {model.config.num_key_value_heads}",
    }
    target = Target("scoring and compaction's share of the prefill", share, at_most=0.09)
    is_held = settings.has_targets and device.type == "cpu"
    return [Result("prefill", described, samples, figures, (target,) if is_held else ())]
