"""A document compressed once and asked many times, each question from the same prefix."""

import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.model import enable, max_positions
from defensivekv.integrations.transformers.prefill import prefill
from defensivekv.integrations.transformers.report import CacheReport
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import Policy

Template = Literal["auto", "chat", "plain"]


@dataclass(frozen=True)
class Answer:
    """What came of one question.

    text: decoded without special tokens. question_tokens, new_tokens: counts. seconds: from the question's
    tokens to the last new one.
    """

    text: str
    question_tokens: int
    new_tokens: int
    seconds: float


class Context:
    """A compressed document; made by `compress`.

    Questions do not see each other: each starts from a fork of the same cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: EvictingCache,
        document_ids: Int[Tensor, "1 t"],
        suffix: str,
        prefill_seconds: float,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.document_ids = document_ids
        self.prefill_seconds = prefill_seconds
        self._suffix = suffix

    @property
    def num_tokens(self) -> int:
        """Tokens of the document, the template's before it counted."""
        return int(self.document_ids.shape[1])

    def report(self) -> CacheReport:
        """What was kept of the document, and what it takes."""
        return self.cache.report()

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate_options: Any) -> str:
        """The answer's text; see `answer`."""
        return self.answer(question, max_new_tokens=max_new_tokens, **generate_options).text

    def answer(
        self, question: str, *, max_new_tokens: int = 64, max_entries: int | None = None, **generate_options: Any
    ) -> Answer:
        """Answers from the document, greedily unless `generate_options` say otherwise.

        max_entries: that may be held meanwhile, per head on average: what was kept of the document, which stays, with
        what is held of question and answer. generate_options: passed on to the model's `generate`.

        Raises InvalidInputError for an empty question, and where document, question and answer exceed the model's
        positions; BudgetError for a bound that has no room beside the document.
        """
        if not question.strip():
            raise InvalidInputError("the question is empty")
        question_ids = _encode(self.model, self.tokenizer, question + self._suffix, special=False, what="question")
        ids = torch.cat((self.document_ids, question_ids), dim=1)
        _check_length(self.model, ids.shape[1] + max_new_tokens, "document, question and answer")
        # Some models' own generation settings name a kind of cache, which a cache that is passed contradicts.
        defaults = {"do_sample": False, "max_new_tokens": max_new_tokens, "cache_implementation": None}
        options = defaults | generate_options
        cache = self.cache.fork(max_entries=max_entries)
        # generate() makes as many rows of the question, and leaves those of a filled cache to its caller.
        cache.batch_repeat_interleave(_num_rows(self.model, options))
        start = time.perf_counter()
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **options)
        seconds = time.perf_counter() - start
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[0, ids.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, int(question_ids.shape[1]), len(new), seconds)


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    policy: Policy | str = "layer-defensivekv",
    budget: float | int | str | Budget | None = None,
    *,
    template: Template = "auto",
    chunk_size: int | None = None,
    **options: Any,
) -> Context:
    """Reads a document once and keeps what the policy keeps of its cache. Enables the model.

    policy, budget, options: as for `EvictingCache`. template: "chat" puts the document and later the question
    into one user turn of the tokenizer's chat template; "plain" takes them as they are; "auto" is "chat" where
    the tokenizer has a template. chunk_size: tokens read at a time, as for `prefill`.

    Raises InvalidInputError for an empty document or one past the model's maximum length, and what `enable` and
    `EvictingCache` raise; each before the document is read.
    """
    cache = EvictingCache(model, policy, budget, **options)
    if not document.strip():
        raise InvalidInputError("the document is empty")
    prefix, suffix, add_special_tokens = _split_template(tokenizer, document, template)
    ids = _encode(model, tokenizer, prefix, special=add_special_tokens, what="document")
    _check_length(model, ids.shape[1] + 1, "the document")
    enable(model)
    start = time.perf_counter()
    prefill(model, cache, ids, tokenizer=tokenizer, suffix=suffix, chunk_size=chunk_size)
    return Context(model, tokenizer, cache, ids, suffix, time.perf_counter() - start)


def _num_rows(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Rows that `generate()` decodes for one prompt: beams, or sequences."""
    settings = options.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(settings, name, None) or 1 for name in names)


def _split_template(tokenizer: PreTrainedTokenizerBase, document: str, template: Template) -> tuple[str, str, bool]:
    """The text up to the question, the text after the question, and whether special tokens must be added."""
    if template not in get_args(Template):
        raise InvalidInputError(f"unknown template {template!r}: use {', '.join(get_args(Template))}")
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return document, "", True
    if not tokenizer.chat_template:
        raise InvalidInputError("the tokenizer has no chat template: use template='plain'")
    mark = uuid.uuid4().hex
    messages = [{"role": "user", "content": f"{document}\n\n{mark}"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered.count(mark) != 1:
        raise InvalidInputError("the chat template does not keep the user's text as it is: use template='plain'")
    before, after = rendered.split(mark)
    return before, after, False


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, what: str
) -> Int[Tensor, "1 t"]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise InvalidInputError(f"the {what} has no tokens: the tokenizer makes nothing of {text[:40]!r}")
    return torch.tensor([ids], device=model.device)


def _check_length(model: PreTrainedModel, num_tokens: int, what: str) -> None:
    """Raises InvalidInputError where `num_tokens` are more than the model has positions for."""
    maximum = max_positions(model)
    if maximum is not None and num_tokens > maximum:
        raise InvalidInputError(f"{what}: {num_tokens} tokens, but the model has {maximum} positions; shorten the text")
