"""The harness's model type "defensivekv": each context is compressed once, what is asked starts from forks of it."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm
from transformers import DynamicCache

from defensivekv.budget import Budget
from defensivekv.errors import DefensiveKVError, InvalidInputError
from defensivekv.integrations.lm_eval.boundary import SplitPrompt, split_prompt
from defensivekv.integrations.lm_eval.decoding import AnyCache, generate_greedily, score_continuations
from defensivekv.integrations.lm_eval.settings import Held, describe, generation_settings
from defensivekv.integrations.transformers import EvictingCache, check_supported, disable, enable, prefill
from defensivekv.integrations.transformers.model import max_positions
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import Policy
from defensivekv.policies import policy as make_policy
from defensivekv.policies.steps import check_evicts_in_steps

MODEL_TYPE = "defensivekv"
"""The harness's name of this adapter: `lm_eval.simple_evaluate(model="defensivekv", ...)`."""

_REFUSED = {
    "truncation": "a context that loses its head is another context",
    "parallelize": "the contexts' caches live on one device",
    "tp_plan": "models split by tensor parallelism are not supported",
    "mixed_precision_dtype": "an evicting cache reads one dtype: give dtype",
    "softmax_dtype": "log-likelihoods are taken in float32",
    "think_end_token": "answers are scored whole",
    "enable_thinking": "answers are scored whole",
}
"""Arguments of the harness's own adapter that would change an answer here, or do nothing; and why."""

_Result = TypeVar("_Result")


