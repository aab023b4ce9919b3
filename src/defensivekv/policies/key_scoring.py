"""Scorers that look at keys and values alone: no query is observed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.observation import Observation
from defensivekv.policies.scoring import Part


@dataclass(frozen=True)
class KeyNorm:
    """Small keys score high: `-‖k‖₂` (arXiv 2406.11430)."""

    description = "small keys"
    sees = "nothing"
    has_window = False
    gives = frozenset({"levels", "steps"})

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        yield Part(-row.keys[0].float().norm(dim=-1)[:, None, None])


@dataclass(frozen=True)
class KeyDifference:
    """Keys unlike the head's mean direction score high: `-cos(k, mean of k/‖k‖)` (KeyDiff, arXiv 2504.15364)."""

    description = "keys unlike the others"
    sees = "nothing"
    has_window = False
    gives = frozenset({"levels", "steps"})

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        keys = row.keys[0].float()
        anchor = F.normalize(keys, dim=-1).mean(1, keepdim=True)
        yield Part(-F.cosine_similarity(keys, anchor, dim=-1)[:, None, None])


@dataclass(frozen=True)
class LagRelative:
    """Entries that stand out against the partition after theirs score high (LagKV, arXiv 2504.04704).

    The tokens after the first `num_sinks` are cut into partitions of `lag_size`. Keys and values are scaled by the
    minimum and maximum of the next partition, channel by channel; an entry's deviation over the channels, softmaxed
    over its partition, of keys and values on average, gives its rank within the partition. The last whole partition
    and what follows it have none after them and stay first. A prompt of less than two partitions: the latest stay.
    """

    num_sinks: int = 4
    lag_size: int = 128
    description = "deviation against the next partition"
    sees = "nothing"
    has_window = False
    gives = frozenset({"steps"})

    def __post_init__(self) -> None:
        if self.lag_size < 2:
            raise InvalidInputError(f"lag_size {self.lag_size} must be at least 2")

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        t, h, lag = row.num_tokens, row.num_heads, self.lag_size
        # Between 1 and 2, by recency, so that which of them goes first is decided and not a tie.
        scores = 1 + torch.arange(t, dtype=torch.float32, device=row.keys.device).repeat(h, 1) / t
        scores[:, : self.num_sinks] = 2.0
        partitions = (t - self.num_sinks) // lag
        if partitions >= 2:
            stop = self.num_sinks + (partitions - 1) * lag
            spread = (self._spread(row.keys[0], partitions) + self._spread(row.values[0], partitions)) / 2
            ranks = spread.argsort(-1).argsort(-1).float() / lag
            scores[:, self.num_sinks : stop] = ranks.flatten(1)
        yield Part(scores[:, None, None])

    def _spread(self, states: Float[Tensor, "h t c"], partitions: int) -> Float[Tensor, "h p lag"]:
        h, _, channels = states.shape
        stop = self.num_sinks + partitions * self.lag_size
        parts = states[:, self.num_sinks : stop].float().reshape(h, partitions, self.lag_size, channels)
        low, high = parts[:, 1:].aminmax(dim=2, keepdim=True)
        scaled = (parts[:, :-1] - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return scaled.std(-1).softmax(-1)
