"""The packaged model's own suite: documents compressed before their questions are seen, answered greedily."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.statistics import Interval, mean_interval
from defensivekv.integrations.transformers import EvictingCache, disable, enable
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.needleworld import MAX_NEW_TOKENS, TASKS, Sample, make_sample, score
from defensivekv.policies import Policy


@dataclass(frozen=True)
class Cell:
    """One policy at one budget over the suite.

    policy: its name, "full" being the stock model with its stock cache. budget: the share asked for.
    document_scores: the mean score of each document's questions, 0 to 1. cache_bytes: bytes held for one document
    after compression. token_seconds: median decoding time of a step. achieved: the share of entries kept.
    answers: the generated texts, answers[document][question].
    """

    policy: str
    budget: float
    document_scores: tuple[float, ...]
    cache_bytes: float
    token_seconds: float
    achieved: float
    answers: tuple[tuple[str, ...], ...]

    @property
    def accuracy(self) -> Interval:
        """Mean score with its 95 % interval over documents."""
        return mean_interval(list(self.document_scores))


def make_suite(num_documents: int, *, num_tokens: int = 1024, seed: int = 1, num_questions: int = 4) -> list[Sample]:
    """`num_documents` documents of each task, of `num_tokens` tokens each, task after task."""
    if num_documents < 1:
        raise InvalidInputError(f"{num_documents} documents make no suite: ask for at least one")
    return [
        make_sample(task, num_tokens=num_tokens, seed=seed * 10**6 + i, num_questions=num_questions)
        for task in TASKS
        for i in range(num_documents)
    ]


@torch.no_grad()
def evaluate_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    policy: Policy,
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> Cell:
    """Runs the suite under one policy, "full" being the stock model with its stock cache.

    policy: with a budget that is a share. advance: told how many documents were finished. Raises InvalidInputError.
    """
    if policy.budget.kind != "share":
        raise InvalidInputError(
            f"budget {policy.budget} is not a share, by which cells are compared: give one such as 0.2"
        )
    is_stock = policy.name == "full"
    (disable if is_stock else enable)(model)
    scores: list[float] = []
    answers: list[tuple[str, ...]] = []
    held, achieved, steps = 0.0, [], []
    for batch in _batches(samples, batch_size):
        ids = _encode(tokenizer, [sample.document for sample in batch], special=True)["input_ids"]
        cache = DynamicCache(config=model.config) if is_stock else EvictingCache(model, policy)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        held += _cache_bytes(cache)
        achieved.append(1.0 if isinstance(cache, DynamicCache) else cache.report().achieved)
        texts = []
        for number in range(len(batch[0].questions)):
            generated, seconds = _ask(model, tokenizer, cache, ids, [s.questions[number].text for s in batch])
            texts.append(generated)
            steps.append(seconds)
        for sample, given in zip(batch, zip(*texts, strict=True), strict=True):
            graded = [score(text, q.answer) for text, q in zip(given, sample.questions, strict=True)]
            scores.append(sum(graded) / len(graded))
            answers.append(given)
        advance(len(batch))
    disable(model)
    return Cell(
        policy=policy.name,
        budget=float(policy.budget.amount),
        document_scores=tuple(scores),
        cache_bytes=held / len(samples),
        token_seconds=sorted(steps)[len(steps) // 2],
        achieved=sum(achieved) / len(achieved),
        answers=tuple(answers),
    )


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Samples of one task together: they have the same number of questions."""
    for _, of_task in groupby(samples, key=lambda sample: sample.task):
        members = list(of_task)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache | EvictingCache,
    document_ids: Tensor,
    questions: list[str],
) -> tuple[list[str], float]:
    """The answers to one question of every document, and the seconds of a decoding step."""
    encoded = _encode(tokenizer, questions, special=False)
    ids = torch.cat((document_ids, encoded["input_ids"]), dim=1)
    mask = torch.cat((torch.ones_like(document_ids), encoded["attention_mask"]), dim=1)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    clock = _StepClock()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        logits_processor=[clock],
        **{CACHE_ARGUMENT: copy.deepcopy(cache)},
        **options,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True), clock.median


class _StepClock:
    """Notes when each step's logits arrive; takes part in generation as a logits processor that changes nothing."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())
        return scores

    @property
    def median(self) -> float:
        """Median seconds between two steps; not a number for an answer of one token."""
        gaps = sorted(b - a for a, b in zip(self._times, self._times[1:], strict=False))
        return gaps[len(gaps) // 2] if gaps else float("nan")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> dict[str, Tensor]:
    encoded: dict[str, Tensor] = tokenizer(
        texts, add_special_tokens=special, padding=True, padding_side="left", return_tensors="pt"
    )
    return encoded


def _cache_bytes(cache: DynamicCache | EvictingCache) -> int:
    if isinstance(cache, EvictingCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
