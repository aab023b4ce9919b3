"""What scoring and compaction add to a prefill."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from benchmarks.models import random_model
from benchmarks.result import Result, Target
from benchmarks.settings import Settings
from defensivekv import Observation
from defensivekv.bench.timing import Samples, medians, seconds
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import weighting
from defensivekv.policies.weighting import value_norms

_POLICY = "layer-defensivekv"
_STOCK, _EVICTING = "stock prefill", f"prefill with {_POLICY}"
_DECIDING, _NORMS = "of it scoring and compaction", "of that value norms"
_PROJECTION = "one more output projection in each layer"


class TimedCache(dkv.EvictingCache):
    """Adds up the wall time of its decisions: scoring, selection and compaction."""

    decided_s = 0.0

    def decide(self, layer: EvictedLayer) -> None:
        """As the base class, timed."""
        tail = layer.store.tail
        assert tail is not None
        self.decided_s += seconds(partial(super().decide, layer), tail.keys.device)


@contextmanager
def timed_norms(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each call for value norms inside."""
    found: list[float] = []
    norms: list[Tensor] = []

    def call(row: Observation) -> Tensor:
        found.append(seconds(lambda: norms.append(value_norms(row)), device))
        return norms.pop()

    with patch.object(weighting, "value_norms", call):
        yield found


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
    weights = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    outputs = torch.randn(settings.prompt, weights[0].shape[1], generator=generator).to(device, weights[0].dtype)
    samples: Samples = {name: [] for name in (_STOCK, _EVICTING, _DECIDING, _NORMS, _PROJECTION)}
    for repetition in range(-1, settings.long):
        dkv.disable(model)
        stock = seconds(partial(_prefill, model, ids, DynamicCache(config=model.config)), device)
        dkv.enable(model)
        cache = TimedCache(model, _POLICY, settings.budget)
        with timed_norms(device) as norms:
            evicting = seconds(partial(_prefill, model, ids, cache), device)
        projection = seconds(lambda: [outputs @ weight.mT for weight in weights], device)
        if repetition >= 0:
            elapsed = (stock, evicting, cache.decided_s, sum(norms), projection)
            for name, taken in zip(samples, elapsed, strict=True):
                samples[name].append(taken)

    times = medians(samples)
    # Within the same run, which the same neighbours disturbed.
    runs = list(zip(*(samples[name] for name in (_EVICTING, _DECIDING, _NORMS, _PROJECTION)), strict=True))
    share = median(deciding / (evicting - deciding) for evicting, deciding, _, _ in runs)
    others = median((deciding - norms) / (evicting - deciding) for evicting, deciding, norms, _ in runs)
    floor = median(norms / projection for _, _, norms, projection in runs)
    figures = {
        "scoring and compaction / rest of the same prefill": share,
        "all of it but value norms / rest of the same prefill": others,
        "the floor: a projection / rest of the same prefill": median(
            projection / (evicting - deciding) for evicting, deciding, _, projection in runs
        ),
        "value norms / projection": floor,
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
    targets = (
        Target("value norms against one more output projection", floor, at_most=1.3),
        Target("everything else in scoring and compaction, of the prefill", others, at_most=0.01),
    )
    return [Result("prefill", described, samples, figures, targets if settings.has_targets else ())]
