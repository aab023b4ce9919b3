"""A policy: the frozen composition of scoring, aggregation, weighting, allocation and a budget."""

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.budget import Budget, entry_bytes
from defensivekv.errors import BudgetError, InvalidInputError
from defensivekv.policies.aggregation import Aggregation, Mean
from defensivekv.policies.allocation import Allocation
from defensivekv.policies.observation import Observation
from defensivekv.policies.scoring import Scorer
from defensivekv.policies.weighting import Weighting
from defensivekv.types import Kept, LayerScores

SHORT_PROMPT_WINDOWS = 8
"""A prompt shorter than this many windows is kept whole where its budget is below the window."""

_HEAD_CHUNK_ELEMENTS = 2**19
"""Importances at a time on a CPU, where they should stay in the cache between the passes over them."""

_HEAD_CHUNK_ELEMENTS_GPU = 2**26


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt. Immutable: a policy can be shared by any number of caches and threads.

    name: the preset's name, or one of your own. budget: see `Budget`.
    scorer, aggregation, weighting, allocation: the parts; each has its own module.
    window_size: the observation window, the last tokens of the prompt.
    protect_window: the window's entries always stay (True), or compete with the layer's maximum score as in
        the authors' code (False: parity mode), where a tight budget can take a whole layer's window.
    paper: address of the paper.
    """

    name: str
    budget: Budget
    scorer: Scorer
    allocation: Allocation
    aggregation: Aggregation = field(default_factory=Mean)
    weighting: Weighting | None = None
    window_size: int = 32
    protect_window: bool = True
    paper: str = ""

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise InvalidInputError(f"window_size {self.window_size} must be at least 1")
        if self.budget.kind == "entries" and self.budget.amount < self.window_size:
            raise BudgetError(
                f"budget {self.budget} is below the observation window of {self.window_size}: "
                f"give at least {self.window_size}, or a smaller window_size"
            )

    def row_share(self, num_tokens: int, bytes_per_token: int) -> Fraction:
        """The share of its entries that a prompt of `num_tokens` keeps; 1 where it is kept whole.

        bytes_per_token: what a token's entries take over all evicted layers. A prompt shorter than
        `SHORT_PROMPT_WINDOWS` windows whose budget is below one window is not worth compressing: kept whole.
        Raises BudgetError for longer ones, InvalidInputError for a prompt of no tokens.
        """
        if num_tokens < 1:
            raise InvalidInputError("the prompt has no tokens: pass at least one")
        share = self.budget.share(num_tokens, bytes_per_token)
        if share >= 1 or num_tokens <= self.window_size:
            return Fraction(1)
        if floor(num_tokens * share) >= self.window_size:
            return share
        if num_tokens < SHORT_PROMPT_WINDOWS * self.window_size:
            return Fraction(1)
        raise BudgetError(
            f"budget {self.budget} of a prompt of {num_tokens} tokens is {floor(num_tokens * share)} entries per "
            f"head, below the observation window of {self.window_size}: give at least "
            f"{ceil(10**4 * self.window_size / num_tokens) / 10**4}, or a smaller window_size"
        )

    def score(self, observation: Observation, *, num_layers: int = 1) -> LayerScores:
        """Scores of one layer's entries, (b, h, t) float32; the higher, the more worth keeping.

        Pads score -inf; rows that are kept whole score inf. `num_layers` is the number of evicted layers, which
        a budget in bytes is shared among (each layer getting an even part). Every row is scored alone.
        Raises InvalidInputError where keys, values, queries or scores hold NaN.
        """
        return self._score(observation, self._shares(observation, bytes_per_token(observation) * num_layers))

    @torch.no_grad()
    def _score(self, observation: Observation, shares: list[Fraction]) -> LayerScores:
        valid = observation.valid
        scores = [self._score_row(row, share) for row, share in zip(observation.rows(), shares, strict=True)]
        if valid is None:
            return torch.stack(scores)
        b, h, t = observation.keys.shape[:3]
        padded = scores[0].new_full((b, h, t), float("-inf"))
        for row, row_scores in enumerate(scores):
            padded[row][:, valid[row]] = row_scores
        return padded

    def keep(self, scores: list[LayerScores], shares: list[Fraction]) -> list[Kept]:
        """The kept sets, (b, h, t) for each layer.

        scores: of every layer that competes, from `score`: one layer, or all of them where
        `allocation.spans_layers`. shares: for each row, from `row_share`.
        """
        kept = [torch.zeros_like(layer, dtype=torch.bool) for layer in scores]
        for row, share in enumerate(shares):
            valid = scores[0][row, 0] > float("-inf")
            if share >= 1:
                row_kept = [layer[row] > float("-inf") for layer in scores]
            elif bool(valid.all()):
                row_kept = self.allocation([layer[row] for layer in scores], share)
            else:
                row_kept = []
                for mask in self.allocation([layer[row][:, valid] for layer in scores], share):
                    padded = torch.zeros(mask.shape[0], len(valid), dtype=torch.bool, device=mask.device)
                    padded[:, valid] = mask
                    row_kept.append(padded)
            for layer, mask in zip(kept, row_kept, strict=True):
                layer[row] = mask
        return kept

    def select(self, observations: list[Observation]) -> list[Kept]:
        """What to keep of a prompt: a bool tensor (b, h, t) for each layer's observation.

        All evicted layers of the model, in order: a budget in bytes or across layers counts over them.
        """
        if not observations:
            raise InvalidInputError("no observation to select from: pass one for each layer")
        if len({(observation.keys.shape[0], observation.num_tokens) for observation in observations}) > 1:
            raise InvalidInputError("the layers' observations differ in batch or tokens: pass those of one prompt")
        shares = self._shares(observations[0], sum(bytes_per_token(observation) for observation in observations))
        scores = [self._score(observation, shares) for observation in observations]
        if self.allocation.spans_layers:
            return self.keep(scores, shares)
        return [self.keep([layer], shares)[0] for layer in scores]

    def _shares(self, observation: Observation, size: int) -> list[Fraction]:
        return [self.row_share(row.num_tokens, size) for row in observation.rows()]

    def _score_row(self, row: Observation, share: Fraction) -> Float[Tensor, "h t"]:
        row.check_finite()
        if share >= 1:
            return torch.full((row.num_heads, row.num_tokens), float("inf"), device=row.keys.device)
        scores, mean = self._aggregate(row)
        if self.weighting is not None:
            scores = self.weighting(scores, mean, row, share)
        if bool(torch.isnan(scores.sum())):
            raise InvalidInputError("scores hold NaN: the window's attention or the value norms overflowed")
        if scores.shape[0] != row.num_heads or scores.shape[-1] > row.num_tokens or not scores.is_floating_point():
            raise InvalidInputError(
                f"policy {self.name!r} scored {tuple(scores.shape)} {scores.dtype}: a scorer gives floating (heads, "
                f"groups, queries, entries) for the first of {row.num_heads} heads' {row.num_tokens} entries"
            )
        # -inf is kept for pads.
        scores = scores.clamp_min(torch.finfo(scores.dtype).min)
        window = row.num_tokens - scores.shape[-1]
        top = float("inf") if self.protect_window else float(scores.max())
        return torch.nn.functional.pad(scores, (0, window), value=top)

    def _aggregate(self, row: Observation) -> tuple[Float[Tensor, "h n"], Float[Tensor, "h n"]]:
        """Scores and mean importances, some heads at a time, so that few importances are held at once."""
        per_head = row.num_groups * self.window_size * row.num_tokens
        is_cpu = row.keys.device.type == "cpu"
        step = max(1, (_HEAD_CHUNK_ELEMENTS if is_cpu else _HEAD_CHUNK_ELEMENTS_GPU) // per_head)
        scores, means = [], []
        for start in range(0, row.num_heads, step):
            importance = self.scorer(row.heads(start, min(start + step, row.num_heads)), self.window_size)
            scores.append(self.aggregation(importance))
            if self.weighting is not None:
                means.append(importance.mean(dim=(1, 2)))
        joined = torch.cat(scores)
        return joined, torch.cat(means) if means else joined


def bytes_per_token(observation: Observation) -> int:
    """Bytes that one token's entries take in this layer, over its heads."""
    key_size, value_size = observation.keys.shape[-1], observation.values.shape[-1]
    return observation.num_heads * entry_bytes(key_size, value_size, observation.keys.element_size())
