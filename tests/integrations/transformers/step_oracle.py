"""The oracle of eviction in steps: a whole cache, where what was evicted is masked, and decisions on dense arrays.

It shares nothing with the package: no ragged storage, no slots, no facts beside entries. Of DefensiveKV and
Layer-DefensiveKV, and of one row without pads.
"""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from defensivekv.attention import masked_attention
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.oracle import switched

_NAME = "step_oracle"


class SteppedModel:
    """Runs a stock model; `step` evicts.

    window: latest tokens that observe and stay. sinks: first tokens that stay.
    """

    def __init__(self, model: PreTrainedModel, window: int, sinks: int = 0) -> None:
        self.model, self.window, self.sinks = model, window, sinks
        self.cache = DynamicCache(config=model.config)
        self.alive: dict[int, Tensor] = {}
        """Per layer, (h, t): what may be read."""
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.worst: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}
        self.projections: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}
        """Of the last step."""
        AttentionInterface.register(_NAME, self._attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)

    def __call__(self, ids: Tensor) -> Tensor:
        with switched(self.model, _NAME), torch.no_grad():
            logits: Tensor = self.model(ids, use_cache=True, **{CACHE_ARGUMENT: self.cache}).logits
        return logits

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float = 1.0,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        index = module.layer_idx
        assert isinstance(index, int)
        (_, h, t, _), x = key.shape, query.shape[2]
        alive = self.alive.get(index, torch.ones(h, 0, dtype=torch.bool))
        self.alive[index] = alive = F.pad(alive, (0, t - alive.shape[1]), value=True)
        visible = torch.ones(x, t, dtype=torch.bool).tril(t - x) & alive[:, None]
        self.queries[index] = torch.cat((self.queries.get(index, query[0, :, :0]), query[0] * scaling), 1)
        self.keys[index], self.values[index] = key[0].clone(), value[0].clone()
        weight = module.get_submodule("o_proj").weight
        assert isinstance(weight, Tensor)
        self.projections[index] = weight
        output = masked_attention(query, key, value, visible[None], scaling)
        return output.transpose(1, 2).contiguous(), None

    def step(self, limit: Fraction, *, across: bool) -> None:
        """Hears the window, and keeps `limit` entries per head, over the heads of a layer or `across` all layers."""
        self.scores = scores = {index: self._scores(index, limit) for index in self.alive}
        groups = [list(scores)] if across else [[index] for index in scores]
        for group in groups:
            flat = torch.cat([scores[index].flatten() for index in group])
            heads = sum(len(scores[index]) for index in group)
            kept = torch.zeros_like(flat, dtype=torch.bool)
            kept[flat.topk(min(len(flat), math.floor(limit * heads))).indices] = True
            parts = (kept & (flat > -math.inf)).split([scores[index].numel() for index in group])
            for index, part in zip(group, parts, strict=True):
                self.alive[index] = part.view_as(scores[index])

    def _scores(self, index: int, limit: Fraction) -> Tensor:
        alive, keys, values = self.alive[index], self.keys[index], self.values[index]
        h, t = alive.shape
        w = min(self.window, t)
        queries = self.queries[index][:, -w:]
        g = len(queries) // h
        logits = queries.view(h, g, w, -1) @ keys[:, None].mT
        visible = torch.ones(w, t, dtype=torch.bool).tril(t - w) & alive[:, None, None]
        n = t - w
        weights = logits.masked_fill(~visible, -math.inf).softmax(-1)[..., :n]
        smooth = F.avg_pool1d(weights.reshape(1, -1, n), 5, 1, 2).view_as(weights) if n else weights
        # What is evicted takes no part: its smoothed share is not counted when rows are brought back to their sums.
        smooth = smooth * alive[:, None, None, :n]
        smooth = smooth * weights.sum(-1, keepdim=True) / (smooth.sum(-1, keepdim=True) + 1e-12)
        heard = smooth.amax((1, 2)) if n else weights.sum((1, 2))
        zero = torch.zeros(h, 0)
        before = self.worst.get(index, zero).shape[1]
        self.worst[index] = torch.maximum(F.pad(self.worst.get(index, zero), (0, n - before)), heard)
        self.sums[index] = F.pad(self.sums.get(index, zero), (0, n - before)) + weights.sum((1, 2))
        self.counts[index] = F.pad(self.counts.get(index, zero), (0, n - before)) + g * w
        held = alive[:, :n]
        worst = self.worst[index].masked_fill(~held, 0.0)
        risk = worst.clamp_min(worst.sum(-1, keepdim=True) / held.sum(-1, keepdim=True).clamp_min(1))
        norms = self._norms(index, values, h, g)
        weighted = (risk * (norms / norms.sum(0))[:, :n]).masked_fill(~held, 0.0)
        weighted = self._pinned(index, weighted, held, limit, t, w)
        scores = F.pad(weighted.masked_fill(~held, -math.inf), (0, w), value=math.inf)
        scores[:, : self.sinks] = scores[:, : self.sinks].masked_fill(alive[:, : self.sinks], math.inf)
        return scores

    def _norms(self, index: int, values: Tensor, h: int, g: int) -> Tensor:
        projection = self.projections[index].view(-1, h, g, values.shape[-1])
        return torch.einsum("htv,ohgv->htgo", values, projection).abs().sum(-1).mean(-1)

    def _pinned(self, index: int, weighted: Tensor, held: Tensor, limit: Fraction, t: int, w: int) -> Tensor:
        means = (self.sums[index] / self.counts[index]).masked_fill(~held, 0.0)
        share = min(Fraction(1), limit / t)
        most = max(0, math.floor((t - w) * share - w))
        result, top = weighted.clone(), weighted.max() if weighted.numel() else 0.0
        # The bias: the mean mass on the last w entries that are held, head by head.
        last = [row[there][-w:].sum() if w else row.sum() for row, there in zip(means, held, strict=True)]
        bias = torch.stack(last).mean()
        for head, row in enumerate(means):
            order = row.sort(descending=True, stable=True).indices
            cumulative = (row[order] / row.sum().clamp_min(1e-30)).cumsum(0)
            pins = min(most, int((cumulative < 0.9 - bias).sum()))
            result[head, order[:pins]] = top
        return result
