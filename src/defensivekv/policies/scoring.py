"""Importance: what one observed query says of one entry."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.observation import Observation
from defensivekv.types import Importance


@runtime_checkable
class Scorer(Protocol):
    """Importances of one row's entries.

    Takes an observation of one row (batch size 1, no pads) and the window's size; gives (h, g, w, n) float32.
    `n` is the number of scored tokens: the first `n` of the row. The rest, if any, is the protected window.
    """

    def __call__(self, row: Observation, window_size: int) -> Importance: ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...


@dataclass(frozen=True)
class WindowAttention:
    """Attention weights of the observation window (SnapKV, arXiv 2404.14469, section 4).

    `A = softmax(q·kᵀ·scaling)` for the last `window_size` queries under the causal mask, the softmax in
    float32, rounded to the model's dtype as the model's own attention would be; the window's own columns
    are cut off. Raises InvalidInputError for fewer queries than the window has.
    """

    description = "attention of the last prompt tokens"

    def __call__(self, row: Observation, window_size: int) -> Importance:
        queries = row.queries[0, :, -window_size:]
        q, w, d = queries.shape
        h, t = row.num_heads, row.num_tokens
        if w < min(window_size, t):
            raise InvalidInputError(f"{w} queries do not fill the observation window of {window_size}: pass as many")
        # Scaled first: products of large keys can exceed float16 where the model's own logits do not.
        grouped = (queries * row.softmax_scaling).reshape(h, q // h * w, d)
        logits = (grouped @ row.keys[0].mT).float().view(h, q // h, w, t)
        if row.softcap is not None:
            logits = torch.tanh(logits / row.softcap) * row.softcap
        future = torch.ones(w, w, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., t - w :].masked_fill_(future, float("-inf"))
        return _softmax(logits, row.sinks)[..., : t - w].to(row.keys.dtype).float()


def _softmax(logits: Float[Tensor, "h g w t"], sinks: Float[Tensor, " q"] | None) -> Float[Tensor, "h g w t"]:
    if sinks is None:
        return logits.softmax(-1)
    h, g, w, _ = logits.shape
    sink = sinks.float().view(h, g, 1, 1).expand(h, g, w, 1)
    return torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class Recency:
    """Later tokens score higher, the first `num_sinks` highest (StreamingLLM, arXiv 2309.17453)."""

    num_sinks: int = 4
    description = "first tokens and last tokens"

    def __call__(self, row: Observation, window_size: int) -> Importance:
        t = row.num_tokens
        scores = torch.arange(t, dtype=torch.float32, device=row.keys.device) / t
        scores[: self.num_sinks] = 1.0
        return scores.expand(row.num_heads, 1, 1, t)


@dataclass(frozen=True)
class UniformRandom:
    """Independent random scores, the same for the same seed and shape: the floor of every comparison."""

    seed: int = 0
    description = "chance"

    def __call__(self, row: Observation, window_size: int) -> Importance:
        w = min(window_size, row.num_tokens)
        # The layer's content enters the seed, so that layers and prompts differ and a run repeats.
        content = int(row.keys.float().abs().sum().item() * 1e3) % 2**31
        generator = torch.Generator().manual_seed(self.seed * 2**31 + content)
        scores = torch.rand(row.num_heads, 1, 1, row.num_tokens - w, generator=generator)
        return scores.to(row.keys.device)
