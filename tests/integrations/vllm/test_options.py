from typing import Any

import pytest

import defensivekv as dkv
from defensivekv.integrations.vllm.options import Options


def test_options_are_those_of_policy() -> None:
    options = Options.parse({"policy": "snapkv", "budget": 0.3, "window_size": 16, "aggregation": "defensive"})
    assert options.make_policy() == dkv.policy("snapkv", 0.3, window_size=16, aggregation="defensive")
    assert Options.parse({"budget": "20%"}).make_policy() == dkv.policy("defensivekv", "20%")
    assert Options.parse({"policy": "full"}).make_policy().budget.is_full


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, dkv.InvalidInputError, "give options, such as"),
        ([1], dkv.InvalidInputError, "give options, such as"),
        ({"budget": [0.2]}, dkv.InvalidInputError, "budget: "),
        ({"budget": True}, dkv.InvalidInputError, "budget: "),
        ({"policy": "snapkv", "budget": 0.2, "head_groups": 0}, dkv.InvalidInputError, "head_groups: "),
        ({"polcy": "snapkv", "budget": 0.2}, dkv.InvalidInputError, "did you mean 'policy'"),
        ({"policy": "snapkv", "budget": 0.2, "heads": 2}, dkv.InvalidInputError, "heads: .*known are policy, budget"),
        ({1: 2}, dkv.InvalidInputError, "additional_config"),
        ({"policy": "snapvk", "budget": 0.2}, dkv.UnknownPolicyError, "did you mean 'snapkv'"),
        ({"policy": "snapkv"}, dkv.BudgetError, "needs a budget"),
        ({"policy": "snapkv", "budget": 0}, dkv.BudgetError, "keeps nothing"),
        ({"policy": "snapkv", "budget": "auto:0.9"}, dkv.InvalidInputError, "not known when blocks are given out"),
        (
            {"policy": "snapkv", "budget": "64MiB"},
            dkv.InvalidInputError,
            "64.0 MiB cannot be served .* bounds all",
        ),
        ({"policy": "kvzip", "budget": 0.2}, dkv.InvalidInputError, "read a second time"),
        ({"policy": "h2o", "budget": 0.2}, dkv.InvalidInputError, "a chunk of the prompt shows a part"),
        ({"policy": "expected-attention", "budget": 0.2}, dkv.InvalidInputError, "a chunk of the prompt shows a part"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Options.parse(given)