@register_model(MODEL_TYPE)
class EvictingLM(HFLM):
    """A transformers model that answers from compressed contexts, as an adapter of the harness.

    pretrained: a hub name, a folder, or a loaded model; other `options` are those of the harness's "hf" adapter.
    policy: a `Policy`, or a name with its `budget` and parts as of `defensivekv.policy`; "full" is the stock model
    with its stock cache. query_aware: contexts are compressed with their question in sight. context_field: the
    document's field that holds the context; None: see `split_prompt`. batch_size: continuations scored in one
    forward pass; answers are generated one at a time.

    Context and question are tokenised separately, for every policy alike. Where a prompt cannot be divided into
    them, or anything fails, the run stops: see `generate_until`, `loglikelihood`.

    Raises UnknownPolicyError, BudgetError, UnsupportedModelError, and InvalidInputError for options that cannot be
    honoured.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        policy: Policy | str = "layer-defensivekv",
        budget: float | int | str | Budget | None = None,
        scoring: str | None = None,
        aggregation: str | None = None,
        weighting: str | None = None,
        allocation: str | None = None,
        window_size: int | None = None,
        profile: str | None = None,
        query_aware: bool = False,
        context_field: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        for name, reason in _REFUSED.items():
            if options.get(name):
                raise InvalidInputError(f"{name} is not supported: {reason}")
        parts = {
            "scoring": scoring,
            "aggregation": aggregation,
            "weighting": weighting,
            "allocation": allocation,
            "window_size": window_size,
            "profile": profile,
        }
        given = {name: value for name, value in parts.items() if value is not None}
        if isinstance(policy, Policy):
            if budget is not None or given:
                raise InvalidInputError("the policy has its budget and options already: pass a name to set them here")
            self.policy = policy
        else:
            self.policy = make_policy(policy, budget, **given)  # type: ignore[arg-type]
        if self.policy.budget.kind == "bytes":
            check_evicts_in_steps(self.policy)
        self.query_aware, self.context_field = query_aware, context_field
        try:
            rows = 1 if batch_size is None else int(batch_size)
        except ValueError:
            rows = 0
        if rows < 1:
            raise InvalidInputError(f"batch_size {batch_size!r} must be a number of rows, at least 1")
        super().__init__(pretrained, batch_size=rows, **options)
        if self.world_size > 1:
            raise InvalidInputError(f"{self.world_size} processes: run one, contexts are not shared between them")
        if self.backend != "causal":
            raise InvalidInputError(f"backend {self.backend!r}: only decoder-only models can be evicted from")
        if not self._is_stock:
            check_supported(self.model)
        self.held: list[Held] = []
        """What was kept of each context, in the order in which they were read."""

    @property
    def _is_stock(self) -> bool:
        return self.policy.name == "full"

    def get_model_info(self) -> dict[str, Any]:
        """The harness's facts of the model, with ours; the harness writes them into its results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"defensivekv": self.describe()}

    def describe(self) -> dict[str, Any]:
        """What makes results comparable: policy, parts, budget asked and achieved so far, split, versions."""
        return describe(self.policy, self.held, query_aware=self.query_aware, context_field=self.context_field)

    # ------------------------------------------------------------------ what the harness asks for

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first of their stop texts.

        Raises InvalidInputError for prompts that cannot be divided, settings that are not greedy, and texts past the
        model's positions; any other failure as DefensiveKVError. Nothing has been read when a prompt is refused.
        """
        jobs = []
        for request in requests:
            with _naming(request):
                prompt, given = request.args[:2]
                settings = generation_settings(given, self.max_gen_toks, end=self._end)
                split = self._split(prompt, request)
                jobs.append((self._divide(split, self._encode(split.question)), split, settings))

        def answer(cache: AnyCache, ids: list[int], members: Sequence[int]) -> Iterator[tuple[int, str]]:
            for index in members:
                (_, asked), _, settings = jobs[index]
                with _naming(requests[index]):
                    text = self._answer(cache, [*ids, *asked], settings.until, settings.max_new_tokens)
                yield index, text

        keys = [(tuple(held), self._suffix(split)) for (held, _), split, _ in jobs]
        spare = [len(asked) + settings.max_new_tokens for (_, asked), _, settings in jobs]
        return self._from_contexts("generate_until", requests, keys, spare, answer, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one.

        All continuations of a context start from forks of the same cache. Question and continuation are tokenised
        together and then divided, as the harness does it. Raises as `generate_until`.
        """
        jobs = []
        for request in requests:
            with _naming(request):
                prompt, continuation = request.args[:2]
                split = self._split(prompt, request)
                question, target = self._encode_continuation(split.question, continuation)
                if not target:
                    raise InvalidInputError(f"the continuation {continuation!r} has no tokens")
                jobs.append((self._divide(split, question), split, target))

        def score(cache: AnyCache, ids: list[int], members: Sequence[int]) -> Iterator[tuple[int, tuple[float, bool]]]:
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                with _naming(requests[chosen[0]]):
                    rows = [(jobs[index][0][1], jobs[index][2]) for index in chosen]
                    scores = score_continuations(self.model, cache, rows)
                yield from zip(chosen, scores, strict=True)

        keys = [(tuple(held), self._suffix(split)) for (held, _), split, _ in jobs]
        spare = [len(asked) + len(target) for (_, asked), _, target in jobs]
        return self._from_contexts("loglikelihood", requests, keys, spare, score, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refused: a text that is scored as a whole has no question, so there is nothing to compress before it."""
        names = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise InvalidInputError(
            f"task {names}: a rolling log-likelihood has no context apart from its question, so there is nothing to "
            "compress: leave the task out"
        )

    # ------------------------------------------------------------------ contexts

    def _from_contexts(
        self,
        kind: str,
        requests: list[Instance],
        keys: list[tuple[tuple[int, ...], str]],
        spare: list[int],
        run: Callable[[AnyCache, list[int], Sequence[int]], Iterator[tuple[int, _Result]]],
        disable_tqdm: bool,
    ) -> list[_Result]:
        """Reads each context once and runs what asks about it; results in the order of the requests."""
        groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(key, []).append(index)
        maximum = min(filter(None, (max_positions(self.model), self._max_length)), default=None)
        for index, (held, _) in enumerate(keys):
            needed = len(held) + spare[index]
            if maximum is not None and needed > maximum:
                with _naming(requests[index]):
                    raise InvalidInputError(
                        f"context, question and answer: {needed} tokens, but the model has {maximum} positions; use a "
                        "task with shorter documents, or another model"
                    )
        results: dict[int, _Result] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc=f"Running {kind} requests") as bar:
            try:
                for (held, suffix), members in groups.items():
                    ids = list(held)
                    with _naming(requests[members[0]]):
                        cache = self._read(ids, suffix)
                    for index, result in run(cache, ids, members):
                        results[index] = result
                        self.cache_hook.add_partial(kind, requests[index].args, result)
                        bar.update()
            finally:
                disable(self.model)
        return [results[index] for index in range(len(requests))]

    @torch.no_grad()
    def _read(self, ids: list[int], suffix: str) -> AnyCache:
        """The context in a cache, compressed; "full": by the stock model in its stock cache."""
        tokens = torch.tensor([ids], device=self.model.device)
        if self._is_stock:
            disable(self.model)
            cache: AnyCache = DynamicCache(config=self.model.config)
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            self.held.append(Held(len(ids), 1.0, is_whole=True))
            return cache
        enable(self.model)
        cache = EvictingCache(self.model, self.policy)
        prefill(self.model, cache, tokens, tokenizer=self.tokenizer, suffix=suffix)
        report = cache.report()
        self.held.append(Held(len(ids), report.achieved, is_whole=all(report.kept_whole)))
        return cache

    def _answer(self, cache: AnyCache, ids: list[int], until: list[str], max_new_tokens: int) -> str:
        stopping = stop_sequences_criteria(self.tokenizer, until, len(ids), 1)
        tokens = torch.tensor([ids], device=self.model.device)
        new = generate_greedily(
            self.model, self.tokenizer, cache, tokens, max_new_tokens=max_new_tokens, stopping=stopping
        )
        text: str = postprocess_generated_text(self.tok_decode(new), until, None)
        return text

    # ------------------------------------------------------------------ texts and tokens

    def _split(self, prompt: Any, request: Instance) -> SplitPrompt:
        if not isinstance(prompt, str) or not isinstance(request.doc, dict):
            raise InvalidInputError("the prompt is not one text made of a document's fields: leave the task out")
        return split_prompt(prompt, request.doc, field=self.context_field, query_aware=self.query_aware)

    def _divide(self, split: SplitPrompt, question: list[int]) -> tuple[list[int], list[int]]:
        """Tokens that are read and compressed, and tokens that follow, at least one: it gives the first logits."""
        context: list[int] = self.tok_encode(split.context)
        if not context or not question:
            raise InvalidInputError(f"the {'question' if context else 'context'} has no tokens")
        return ([*context, *question[:-1]], question[-1:]) if self.query_aware else (context, question)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tok_encode(text, add_special_tokens=False)
        return ids

    def _encode_continuation(self, question: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's way: white space between the two belongs to the continuation."""
        ids = self._encode(question.rstrip())
        return ids, self._encode(question + continuation)[len(ids) :]

    def _suffix(self, split: SplitPrompt) -> str:
        """What ends the user's turn, where the prompt was made by the tokenizer's chat template; see `prefill`."""
        return self._ending if not self.query_aware and split.question.endswith(self._ending) else ""

    @cached_property
    def _ending(self) -> str:
        if not self.tokenizer.chat_template:
            return ""
        mark = uuid.uuid4().hex
        rendered: str = self.apply_chat_template([{"role": "user", "content": mark}])
        return rendered.partition(mark)[2]

    @property
    def _end(self) -> str | None:
        return None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, skip_special_tokens=False)


@contextmanager
def _naming(request: Instance) -> Iterator[None]:
    """Around what is done for a request: every failure stops the run, typed, and says where it happened."""
    where = f"task {request.task_name!r}, document {request.doc_id}"
    try:
        yield
    except DefensiveKVError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:  # models fail in many ways, and none of them is an answer
        raise DefensiveKVError(f"{where}: {type(error).__name__}: {error}") from error
