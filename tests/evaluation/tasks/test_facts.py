from random import Random

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.facts import draw_facts


def test_a_text_that_holds_a_fact_does_not_get_it_again() -> None:
    drawn = draw_facts(Random(1), 8, "")
    text = " ".join(fact.sentence for fact in drawn)

    again = draw_facts(Random(1), 8, text)
    # The same stream of draws, so that every number of the first time comes up and is passed over.
    assert not {fact.number for fact in again} & {fact.number for fact in drawn}
    assert not {fact.city for fact in again} & {fact.city for fact in drawn}
    assert len({fact.number for fact in drawn}) == len({fact.city for fact in drawn}) == 8


def test_a_text_of_all_cities_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="leaves 0 cities for 1 facts"):
        draw_facts(Random(1), 1, " ".join(fact.city for fact in draw_facts(Random(1), 60, "")))
