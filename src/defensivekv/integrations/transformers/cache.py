"""The cache that a user passes to `generate()`: reads the prompt whole, keeps what the policy keeps of it."""

import copy
import warnings
import weakref
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache

from defensivekv.budget import Budget
from defensivekv.errors import CacheError, DefensiveKVWarning, InvalidInputError
from defensivekv.integrations.transformers.layer import EvictedLayer, LayerHandoff, Pending
from defensivekv.integrations.transformers.model import is_enabled, output_projection, plan_layers, text_config
from defensivekv.integrations.transformers.report import CacheReport, LayerReport
from defensivekv.policies import Observation, Policy
from defensivekv.policies import policy as make_policy
from defensivekv.policies.policy import bytes_per_token
from defensivekv.types import LayerScores


class EvictingCache(Cache):
    """A KV cache that evicts what the policy does not keep of the prompt, and frees it.

    The first forward pass is the prompt. Once a layer's attention over it is computed, the entries that the
    policy keeps are copied into a compact prefix and the rest is freed (after the last layer, where the policy
    lets layers compete). What comes later, further turns and generated tokens, is kept whole.

    model: the model that will use the cache, enabled with `enable`. policy: a policy, or a name with
    `budget=...` and the other options of `defensivekv.policy`.

    Raises UnsupportedModelError, BudgetError, UnknownPolicyError or InvalidInputError at once; CacheError when
    used with another model, or after `disable`. For inference only: gradients do not flow through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | str,
        budget: float | int | str | Budget | None = None,
        **options: Any,
    ) -> None:
        if isinstance(policy, Policy):
            if budget is not None or options:
                raise InvalidInputError("the policy has its budget and options already: pass a name to set them here")
            self.policy = policy
        else:
            self.policy = make_policy(policy, budget, **options)
        self._plans = plan_layers(model)
        self._model = weakref.ref(model)
        self._module_ids = frozenset(id(module) for module in model.modules())
        self._max_tokens: int | None = getattr(text_config(model), "max_position_embeddings", None)
        self.outstanding: LayerHandoff | None = None
        self._clear_decisions()
        super().__init__(layers=self._new_layers())
        self.evicted_layers = tuple(index for index, plan in enumerate(self._plans) if plan.evicted)
        """Numbers of the model's layers that are evicted; the first dimension of `lengths` follows them."""

    def _new_layers(self) -> list[Any]:
        return [
            EvictedLayer(self, index)
            if plan.evicted
            else DYNAMIC_LAYER_TYPE_MAPPING[_stock_kind(plan.kind)](**plan.options)
            for index, plan in enumerate(self._plans)
        ]

    def _clear_decisions(self) -> None:
        self._scores: dict[int, LayerScores] = {}
        self._shares: tuple[Fraction, ...] = ()
        self._bytes_per_token = 0
        self._rows: tuple[int, ...] = ()
        self._unreachable: set[int] = set()

    @property
    def _evicted(self) -> list[EvictedLayer]:
        return [self.layers[index] for index in self.evicted_layers]

    # ------------------------------------------------------------------ checks, before any work is lost

    def check_update(self, layer: EvictedLayer, keys: Tensor, values: Tensor) -> None:
        """Raises where the tokens about to be stored could not be answered from correctly."""
        model = self._model()
        if model is None:
            raise CacheError("the model that this cache was made for is gone")
        if not is_enabled(model):
            raise CacheError(
                f"{type(model).__name__} is not enabled, and its own attention would read a part of this cache only: "
                "call defensivekv.enable(model)"
            )
        self._check_outstanding(layer)
        x = keys.shape[2]
        if x == 0:
            raise InvalidInputError("the prompt has no tokens: pass at least one")
        if layer.index == self.evicted_layers[0] and x > 1:
            total = layer.store.seen + x
            if self._max_tokens is not None and total > self._max_tokens:
                raise InvalidInputError(
                    f"{total} tokens exceed the model's maximum of {self._max_tokens} positions: shorten the prompt"
                )
            if layer.awaits_prompt:
                size = keys.shape[1] * (keys.shape[3] + values.shape[3]) * keys.element_size() + 4 * keys.shape[1]
                self.policy.row_share(x, size * len(self.evicted_layers))

    def _check_outstanding(self, layer: EvictedLayer) -> None:
        """The keys handed out last must have arrived at our attention function."""
        last, self.outstanding = self.outstanding, None
        if last is None or last.is_consumed:
            return
        if last.view is not None or last.layer is layer:
            raise CacheError(
                f"layer {last.layer.index} read only the newest part of this cache: the model that ran is not the one "
                "the cache was made for, or does not use defensivekv's attention; make the cache for that model and "
                "call defensivekv.enable on it"
            )
        last.layer.awaits_prompt = False
        self._unreachable.add(last.layer.index)
        if len(self._unreachable) == 1:
            warnings.warn(
                f"layer {last.layer.index} changes its keys after the cache handed them out: such layers stay dense",
                DefensiveKVWarning,
                stacklevel=4,
            )

    def check_module(self, module: nn.Module) -> None:
        """Raises CacheError where `module` is not a part of the model that this cache was made for."""
        if id(module) not in self._module_ids:
            raise CacheError(
                f"this cache was made for another model than the one whose {type(module).__name__} reads it: "
                "make an EvictingCache for each model"
            )

    # ------------------------------------------------------------------ the decision

    def decide(self, layer: EvictedLayer) -> None:
        """Scores the layer's prompt, and evicts as soon as everything that competes with it has been scored."""
        pending, layer.pending = layer.pending, None
        assert pending is not None
        observation = self._observation(layer, pending)
        if layer.index == self.evicted_layers[0]:
            _check_pads(observation)
        size = bytes_per_token(observation) * len(self.evicted_layers)
        rows = _row_lengths(observation)
        self._shares = tuple(self.policy.row_share(tokens, size) for tokens in rows)
        self._rows, self._bytes_per_token = rows, size
        try:
            scores = self.policy.score(observation, num_layers=len(self.evicted_layers))
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer.index}: {error}") from None
        if not self.policy.allocation.spans_layers:
            layer.store.compact(self.policy.keep([scores], list(self._shares))[0])
        else:
            self._scores[layer.index] = scores
            if len(self._scores) + len(self._unreachable) == len(self.evicted_layers):
                self._evict_across_layers()
        if layer.index == self.evicted_layers[-1]:
            self._say_what_is_whole()

    def _evict_across_layers(self) -> None:
        indices = sorted(self._scores)
        for index, kept in zip(
            indices, self.policy.keep([self._scores[index] for index in indices], list(self._shares)), strict=True
        ):
            self.layers[index].store.compact(kept)
        self._scores = {}

    def _observation(self, layer: EvictedLayer, pending: Pending) -> Observation:
        tail = layer.store.tail
        assert tail is not None
        queries = _window_queries(pending.queries, pending.valid, self.policy.window_size)
        projection = None
        if self.policy.weighting is not None:
            projection = output_projection(pending.module, queries.shape[1] * tail.values.shape[-1])
            projection = projection.to(tail.values.device)
        return Observation(
            queries=queries.detach(),
            keys=tail.keys.detach(),
            values=tail.values.detach(),
            output_projection=projection,
            scaling=pending.scaling,
            valid=pending.valid,
            softcap=pending.softcap,
            sinks=None if pending.sinks is None else pending.sinks.detach(),
        )

    def _say_what_is_whole(self) -> None:
        whole = [tokens for tokens, share in zip(self._rows, self._shares, strict=True) if share >= 1]
        if whole and not self.policy.budget.is_full:
            lengths = ", ".join(str(tokens) for tokens in sorted(set(whole)))
            warnings.warn(
                f"{len(whole)} of {len(self._rows)} prompts ({lengths} tokens) are kept whole: "
                f"too short for budget {self.policy.budget}",
                DefensiveKVWarning,
                stacklevel=6,
            )

    # ------------------------------------------------------------------ what transformers asks for

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every layer. Raises CacheError before touching any of them
        where that reaches into what was evicted.
        """
        count = abs(tokens_to_remove)
        shortest = min(layer.store.tail_length for layer in self._evicted)
        if tokens_to_remove > 0:
            raise InvalidInputError("crop takes the negative number of tokens to remove")
        if count > shortest:
            raise CacheError(
                f"cannot crop {count} tokens: only the last {shortest} came after the eviction; "
                "make a new cache, or fork this one before going on"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything; the cache can take a new prompt."""
        self._clear_decisions()
        self.outstanding = None
        super().reset()

    # ------------------------------------------------------------------ forks

    def fork(self) -> "EvictingCache":
        """A cache that goes on by itself from here. The prefix is shared, what came after it is copied."""
        if any(layer.pending is not None for layer in self._evicted) or self._scores:
            raise CacheError("the cache cannot be forked in the middle of a forward pass")
        twin = copy.copy(self)
        twin._unreachable = set(self._unreachable)
        twin.outstanding = None
        twin.layers = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, EvictedLayer):
                forked = EvictedLayer(twin, index)
                forked.store = layer.store.fork()
                forked.awaits_prompt, forked.is_initialized = layer.awaits_prompt, layer.is_initialized
                twin.layers.append(forked)
            else:
                twin.layers.append(copy.deepcopy(layer))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvictingCache":
        return self.fork()

    # ------------------------------------------------------------------ what users ask for

    @property
    def lengths(self) -> Int[Tensor, "l b h"]:
        """Stored entries of the prefix: (evicted layers, batch rows, key-value heads); empty before the prompt."""
        views = [layer.store.view for layer in self._evicted]
        if any(view is None for view in views):
            return torch.empty(0, 0, 0, dtype=torch.long)
        return torch.tensor([[view.prefix.lengths[row] for row in view.rows] for view in views if view is not None])

    def kept_positions(self, layer: int, row: int, head: int) -> Int[Tensor, " n"]:
        """Positions in the prompt (pads counted) of the entries kept, ascending int32.

        layer, row, head: as in `lengths`; `evicted_layers[layer]` is the number of the model's layer.
        """
        view = self._evicted[layer].store.view
        if view is None:
            raise CacheError("nothing has been evicted yet: run the prompt through the model first")
        return view.prefix.kept_positions(view.rows[row], head)

    @property
    def nbytes(self) -> int:
        """Bytes held: prefixes with their positions, tails with the unused part of their buffers, stock layers."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    def report(self) -> CacheReport:
        """What was asked for, what was kept and what it takes, for each layer and in all."""
        layers = []
        for index, (plan, layer) in enumerate(zip(self._plans, self.layers, strict=True)):
            lengths: tuple[tuple[int, ...], ...] = ()
            evicted = False
            if isinstance(layer, EvictedLayer) and layer.store.view is not None:
                view = layer.store.view
                lengths = tuple(view.prefix.lengths[row] for row in view.rows)
                evicted = True
            kind = "keys changed after the cache" if index in self._unreachable else plan.kind
            layers.append(
                LayerReport(
                    index, kind, plan.evicted and index not in self._unreachable, evicted, lengths, _layer_bytes(layer)
                )
            )
        return CacheReport(
            policy=self.policy.name,
            budget=str(self.policy.budget),
            layers=tuple(layers),
            prompt_tokens=self._rows,
            kept_whole=tuple(share >= 1 for share in self._shares),
            full_bytes=self._bytes_per_token * sum(self._rows),
        )


def _stock_kind(kind: str) -> str:
    return "full_attention" if kind == "latent_attention" else kind


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, EvictedLayer):
        return layer.store.nbytes
    states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        states.extend(held.values() if isinstance(held, dict) else [held])
    return sum(state.nbytes for state in states if isinstance(state, Tensor))


def _row_lengths(observation: Observation) -> tuple[int, ...]:
    if observation.valid is None:
        return (observation.num_tokens,) * observation.keys.shape[0]
    return tuple(observation.valid.sum(-1).tolist())


def _window_queries(queries: Tensor, valid: Tensor | None, window_size: int) -> Tensor:
    """The last `window_size` valid queries of each row (fewer: the first ones are repeated pads, never read)."""
    if valid is None or bool(valid[:, -window_size:].all()):
        return queries[:, :, -window_size:]
    positions = torch.arange(valid.shape[1], device=valid.device)
    last = positions.masked_fill(~valid, -1).sort(dim=-1).values[:, -window_size:].clamp_min(0)
    index = last[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, index)


def _check_pads(observation: Observation) -> None:
    """Raises where some rows of an unmasked batch begin with one token repeated: pads that nobody named.

    In the first layer a value depends on its token only, so that equal tokens show as equal values.
    """
    b, t = observation.keys.shape[0], observation.num_tokens
    if observation.valid is not None or b == 1 or t < 2:
        return
    first, second = observation.values[:, :, 0].float(), observation.values[:, :, 1].float()
    repeated = torch.isclose(first, second, rtol=1e-4, atol=1e-6).flatten(1).all(-1)
    if bool(repeated.any()) and not bool(repeated.all()):
        rows = ", ".join(str(row) for row in repeated.nonzero().flatten().tolist())
        raise InvalidInputError(
            f"rows {rows} of the batch begin with one token repeated, which looks like padding, and no attention mask "
            "hides it: pass the tokenizer's attention_mask to generate() or to the model"
        )
