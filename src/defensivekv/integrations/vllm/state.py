"""What a worker knows of a request, from its first token to its last."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from defensivekv.errors import CacheError
from defensivekv.integrations.vllm.plan import EvictionPlan

_ATTRIBUTE = "defensivekv"


class RequestState:
    """Lies on vLLM's own object for the request, and ends with it, however the request does.

    prompt: tokens. slots: that hold what stays of it. starts: (l, h + 1) int32, where heads begin among the kept rows,
    once it is decided. hole: blocks that the request's list has, and gave back, after those of the kept slots.
    """

    def __init__(self, plan: EvictionPlan, prompt: int) -> None:
        self.prompt = prompt
        self.slots = plan.slots(prompt)
        self.starts: Int[Tensor, "l h1"] = torch.zeros(plan.layers, plan.heads + 1, dtype=torch.int32)
        self.hole = 0
        self.queries: list[list[Tensor]] = [[] for _ in range(plan.layers)]
        self._kept: list[NDArray[np.uint8] | None] = [None] * plan.layers

    @classmethod
    def of(cls, request: Any, plan: EvictionPlan) -> "RequestState":
        """The state of vLLM's `CachedRequestState`."""
        state = getattr(request, _ATTRIBUTE, None)
        if state is None:
            state = cls(plan, request.num_prompt_tokens)
            setattr(request, _ATTRIBUTE, state)
        if state.prompt != request.num_prompt_tokens:
            raise CacheError(
                f"the prompt of request {request.req_id} grew from {state.prompt} to {request.num_prompt_tokens} "
                "tokens: sessions that are fed piece by piece are not supported with DefensiveKV"
            )
        return state

    def begin(self) -> None:
        """The first token is read, or read again after a preemption: what stayed of the prompt is still known."""
        self.queries = [[] for _ in self.queries]
        self.hole = 0

    @property
    def is_decided(self) -> bool:
        """Whether it is known what stays, in all layers."""
        return all(kept is not None for kept in self._kept)

    def remember(self, layer: int, kept: Bool[Tensor, "h t"]) -> None:
        """Keeps a bit for each entry, so that a request that is preempted goes on as it would have."""
        self._kept[layer] = np.packbits(kept.cpu().numpy())

    def recall(self, layer: int) -> Bool[Tensor, "h t"] | None:
        """What stays of a layer; None: it is not decided."""
        bits = self._kept[layer]
        if bits is None:
            return None
        heads = self.starts.shape[1] - 1
        flat = np.unpackbits(bits, count=heads * self.prompt).astype(bool)
        return torch.from_numpy(flat).view(heads, self.prompt)

    def set_starts(self, layer: int, first: int, lengths: Sequence[int]) -> None:
        """Where a layer's heads begin, of these lengths, one after the other."""
        self.starts[layer] = torch.tensor([first, *lengths], dtype=torch.int32).cumsum(0)
