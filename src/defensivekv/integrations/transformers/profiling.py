"""Measures a profile of heads for DuoAttention on a model and texts."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.model import enable, max_positions
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import Policy
from defensivekv.policies.allocation import PerHead
from defensivekv.policies.profile import HeadProfile, retrieval_shares
from defensivekv.policies.scoring import PromptAttention


class _MeasuringCache(EvictingCache):
    """Measures the prompt that it reads, and keeps all of it."""

    def __init__(self, model: PreTrainedModel, num_sinks: int, num_recent: int) -> None:
        super().__init__(model, Policy("profile", Budget.parse(1.0), PromptAttention(), PerHead()))
        self._spans = (num_sinks, num_recent)
        self.shares: list[Float[Tensor, " h"]] = []

    def decide(self, layer: EvictedLayer) -> None:
        pending, layer.pending = layer.pending, None
        tail = layer.store.tail
        assert pending is not None
        assert tail is not None
        observation = pending.observation(tail.keys, tail.values, self.policy)
        self.shares.append(retrieval_shares(observation, *self._spans).cpu())


@torch.no_grad()
def make_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_sinks: int = 64,
    num_recent: int = 256,
    advance: Callable[[], None] = lambda: None,
) -> HeadProfile:
    """The mean over the texts of what each head would lose by streaming; see `retrieval_shares`. Enables the model.

    Longer texts tell more; the time is quadratic in their length. advance: told of each text that was read.
    Raises InvalidInputError for no text, and for one that is not longer than `num_sinks + num_recent` tokens or longer
    than the model's positions, before any is read.
    """
    if not texts:
        raise InvalidInputError("no text to make a profile from: give at least one")
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    maximum = max_positions(model)
    for number, ids in enumerate(encoded, start=1):
        if len(ids) <= num_sinks + num_recent:
            raise InvalidInputError(
                f"text {number} has {len(ids)} tokens and shows nothing of heads that hold {num_sinks + num_recent}: "
                "give a longer one, or fewer sinks and recent entries"
            )
        if maximum is not None and len(ids) > maximum:
            raise InvalidInputError(f"text {number} has {len(ids)} tokens, the model {maximum} positions: shorten it")
    enable(model)
    totals: list[Tensor] = []
    for ids in encoded:
        cache = _MeasuringCache(model, num_sinks, num_recent)
        model(input_ids=torch.tensor([ids], device=model.device), use_cache=True, **{CACHE_ARGUMENT: cache})
        totals.append(torch.stack(cache.shares))
        advance()
    heads = torch.stack(totals).mean(0)
    return HeadProfile(
        tuple(tuple(round(share, 6) for share in layer) for layer in heads.tolist()),
        num_sinks,
        num_recent,
        model=str(model.config.name_or_path).rstrip("/").rpartition("/")[2],
        method=f"attention lost by streaming, mean over {len(texts)} texts",
    )
