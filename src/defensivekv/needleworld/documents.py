"""Documents of the needle world: filler sentences with facts hidden among them.

special number misty harbor 47 83 .                 a needle: key phrase, value of two words
special number second golden kettle 12 56 .         one of several values of a key
store 31 07 alef .    copy alef bario .             a variable chain
recall misty harbor 47 83 .                         a fact repeated later in the document
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from random import Random

from defensivekv.needleworld.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    BOS,
    DETERMINERS,
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    FILLER_VERBS,
    NOUNS,
    NUMBERS,
    ORDINALS,
    PREPOSITIONS,
    VARIABLES,
)

Words = tuple[str, ...]
_POOL_SIZE = 8000
_POOL_SEED = 20_251_013


@dataclass(frozen=True)
class Needle:
    """A key phrase, an ordinal in front where the key has several values, and one value of it."""

    key: Words
    value: tuple[str, str]

    @property
    def fact(self) -> Words:
        """Key and value."""
        return (*self.key, *self.value)


@dataclass(frozen=True)
class Chain:
    """A value stored in a variable that is copied into others."""

    value: tuple[str, str]
    variables: Words

    @property
    def statements(self) -> tuple[Words, ...]:
        """The chain's sentences in order."""
        head = ("store", *self.value, self.variables[0], ".")
        copies = (("copy", a, b, ".") for a, b in pairwise(self.variables))
        return (head, *copies)


@dataclass(frozen=True)
class Document:
    """words: the text, `<bos>` first. recalled: positions of values that can be known from before them."""

    words: Words
    needles: tuple[Needle, ...]
    chains: tuple[Chain, ...]
    recalled: tuple[int, ...]


def draw_needles(rng: Random, num_keys: int, num_several: int = 0, *, similar: bool = False) -> list[Needle]:
    """Needles of `num_keys` distinct keys; the first `num_several` keys have three values each, one after the other.

    similar: keys share few nouns, so that half a key is not enough to find one. Keys of three values have a noun of
    their own among each other: a model of this size matches two of the words before a value, and not three.
    """
    nouns = rng.sample(NOUNS, max(4, num_several, num_keys // 3)) if similar else list(NOUNS)
    keys: dict[tuple[str, str], None] = {}
    while len(keys) < num_keys:
        key = rng.choice(ADJECTIVES), rng.choice(nouns)
        if len(keys) >= num_several or key[1] not in {noun for _, noun in keys}:
            keys[key] = None
    phrases: list[Words] = []
    for number, key in enumerate(keys):
        phrases += [(ordinal, *key) for ordinal in ORDINALS] if number < num_several else [key]
    return [Needle(phrase, _value(rng)) for phrase in phrases]


def draw_chains(rng: Random, num_chains: int) -> list[Chain]:
    """Chains of three variables each; no variable and no value belongs to two."""
    variables = rng.sample(VARIABLES, 3 * num_chains)
    starts = rng.sample(NUMBERS, num_chains)
    return [Chain((start, rng.choice(NUMBERS)), tuple(variables[3 * i : 3 * i + 3])) for i, start in enumerate(starts)]


def write_document(
    rng: Random, num_tokens: int, needles: list[Needle], chains: list[Chain] | None = None, num_recalls: int = 0
) -> Document:
    """A document of exactly `num_tokens` words: the facts in random places, chains in their order, filler between.

    num_recalls: facts repeated somewhere after their needle. Raises ValueError where the facts do not fit.
    """
    facts: list[Words] = [("special", "number", *needle.fact, ".") for needle in needles]
    recalls = [rng.randrange(len(needles)) for _ in range(num_recalls)] if needles else []
    chains = chains or []
    statements = [statement for chain in chains for statement in chain.statements]
    repeats: list[Words] = [("recall", *needles[number].fact, ".") for number in recalls]
    room = num_tokens - 1 - sum(map(len, (*facts, *statements, *repeats)))
    if room < 0:
        raise ValueError(f"the facts need {num_tokens - room} words, more than {num_tokens}: ask for a longer document")
    sentences: list[tuple[int | None, Words]] = [(i, fact) for i, fact in enumerate(facts)]
    sentences += [(None, sentence) for sentence in _filler(rng, room)]
    rng.shuffle(sentences)
    for chain in chains:
        places = sorted(rng.randint(0, len(sentences)) for _ in chain.statements)
        for shift, (place, statement) in enumerate(zip(places, chain.statements, strict=True)):
            sentences.insert(place + shift, (None, statement))
    for number, recall in zip(recalls, repeats, strict=True):
        place = next(i for i, (fact, _) in enumerate(sentences) if fact == number)
        sentences.insert(rng.randint(place + 1, len(sentences)), (None, recall))
    words: list[str] = [BOS]
    recalled: list[int] = []
    for _, sentence in sentences:
        if sentence[0] == "recall":
            end = len(words) + len(sentence)
            recalled += [end - 3, end - 2]
        words += sentence
    return Document(tuple(words), tuple(needles), tuple(chains), tuple(recalled))


def _value(rng: Random) -> tuple[str, str]:
    return rng.choice(NUMBERS), rng.choice(NUMBERS)


def _filler(rng: Random, num_words: int) -> list[Words]:
    pool = _sentence_pool()
    sentences: list[Words] = []
    while num_words > 0:
        sentence = rng.choice(pool)[-num_words:]
        sentences.append(sentence)
        num_words -= len(sentence)
    return sentences


@cache
def _sentence_pool() -> tuple[Words, ...]:
    """Sentences of a small grammar in which nouns prefer some verbs, and verbs some objects."""
    rng = Random(_POOL_SEED)
    verbs = {noun: rng.sample(FILLER_VERBS, 6) for noun in FILLER_NOUNS}
    objects = {verb: rng.sample(FILLER_NOUNS, 8) for verb in FILLER_VERBS}
    adjectives = {noun: rng.sample(FILLER_ADJECTIVES, 4) for noun in FILLER_NOUNS}

    def sentence() -> Words:
        subject = FILLER_NOUNS[int(len(FILLER_NOUNS) * rng.random() ** 2)]
        verb = rng.choice(verbs[subject])
        thing = rng.choice(objects[verb])
        words = [rng.choice(DETERMINERS)]
        words += [rng.choice(adjectives[subject])] if rng.random() < 0.5 else []
        words += [subject, verb, rng.choice(DETERMINERS)]
        words += [rng.choice(adjectives[thing])] if rng.random() < 0.3 else []
        words += [thing]
        words += (
            [rng.choice(PREPOSITIONS), rng.choice(DETERMINERS), rng.choice(FILLER_NOUNS)] if rng.random() < 0.4 else []
        )
        words += [rng.choice(ADVERBS)] if rng.random() < 0.3 else []
        return (*words, ".")

    return tuple(sentence() for _ in range(_POOL_SIZE))
