"""Training batches: documents with questions, and dense key-value recall."""

from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.needleworld.documents import Chain, Document, Needle, draw_chains, draw_needles, write_document
from defensivekv.needleworld.questions import ask_chain, ask_needles
from defensivekv.needleworld.vocabulary import ADJECTIVES, BOS, NOUNS, NUMBERS, ORDINALS, TOKEN_IDS, VARIABLES

OTHER_WEIGHT = 0.1
"""Loss weight of tokens that are no answer."""

QUESTION_WIDTHS = (1, 1, 1, 1, 2, 3, 4)
"""How many needles each needle question of a row asks for; the same for all rows, so that they share a mask."""

NUM_CHAIN_QUESTIONS = 2


@dataclass(frozen=True)
class Batch:
    """ids (b, t). answer: (b, t) True where the token is a part of a reply or a recall. document: its tokens."""

    ids: Int[Tensor, "b t"]
    answer: Bool[Tensor, "b t"]
    positions: Int[Tensor, " t"]
    document: int
    mask: Bool[Tensor, "question t"]

    @property
    def weights(self) -> Float[Tensor, "b t"]:
        """Loss weights."""
        return torch.where(self.answer, 1.0, OTHER_WEIGHT)


def document_batch(rng: Random, num_rows: int, num_tokens: int, max_keys: int) -> Batch:
    """Documents of `num_tokens` tokens with questions of every kind that fit."""
    with_chains = num_tokens >= 96 and rng.random() < 0.6
    rows = [_document_row(rng, num_tokens, max_keys, with_chains) for _ in range(num_rows)]
    lengths = [len(words) for words, _ in rows[0][1]]
    ids, answers = [], []
    for document, exchanges in rows:
        words, flags = list(document.words), [False] * num_tokens
        for position in document.recalled:
            flags[position] = True
        for text, is_answer in exchanges:
            words += text
            flags += is_answer
        ids.append([TOKEN_IDS[word] for word in words])
        answers.append(flags)
    return _batch(ids, answers, num_tokens, lengths)


def recall_batch(rng: Random, num_rows: int, num_tokens: int = 72) -> Batch:
    """Multi-query associative recall: keys and values over and over in changing order, no filler (arXiv 2312.04927).

    Dense in what is to be learned, which is what makes retrieval emerge early.
    """
    ids, answers = [], []
    for _ in range(num_rows):
        cells = _recall_cells(rng)
        words, flags, is_first = [BOS], [False], True
        while len(words) < num_tokens:
            rng.shuffle(cells)
            for key, value in cells:
                words += [*key, *value]
                flags += [False] * len(key) + [not is_first] * len(value)
            is_first = False
        ids.append([TOKEN_IDS[word] for word in words[:num_tokens]])
        answers.append(flags[:num_tokens])
    return _batch(ids, answers, num_tokens, [])


def _document_row(
    rng: Random, num_tokens: int, max_keys: int, with_chains: bool
) -> tuple[Document, list[tuple[list[str], list[bool]]]]:
    needles = _draw(rng, num_tokens, max_keys, with_chains)
    chains = draw_chains(rng, rng.randint(1, 2 if num_tokens < 256 else 3)) if with_chains else []
    num_recalls = rng.randint(0, min(6, num_tokens // 100))
    document = write_document(rng, num_tokens, needles, chains, num_recalls)
    exchanges = [_exchange(*_needle_question(rng, needles, width)) for width in QUESTION_WIDTHS]
    if with_chains:
        exchanges += [_exchange(*_chain_question(rng, chains)) for _ in range(NUM_CHAIN_QUESTIONS)]
    return document, exchanges


def _draw(rng: Random, num_tokens: int, max_keys: int, with_chains: bool) -> list[Needle]:
    room = (num_tokens - 1 - 7 * min(6, num_tokens // 100) - (48 if with_chains else 0)) // 9
    count = rng.randint(min(4, max_keys), max(4, min(max_keys, room)))
    similar = rng.random() < 0.4
    if rng.random() < 0.4 and count >= 4:
        several = rng.randint(1, count // 3)
        needles = draw_needles(rng, several + count - 3 * several, len(ORDINALS), similar=similar)
        return needles[: 3 * several] + needles[3 * several :: len(ORDINALS)]
    return draw_needles(rng, count, similar=similar)


def _needle_question(rng: Random, needles: list[Needle], width: int) -> tuple[str, str]:
    several = [i for i, needle in enumerate(needles) if needle.ordinal == ORDINALS[2]]
    if width == 3 and several:
        last = rng.choice(several)
        question = ask_needles(needles[last - 2 : last + 1], "multi_value")
    else:
        question = ask_needles(rng.sample(needles, width), "multi_query")
    return question.text, question.reply


def _chain_question(rng: Random, chains: list[Chain]) -> tuple[str, str]:
    question = ask_chain(rng.choice(chains))
    return question.text, question.reply


def _exchange(text: str, reply: str) -> tuple[list[str], list[bool]]:
    asked, replied = text.split(), reply.split()
    return asked + replied, [False] * len(asked) + [True] * len(replied)


def _recall_cells(rng: Random) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    if rng.random() < 0.5:
        keys = rng.sample(NOUNS + VARIABLES, rng.randint(3, 10))
        return [((key,), (rng.choice(NUMBERS),)) for key in keys]
    nouns = rng.sample(NOUNS, rng.randint(2, 4))
    keys_of_two = {(rng.choice(ADJECTIVES), rng.choice(nouns)) for _ in range(rng.randint(2, 6))}
    return [((*key, rng.choice(ORDINALS)), (rng.choice(NUMBERS), rng.choice(NUMBERS))) for key in sorted(keys_of_two)]


def _batch(ids: list[list[int]], answers: list[list[bool]], document: int, lengths: list[int]) -> Batch:
    asked = sum(lengths)
    mask = torch.ones(asked, document + asked, dtype=torch.bool)
    mask[:, document:] = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool() if lengths else True
    positions = [torch.arange(document), *(document + torch.arange(n) for n in lengths)]
    return Batch(torch.tensor(ids), torch.tensor(answers), torch.cat(positions), document, mask)
