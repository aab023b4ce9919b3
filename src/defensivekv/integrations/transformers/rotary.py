"""The model's own rotation of queries and keys, for scorers that ask about positions to come."""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.transformers.model import has_dynamic_rotation
from defensivekv.integrations.transformers.pending import Pending

_UNROTATED_FULL_ATTENTION = ("cohere2", "cohere2_moe", "exaone4", "exaone_moe")
"""Model types that rotate in their sliding-window layers only, which nothing in their full-attention layers tells."""


class ModelRotary:
    """Rotation by position as one attention layer of a model makes it, from the two functions that its file has.

    Nothing is looked up before it is asked for. Raises UnsupportedModelError then, where the model's file has no
    `apply_rotary_pos_emb` or the model no single module of frequencies.
    """

    def __init__(
        self, model: PreTrainedModel, module: nn.Module, kind: str, batch_positions: Int[Tensor, "b t"]
    ) -> None:
        self._model = model
        self._module = module
        self._kind = kind
        self._batch_positions = batch_positions

    @property
    def positions(self) -> Int[Tensor, " t"]:
        """Of the only row's tokens."""
        return self._batch_positions[0]

    def row(self, row: int, valid: Bool[Tensor, " t"] | None) -> "ModelRotary":
        """That of one row's valid tokens."""
        positions = self._batch_positions[row]
        kept = positions if valid is None else positions[valid]
        return ModelRotary(self._model, self._module, self._kind, kept[None])

    def unrotate(self, vectors: Float[Tensor, "q n d"], positions: Int[Tensor, " n"]) -> Float[Tensor, "q n d"]:
        """The vectors as they were before they were rotated, float32."""
        if self._is_unrotated:
            return vectors.float()
        cos, sin = self._angles(vectors, positions)
        # Frequencies that were stretched come with a factor on both, which turning back must divide by twice.
        scale = (cos.square() + sin.square()).mean()
        return self._apply(vectors, cos / scale, -sin / scale)

    def rotate_mean(self, vectors: Float[Tensor, "q n d"], positions: Int[Tensor, " p"]) -> Float[Tensor, "q n d"]:
        """Every vector under the mean of the rotations by `positions`, float32. Rotation is linear in its angles'
        cosine and sine, so that their means rotate.
        """
        if self._is_unrotated:
            return vectors.float()
        cos, sin = (angles.mean(0).expand(vectors.shape[1], -1) for angles in self._angles(vectors, positions))
        return self._apply(vectors, cos, sin)

    @property
    def _is_unrotated(self) -> bool:
        config = getattr(self._module, "config", None)
        in_full = getattr(config, "model_type", "") in _UNROTATED_FULL_ATTENTION
        return in_full or not getattr(self._module, "use_rope", True)

    def _angles(self, vectors: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = vectors.new_empty(1, dtype=torch.float32)
        by_kind = "layer_type" in inspect.signature(self._embedding.forward).parameters
        extra = {"layer_type": self._kind} if by_kind else {}
        cos, sin = self._embedding(like, position_ids=positions[None].to(vectors.device), **extra)
        return cos[0].float(), sin[0].float()

    def _apply(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch = vectors.float()[None]
        rotated: Tensor = self._rotate(batch, batch, cos[None], sin[None])[0]
        return rotated[0]

    @cached_property
    def _rotate(self) -> Callable[..., Any]:
        function: Callable[..., Any] | None = getattr(
            sys.modules[type(self._module).__module__], "apply_rotary_pos_emb", None
        )
        if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise UnsupportedModelError(
                f"{type(self._module).__name__} rotates its queries in a way of its own, which 'expected-attention' "
                "cannot turn back: use a policy that asks for no future positions, such as 'snapkv'"
            )
        return function

    @cached_property
    def _embedding(self) -> nn.Module:
        file = type(self._module).__module__
        found: dict[str, nn.Module] = {
            type(module).__name__: module
            for module in self._model.modules()
            if type(module).__name__.endswith("RotaryEmbedding") and type(module).__module__ == file
        }
        if has_dynamic_rotation(self._model):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} rotates by frequencies that change with the length (dynamic NTK), so "
                "that none can be told for positions to come: use a policy that asks for none, such as 'snapkv'"
            )
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has {len(found)} kinds of rotary embeddings beside its attention, and "
                "'expected-attention' needs one: use a policy that asks for no future positions, such as 'snapkv'"
            )
        # A copy, since some keep what they were last asked for.
        return copy.deepcopy(next(iter(found.values())))


def with_rotary(pending: Pending, model: PreTrainedModel, kind: str, num_tokens: int) -> Pending:
    """The same with the rotation of a prompt of so many tokens. kind: of the layer."""
    if pending.positions is not None and pending.positions.dim() != 2:
        # Positions in several dimensions, as of images, have no one rotation.
        return pending
    positions = torch.arange(num_tokens, device=pending.queries.device)[None]
    if pending.positions is not None:
        # Drafts that were taken back are counted in what the model was given.
        positions = pending.positions[..., :num_tokens].to(pending.queries.device)
    rotary = ModelRotary(model, pending.module, kind, positions.expand(pending.queries.shape[0], -1))
    return replace(pending, rotary=rotary)
