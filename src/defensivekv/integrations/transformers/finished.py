"""Memory of rows that are finished, given back while `generate()` goes on with the others."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.cache import EvictingCache


class ReleaseFinished(StoppingCriteria):
    """Releases each row of a batch once it has ended; stops nothing.

    `model.generate(..., stopping_criteria=[ReleaseFinished(cache)])`. For greedy decoding and sampling; the rows of a
    beam search are not sequences of their own.

    end_tokens: that end a row; those of the model's generation settings where not given.

    Raises InvalidInputError where there are none.
    """

    def __init__(self, cache: EvictingCache, end_tokens: int | list[int] | None = None) -> None:
        stated = cache.end_tokens if end_tokens is None else end_tokens
        self._ends = [stated] if isinstance(stated, int) else list(stated or [])
        if not self._ends:
            raise InvalidInputError("the model's generation settings name no end of a text: give end_tokens")
        self._cache = cache

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """input_ids: (b, t) of all rows, the last token being new. Gives False for every row."""
        last = input_ids[:, -1].tolist()
        ended = {row for row, token in enumerate(last) if token in self._ends} - self._cache.released
        if ended:
            self._cache.release(sorted(ended))
        return torch.zeros(len(last), dtype=torch.bool, device=input_ids.device)
