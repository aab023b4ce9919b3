from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.needleworld.documents import Document, draw_chains, draw_needles, write_document
from defensivekv.needleworld.vocabulary import BOS, TOKEN_IDS, VOCABULARY


def _occurrences(document: Document, sentence: tuple[str, ...]) -> list[int]:
    words, size = document.words, len(sentence)
    return [i for i in range(len(words) - size + 1) if words[i : i + size] == sentence]


@given(seed=st.integers(0, 10**6), keys=st.integers(1, 12), chains=st.integers(0, 3), recalls=st.integers(0, 4))
def test_a_document_has_the_length_asked_for_and_holds_every_fact_once(
    seed: int, keys: int, chains: int, recalls: int
) -> None:
    rng = Random(seed)
    needles = draw_needles(rng, keys, num_several=keys // 3)
    document = write_document(rng, 400, needles, draw_chains(rng, chains), recalls)
    assert len(document.words) == 400
    assert document.words[0] == BOS
    assert all(word in TOKEN_IDS for word in document.words)
    for needle in needles:
        assert len(_occurrences(document, ("special", "number", *needle.fact, "."))) == 1
    for chain in document.chains:
        places = [_occurrences(document, statement) for statement in chain.statements]
        assert all(len(place) == 1 for place in places)
        assert places == sorted(places), "a variable is set before it is copied"


@given(seed=st.integers(0, 10**6))
def test_what_is_recalled_stood_earlier_in_the_document(seed: int) -> None:
    rng = Random(seed)
    document = write_document(rng, 300, draw_needles(rng, 6, num_several=2), num_recalls=4)
    assert len(document.recalled) == 8
    values = {needle.value: needle for needle in document.needles}
    for first, second in zip(document.recalled[::2], document.recalled[1::2], strict=True):
        value = (document.words[first], document.words[second])
        assert second == first + 1
        sentence = ("special", "number", *values[value].fact, ".")
        assert _occurrences(document, sentence)[0] < first


@given(seed=st.integers(0, 10**6), similar=st.booleans())
def test_keys_are_distinct_and_only_the_first_have_several_values(seed: int, similar: bool) -> None:
    needles = draw_needles(Random(seed), 9, num_several=2, similar=similar)
    assert [len(needle.key) for needle in needles] == [3] * 6 + [2] * 7
    assert len({needle.key for needle in needles}) == 13
    assert len({needle.key[-2:] for needle in needles}) == 9
    if similar:
        assert len({needle.key[-1] for needle in needles}) <= 4


@given(seed=st.integers(0, 10**6))
def test_no_variable_and_no_first_number_belongs_to_two_chains(seed: int) -> None:
    chains = draw_chains(Random(seed), 3)
    assert len({variable for chain in chains for variable in chain.variables}) == 9
    assert len({chain.value[0] for chain in chains}) == 3


def test_facts_that_do_not_fit_are_refused_with_what_they_need() -> None:
    rng = Random(0)
    with pytest.raises(ValueError, match="need 141 words, more than 100"):
        write_document(rng, 100, draw_needles(rng, 20))


def test_no_word_stands_twice_in_the_vocabulary() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == len(TOKEN_IDS)
