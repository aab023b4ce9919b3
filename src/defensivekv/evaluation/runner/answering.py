"""Greedy answers from a filled cache, and how long a step takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from defensivekv.evaluation.runner.reading import AnyCache
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT


@dataclass(frozen=True)
class Answer:
    """One row's answer. text: without special tokens, cut at the first stop text. ids: its tokens, end included."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Answers:
    """Of a batch, with the seconds between its decoding steps."""

    rows: list[Answer]
    steps: list[float]


class Answerer:
    """Asks one model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        stated = model.generation_config.eos_token_id
        if stated is None:
            stated = tokenizer.eos_token_id
        self.ends: list[int] = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
        """Tokens that end an answer."""
        known = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *self.ends, 0)
        self.pad: int = next(token for token in known if isinstance(token, int) and token >= 0)
        """What fills a batch; hidden by the mask."""

    def answer(
        self, cache: AnyCache, ids: Tensor, mask: Tensor, *, max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> Answers:
        """Answers to a batch. ids, mask: (b, t) of all that came before, what the cache holds included.

        The cache goes on from where it is: copy it first to ask from the same place again.
        """
        clock = _StepClock()
        stops = StoppingCriteriaList([_StopTexts(self._tokenizer, stop, ids.shape[1])] if stop else [])
        with self._own_settings(max_new_tokens):
            output = self._model.generate(
                ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([clock]),
                stopping_criteria=stops,
                **{CACHE_ARGUMENT: cache},
            )
        rows = [self._cut(row, stop) for row in output[:, ids.shape[1] :].tolist()]
        return Answers(rows, clock.gaps)

    @contextmanager
    def _own_settings(self, max_new_tokens: int) -> Iterator[None]:
        """Nothing but greedy decoding. What `generate()` is not told, it takes from the model's own settings."""
        theirs = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self.ends or None, pad_token_id=self.pad, do_sample=False
        )
        try:
            yield
        finally:
            self._model.generation_config = theirs

    def _cut(self, ids: list[int], stop: tuple[str, ...]) -> Answer:
        ended = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if ended is not None:
            ids = ids[: ended + 1]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text[: _stop_place(text, stop)], ids)


def _stop_place(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the answer ends: at the first stop text after its first letter, so that no answer is empty for one."""
    start = len(text) - len(text.lstrip())
    places = [place for each in stop if (place := text.find(each, start)) >= 0]
    return min(places, default=None)


class _StopTexts(StoppingCriteria):
    """Ends each row at its first stop text. transformers' own builds tables of the whole vocabulary for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: object) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_length :], skip_special_tokens=True)
        done = [_stop_place(text, self._stop) is not None for text in texts]
        return torch.tensor(done, device=input_ids.device)


class _StepClock:
    """Notes when each step's logits arrive; takes part in generation as a logits processor that changes nothing."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self._times.append(time.perf_counter())
        return scores

    @property
    def gaps(self) -> list[float]:
        """Seconds between one step and the next."""
        return [later - earlier for earlier, later in zip(self._times, self._times[1:], strict=False)]
