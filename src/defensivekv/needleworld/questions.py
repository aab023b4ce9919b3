"""Questions about a document, the replies a model should give, and how a reply is scored.

question one misty harbor two second golden kettle answer
one misty harbor 47 83 two second golden kettle 12 56 <end>
question chain 31 07 answer
chain 31 07 alef copy alef bario copy bario cendo <end>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from defensivekv.needleworld.documents import Chain, Document, Needle, draw_chains, draw_needles, write_document
from defensivekv.needleworld.vocabulary import BOS, END, INDICES

TASKS = ("single_key", "multi_key", "multi_value", "multi_query", "variable_chain")
"""Tasks of the suite, after RULER (arXiv 2404.06654)."""

MAX_NEW_TOKENS = 26
"""Enough for the longest reply: four entries of six words, and the end."""

_MIN_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """text: what is asked. answer: the references; each must appear in the reply. reply: a perfect reply."""

    text: str
    answer: tuple[str, ...]
    task: str
    reply: str


@dataclass(frozen=True)
class Sample:
    """A document and questions about it. The document's text leaves out `<bos>`, which the tokenizer adds."""

    document: str
    questions: tuple[Question, ...]
    task: str
    seed: int


def ask_needles(needles: Sequence[Needle], task: str) -> Question:
    """Asks for the values of one to four needles."""
    entries = list(zip(INDICES, needles, strict=False))
    asked = [f"{index} {' '.join(needle.key)}" for index, needle in entries]
    reply = [f"{index} {' '.join(needle.fact)}" for index, needle in entries]
    return Question(
        text=f"question {' '.join(asked)} answer",
        answer=tuple(" ".join(needle.value) for needle in needles),
        task=task,
        reply=f"{' '.join(reply)} {END}",
    )


def ask_chain(chain: Chain, task: str = "variable_chain") -> Question:
    """Asks for all variables that hold a value."""
    value = " ".join(chain.value)
    copies = [f"copy {a} {b}" for a, b in pairwise(chain.variables)]
    return Question(
        text=f"question chain {value} answer",
        answer=chain.variables,
        task=task,
        reply=f"chain {value} {chain.variables[0]} {' '.join(copies)} {END}",
    )


def make_sample(task: str, *, num_tokens: int, seed: int, num_questions: int = 4) -> Sample:
    """A document of exactly `num_tokens` tokens, `<bos>` counted, and questions about it; the same for one seed.

    A document of `single_key` holds one needle, so there is one question about it, whatever `num_questions`; one of
    `multi_value` has four keys of three values, one of `variable_chain` two chains.
    Raises ValueError for an unknown task or a document of fewer than 256 tokens.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: known are {', '.join(TASKS)}")
    if num_tokens < _MIN_TOKENS:
        raise ValueError(f"{num_tokens} tokens are too few for the facts: ask for at least {_MIN_TOKENS}")
    if num_questions < 1:
        raise ValueError("ask for at least one question")
    rng = Random(f"{task}/{num_tokens}/{seed}")
    num_keys = max(4, round(20 * num_tokens / 1024))
    questions: list[Question]
    if task == "variable_chain":
        chains = draw_chains(rng, 2)
        document = write_document(rng, num_tokens, draw_needles(rng, 2), chains)
        questions = [ask_chain(chain) for chain in chains]
    elif task == "single_key":
        document = write_document(rng, num_tokens, draw_needles(rng, 1))
        questions = [ask_needles(document.needles, task)]
    elif task == "multi_value":
        document = write_document(rng, num_tokens, draw_needles(rng, 4 + num_keys // 4, num_several=4))
        questions = [ask_needles(document.needles[3 * i : 3 * i + 3], task) for i in range(4)]
    else:
        document = write_document(rng, num_tokens, draw_needles(rng, num_keys, similar=rng.random() < 0.5))
        width = 4 if task == "multi_query" else 1
        questions = [ask_needles(rng.sample(document.needles, width), task) for _ in range(num_questions)]
    return Sample(text_of(document), tuple(questions[:num_questions]), task, seed)


def text_of(document: Document) -> str:
    """The document as text; `<bos>` is left to the tokenizer."""
    assert document.words[0] == BOS
    return " ".join(document.words[1:])


def score(generated: str, answer: Sequence[str]) -> float:
    """The share of references that appear in the reply as whole words in a row (RULER's recall)."""
    padded = f" {' '.join(generated.split())} "
    return sum(f" {reference} " in padded for reference in answer) / len(answer)
