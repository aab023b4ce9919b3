"""The cache that a user passes to `generate()`: reads the prompt whole, keeps what the policy keeps of it."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from defensivekv.budget import Budget
from defensivekv.errors import CacheError, InvalidInputError
from defensivekv.integrations.transformers.checks import check_forward, check_model, check_single_reading, check_tokens
from defensivekv.integrations.transformers.decision import Pending, PromptDecision
from defensivekv.integrations.transformers.layer import EvictedLayer, LayerHandoff
from defensivekv.integrations.transformers.model import check_supported, max_positions, plan_layers, text_config
from defensivekv.integrations.transformers.report import CacheReport, LayerReport
from defensivekv.integrations.transformers.rotary import ModelRotary
from defensivekv.policies import Policy
from defensivekv.policies import policy as make_policy


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
        check_supported(model)
        self._config = text_config(model)
        self._plans = plan_layers(self._config)
        self._model = weakref.ref(model)
        self._module_ids = frozenset(id(module) for module in model.modules())
        self._max_tokens = max_positions(model)
        self.evicted_layers = tuple(index for index, plan in enumerate(self._plans) if plan.evicted)
        """Numbers of the model's layers that are evicted; the first dimension of `lengths` follows them."""
        self.outstanding: LayerHandoff | None = None
        self.repeats: tuple[int, int] | None = None
        """What part of the prompt is being repeated; None: nothing is."""
        self._is_reconstructing = False
        self._drafting_from = 0
        self._decision = PromptDecision(self.policy, self.evicted_layers)
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        stock = DynamicCache(config=self._config).layers
        return [EvictedLayer(self, index) if plan.evicted else stock[index] for index, plan in enumerate(self._plans)]

    @property
    def _evicted(self) -> list[EvictedLayer]:
        return [self.layers[index] for index in self.evicted_layers]

    # ------------------------------------------------------------------ what the layers ask for

    def check_update(self, layer: EvictedLayer, keys: Tensor, values: Tensor) -> None:
        """Raises where the tokens about to be stored could not be answered from correctly."""
        check_model(self._model())
        last, self.outstanding = self.outstanding, None
        if last is not None and not last.is_consumed:
            raise CacheError(
                f"the keys of layer {last.layer.index} never arrived at defensivekv's attention: the model that ran is "
                "not the one that the cache was made for, or it changes its keys after the cache and is not supported; "
                "make an EvictingCache for each model, and call defensivekv.enable on it"
            )
        if layer.pending is not None and self.repeats is None:
            raise CacheError("a prompt waits for its drafts to be verified: call crop() before going on")
        if layer.index == self.evicted_layers[0]:
            if self.repeats is not None:
                return
            check_forward(self._evicted, keys, values, self.policy, self._max_tokens, self._drafting_from)
            self._drafting_from = 0
            if not layer.store.seen and not self._is_reconstructing:
                check_single_reading(self.policy)

    def check_module(self, module: nn.Module) -> None:
        """Raises CacheError where `module` is not a part of the model that this cache was made for."""
        if id(module) not in self._module_ids:
            raise CacheError(
                f"this cache was made for another model than the one whose {type(module).__name__} reads it: "
                "make an EvictingCache for each model"
            )

    def check_hidden(self, layer: EvictedLayer, hidden: Tensor, rows: tuple[int, ...]) -> None:
        """Raises InvalidInputError where a later turn's mask hides tokens of the prompt that were not its pads.

        hidden: (b, t) of the prompt's tokens, pads counted. rows: of the prompt, for each row of the batch.
        """
        if layer.index != self.evicted_layers[0]:
            return
        valid = self._decision.valid
        seen = torch.ones_like(hidden) if valid is None else valid[list(rows)].to(hidden.device)
        if hidden.shape != seen.shape or bool((hidden & seen).any()):
            raise InvalidInputError(
                "the attention mask hides tokens of the prompt that it did not hide when the prompt was read, and an "
                "evicted cache cannot leave them out any more: pass the prompt's own mask, with ones for what followed"
            )

    def decide(self, layer: EvictedLayer) -> None:
        """Scores the layer's prompt, and evicts as soon as everything that competes with it has been scored."""
        pending, layer.pending = layer.pending, None
        assert pending is not None
        tail = layer.store.tail
        assert tail is not None
        if self.policy.scorer.sees == "prompt":
            pending = self._with_rotary(pending, layer.index)
        observation = pending.observation(tail.keys, tail.values, self.policy)
        for index, kept in self._decision.add(layer.index, observation, pending.evidence).items():
            self.layers[index].store.compact(kept)

    def _with_rotary(self, pending: Pending, index: int) -> Pending:
        model = self._model()
        assert model is not None
        if pending.positions is not None and pending.positions.dim() != 2:
            # Positions in several dimensions, as of images, have no one rotation.
            return pending
        b, t = pending.queries.shape[0], self.layers[index].store.seen
        positions = torch.arange(t, device=pending.queries.device)[None]
        if pending.positions is not None:
            # Drafts that were taken back are counted in what the model was given.
            positions = pending.positions[..., :t].to(pending.queries.device)
        rotary = ModelRotary(model, pending.module, self._plans[index].kind, positions.expand(b, -1))
        return replace(pending, rotary=rotary)

    @property
    def awaits_repeats(self) -> bool:
        """Whether the policy wants to hear the prompt repeated before it decides."""
        return self._is_reconstructing and self.policy.reads_twice

    @contextmanager
    def reconstructing(self) -> Iterator[None]:
        """Around the reading of a prompt and of what repeats it, after which is decided; see `prefill`."""
        self._is_reconstructing = True
        try:
            yield
            self.repeats = None
            for layer in self._evicted:
                if layer.pending is not None:
                    self.decide(layer)
        finally:
            self._is_reconstructing, self.repeats = False, None

    # ------------------------------------------------------------------ what transformers asks for

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that the layer will return; asked for before any layer runs."""
        check_tokens(query_length)
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every layer. Raises CacheError before touching any of them
        where that reaches into what was evicted, or where a stock layer has forgotten what it would need.
        """
        tokens_to_remove = int(tokens_to_remove)  # some releases count in tensors
        count = abs(tokens_to_remove)
        shortest = min(layer.store.tail_length for layer in self._evicted)
        if tokens_to_remove > 0:
            raise InvalidInputError("crop takes the negative number of tokens to remove")
        if count > shortest:
            raise CacheError(
                f"cannot crop {count} tokens: only the last {shortest} came after the eviction; "
                "make a new cache, or fork this one before going on"
            )
        if any(_has_forgotten(layer) for layer in self.layers):
            raise CacheError(
                "cannot crop: sliding-window and linear layers have forgotten what came before; call "
                "activate_past_recording() before the forward pass whose tokens may be taken back, or fork the cache"
            )
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Assisted decoding starts: a prompt is decided on once its first drafts are verified.

        Drafts come in one forward pass with the prompt. Those accepted at once count as a part of it.
        """
        self._drafting_from = self.get_seq_length()
        super().activate_past_recording()

    def reset(self) -> None:
        """Forgets everything; the cache can take a new prompt."""
        self.outstanding, self.repeats, self._drafting_from = None, None, 0
        self._decision = PromptDecision(self.policy, self.evicted_layers)
        # New layers, because what a stock layer's own reset leaves behind differs between releases.
        self.layers = self._new_layers()

    # ------------------------------------------------------------------ forks

    def fork(self) -> "EvictingCache":
        """A cache that goes on by itself from here. The prefix is shared, what came after it is copied."""
        if any(layer.pending is not None for layer in self._evicted) or self._decision.is_underway:
            raise CacheError("the cache cannot be forked in the middle of a forward pass")
        twin = copy.copy(self)
        twin._decision = self._decision.fork()
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
            if isinstance(layer, EvictedLayer) and layer.store.view is not None:
                view = layer.store.view
                lengths = tuple(view.prefix.lengths[row] for row in view.rows)
            layers.append(LayerReport(index, plan.kind, plan.evicted, bool(lengths), lengths, _layer_bytes(layer)))
        decision, first = self._decision, self._evicted[0].store.view
        rows = tuple(range(len(decision.rows))) if first is None else first.rows
        tokens = tuple(decision.rows[row] for row in rows)
        return CacheReport(
            policy=self.policy.name,
            budget=str(self.policy.budget),
            layers=tuple(layers),
            prompt_tokens=tokens,
            kept_whole=tuple(decision.shares[row] >= 1 for row in rows),
            full_bytes=decision.bytes_per_token * sum(tokens),
        )


def _has_forgotten(layer: Any) -> bool:
    """Whether a stock layer keeps no past to go back to."""
    if isinstance(layer, EvictedLayer):
        return False
    if not layer.is_croppable:
        return True
    if getattr(layer, "record_past", True):
        return False
    return not getattr(layer, "is_sliding", False) or bool(layer.get_seq_length() >= layer.sliding_window)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, EvictedLayer):
        return layer.store.nbytes
    states = [getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]
    for name in ("conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        states.extend(held.values() if isinstance(held, dict) else [held])
    # Of the storage: a sliding layer holds its window as a view of everything that it has just read.
    storages = {
        state.untyped_storage().data_ptr(): state.untyped_storage().nbytes()
        for state in states
        if isinstance(state, Tensor)
    }
    return sum(storages.values())
