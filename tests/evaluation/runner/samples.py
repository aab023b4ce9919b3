"""Tasks, a tokenizer with a chat template and models that are small enough for tests of the runner."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

import defensivekv as dkv
from defensivekv.evaluation.records import Record
from defensivekv.evaluation.runner.cells import Cell, TaskFacts
from defensivekv.evaluation.runner.examiner import Examiner, Outcome
from defensivekv.evaluation.runner.plan import RunPlan, make_plan
from defensivekv.evaluation.tasks.needleworld import NeedleWorldTask
from defensivekv.evaluation.tasks.sample import Question, Sample, Unreadable
from tests.integrations.transformers.models import tiny_model

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>"]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """A token for each byte, so that texts join as their tokens do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    fast: PreTrainedTokenizerBase = FastTokenizer(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<|end|>"
    )
    fast.chat_template = template
    return fast


def byte_model(**changes: Any) -> PreTrainedModel:
    """A random model of the tokenizer's bytes."""
    return tiny_model("llama", vocab_size=261, **changes)


@cache
def packaged() -> Loaded:
    folder = dkv.demo_model()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def load_packaged(plan: RunPlan) -> Loaded:
    """The same model each time; for other processes, one of their own."""
    torch.set_num_threads(1)
    return packaged()


@dataclass(frozen=True)
class ListedTask:
    """A task of given samples."""

    listed: tuple[Sample | Unreadable, ...]
    name: str = "listed/task"
    suite: str = "listed"
    domain: str = "retrieval"
    metric: str = "word_recall"
    split: str = "own"
    revision: str = "1"
    not_comparable: str = ""
    length: int | None = None

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterable[Sample | Unreadable]:
        return iter(self.listed)


def needle_task(task: str = "multi_key", num_samples: int = 4, *, seed: int = 1) -> NeedleWorldTask:
    return NeedleWorldTask(task, 512, num_samples, seed)


def sample(number: int = 0, **changes: Any) -> Sample:
    """A document of its own length with two questions."""
    fields: dict[str, Any] = {
        "id": f"s{number}",
        "context": f"{number} " + "lorem ipsum dolor sit amet " * (4 + number),
        "questions": (Question("what is it?", ("ipsum",)), Question("and who?", ("dolor",))),
        "max_new_tokens": 6,
    }
    return Sample(**(fields | changes))


def plan_of(policies: list[Any], **fields: Any) -> RunPlan:
    return make_plan({"tasks": ["own"], "policies": policies, "budgets": [0.5]} | fields)


def examine(loaded: Loaded, plan: RunPlan, samples: list[Sample | Unreadable], **task: Any) -> list[Outcome]:
    """All samples as one window, under the plan's first policy."""
    examiner = Examiner(*loaded, plan)
    facts = TaskFacts.of(ListedTask(tuple(samples), **task), samples)
    try:
        return examiner.examine(Cell(facts, plan.settings()[0]), samples)
    finally:
        examiner.close()


def records_of(loaded: Loaded, plan: RunPlan, samples: list[Sample | Unreadable], **task: Any) -> list[Record]:
    return [outcome.record for outcome in examine(loaded, plan, samples, **task)]
