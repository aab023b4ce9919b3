"""Training batches: documents with questions, and dense key-value recall."""

from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.needleworld.documents import Document, draw_chains, draw_needles, write_document
from defensivekv.needleworld.questions import Question, ask_chain, ask_needles
from defensivekv.needleworld.vocabulary import ADJECTIVES, BOS, NOUNS, NUMBERS, ORDINALS, TOKEN_IDS, VARIABLES

OTHER_WEIGHT = 0.1
"""Loss weight of tokens that are no reply."""

QUESTION_WIDTHS = (1, 1, 1, 1, 2, 3, 4)
"""How many needles each needle question of a row asks for; the same for all rows, so that they share a mask."""

FEW_SHARE, FEW_WIDTHS = 0.15, (1, 1, 1, 1)
"""Batches of documents with one to three needles, which are asked for one at a time."""

NUM_CHAIN_QUESTIONS = 2
CHAIN_SHARE = 0.5
_CHAIN_WORDS = 13

OTHER, COPIED, VALUE, LINK = range(4)
"""Kinds of tokens: text; a reply's words that the question holds; the value of a needle; a variable of a chain."""


@dataclass(frozen=True)
class Batch:
    """ids, kinds: (b, t). positions: (t,). document: its tokens. mask: (t - document, t), what a question may read."""

    ids: Int[Tensor, "b t"]
    kinds: Int[Tensor, "b t"]
    positions: Int[Tensor, " t"]
    document: int
    mask: Bool[Tensor, "question t"]

    @property
    def weights(self) -> Float[Tensor, "b t"]:
        """Loss weights."""
        return torch.where(self.kinds == OTHER, OTHER_WEIGHT, 1.0)


def document_batch(rng: Random, num_rows: int, num_tokens: int, max_keys: int) -> Batch:
    """Documents of `num_tokens` tokens with questions of every kind that fit."""
    with_chains = rng.random() < CHAIN_SHARE
    with_few = rng.random() < FEW_SHARE
    with_several = not with_few and (num_tokens >= 128 or not with_chains) and rng.random() < 0.5
    ids, kinds = [], []
    lengths: list[int] = []
    for _ in range(num_rows):
        document, questions = _document_row(rng, num_tokens, 3 if with_few else max_keys, with_chains, with_several)
        words, row_kinds = list(document.words), [OTHER] * num_tokens
        for position in document.recalled:
            row_kinds[position] = VALUE
        lengths = []
        for question in questions:
            asked, replied = question.text.split(), question.reply.split()
            words += asked + replied
            row_kinds += [OTHER] * len(asked) + _reply_kinds(question)
            lengths.append(len(asked) + len(replied))
        ids.append([TOKEN_IDS[word] for word in words])
        kinds.append(row_kinds)
    return _batch(ids, kinds, num_tokens, lengths)


def recall_batch(rng: Random, num_rows: int, ordinal_share: float = 0.2, num_tokens: int = 72) -> Batch:
    """Multi-query associative recall: keys and values over and over in changing order, no filler (arXiv 2312.04927).

    Dense in what is to be learned, which is what makes retrieval emerge early. ordinal_share: of rows whose keys have
    several values each, the hardest kind.
    """
    ids, kinds = [], []
    for _ in range(num_rows):
        cells = _recall_cells(rng, ordinal_share)
        words, row_kinds, is_first = [BOS], [OTHER], True
        while len(words) < num_tokens:
            rng.shuffle(cells)
            for key, value in cells:
                words += [*key, *value]
                row_kinds += [OTHER] * len(key) + [OTHER if is_first else VALUE] * len(value)
            is_first = False
        ids.append([TOKEN_IDS[word] for word in words[:num_tokens]])
        kinds.append(row_kinds[:num_tokens])
    return _batch(ids, kinds, num_tokens, [])


def _reply_kinds(question: Question) -> list[int]:
    """A needle's reply is `index key value`, a chain's `chain value variable` and `copy variable variable` twice."""
    words = question.reply.split()
    if words[0] == "chain":
        return [LINK if number in (3, 6, 9) else COPIED for number in range(len(words))]
    return [VALUE if word in NUMBERS else COPIED for word in words]


def _document_row(
    rng: Random, num_tokens: int, max_keys: int, with_chains: bool, with_several: bool
) -> tuple[Document, list[Question]]:
    chains = draw_chains(rng, rng.randint(1, 1 + min(2, num_tokens // 128))) if with_chains else []
    num_recalls = rng.randint(0, min(6, num_tokens // 100))
    room = num_tokens - 1 - 8 * num_recalls - _CHAIN_WORDS * len(chains)
    widths = FEW_WIDTHS if max_keys < max(QUESTION_WIDTHS) else QUESTION_WIDTHS
    fitting = (room - 7 * max(widths)) // 24
    num_several = rng.randint(1, max(1, min(max_keys // 6, fitting))) if with_several else 0
    most = min(max_keys, (room - 24 * num_several) // 7)
    num_single = rng.randint(max(*widths, most // 3), max(*widths, most))
    needles = draw_needles(rng, num_several + num_single, num_several, similar=rng.random() < 0.4)
    document = write_document(rng, num_tokens, needles, chains, num_recalls)
    several, single = needles[: 3 * num_several], needles[3 * num_several :]
    questions = [ask_needles(rng.sample(single, width), "multi_query") for width in widths]
    if several:
        first = 3 * rng.randrange(num_several)
        questions[:2] = [ask_needles([rng.choice(several)], "multi_value") for _ in range(2)]
        questions[QUESTION_WIDTHS.index(3)] = ask_needles(several[first : first + 3], "multi_value")
    return document, questions + [ask_chain(rng.choice(chains)) for _ in range(NUM_CHAIN_QUESTIONS if chains else 0)]


def _recall_cells(rng: Random, ordinal_share: float) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Keys and values of every kind that documents have: numbers by phrases, variables by numbers and by variables."""
    kind = rng.random() / (1 - ordinal_share)
    if kind < 3 / 8:
        keys = rng.sample(NOUNS + VARIABLES, rng.randint(3, 10))
        values = VARIABLES if kind < 1 / 8 else NUMBERS
        return [((key,), (rng.choice(values),)) for key in keys]
    if kind < 5 / 8:
        numbers = sorted({(rng.choice(NUMBERS[:10]), rng.choice(NUMBERS)) for _ in range(rng.randint(3, 7))})
        return [(pair, (rng.choice(VARIABLES),)) for pair in numbers]
    nouns = rng.sample(NOUNS, rng.randint(2, 4))
    pairs = sorted({(rng.choice(ADJECTIVES), rng.choice(nouns)) for _ in range(rng.randint(3, 7))})
    if kind < 1:
        return [(pair, (rng.choice(NUMBERS), rng.choice(NUMBERS))) for pair in pairs]
    return [
        ((ordinal, *pair), (rng.choice(NUMBERS), rng.choice(NUMBERS))) for pair in pairs[:2] for ordinal in ORDINALS
    ]


def _batch(ids: list[list[int]], kinds: list[list[int]], document: int, lengths: list[int]) -> Batch:
    asked = sum(lengths)
    mask = torch.ones(asked, document + asked, dtype=torch.bool)
    mask[:, document:] = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool() if lengths else True
    positions = [torch.arange(document), *(document + torch.arange(n) for n in lengths)]
    return Batch(torch.tensor(ids), torch.tensor(kinds), torch.cat(positions), document, mask)
