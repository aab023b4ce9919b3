"""Two tokenizers that differ as much as can be, samples of a task, and small data folders."""

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from defensivekv.evaluation.tasks.ruler import RulerTask, make_task
from defensivekv.evaluation.tasks.sample import Sample
from defensivekv.evaluation.tasks.task import TaskOptions
from defensivekv.needleworld import demo_model

SMALLEST = {
    "words": {"vt": 512, "cwe": 512, "qa_1": 512, "qa_2": 512},
    "pieces": {"vt": 1024, "cwe": 2048, "qa_1": 512, "qa_2": 512},
}
"""Lengths, powers of two, that hold a prompt; 512 where a task is not named."""


@cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """words: one token a word, most of them unknown. pieces: byte-level BPE, begins with a special token."""
    if name == "words":
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(demo_model())
        return loaded
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=splitter.alphabet())
    bpe.train_from_iterator([own_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=10**9)


def own_text() -> str:
    return (files("defensivekv.evaluation.tasks.ruler") / "data" / "essays.txt").read_text("utf-8")


def own_paragraphs() -> Any:
    return json.loads((files("defensivekv.evaluation.tasks.ruler") / "data" / "paragraphs.json").read_text("utf-8"))


def samples(name: str, length: int, kind: str = "words", count: int = 3, **options: Any) -> list[Sample]:
    """The first samples, none of them unreadable."""
    task = make_task(name, TaskOptions(num_samples=count, **options), length)
    found = list(islice(task.samples(tokenizer(kind)), count))
    assert all(isinstance(sample, Sample) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def num_tokens(kind: str, sample: Sample) -> int:
    """Of the whole prompt as one text, and of the answer."""
    question = sample.questions[0]
    text = sample.context + question.text + question.answer_prefix
    return len(tokenizer(kind)(text)["input_ids"]) + sample.max_new_tokens


def task(name: str, length: int = 1024, **options: Any) -> RulerTask:
    return make_task(name, TaskOptions(**options), length)


def write_json(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), "utf-8")


def squad(contexts: Sequence[str], qas: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """One article."""
    paragraphs = [{"context": c, "qas": list(q)} for c, q in zip(contexts, qas, strict=True)]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def qa(question: str, *answers: str, is_impossible: bool = False) -> dict[str, Any]:
    texts = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"question": question, "id": "0", "answers": texts, "is_impossible": is_impossible}
