from collections.abc import Mapping
from typing import Any

import pytest

from defensivekv.bench.plan import RIVALS, make_plan
from defensivekv.bench.sizes import format_tokens, parse_memory, parse_tokens
from defensivekv.errors import BudgetError, DefensiveKVError, InvalidInputError, UnknownPolicyError


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("4k", 4096), ("0.5K", 512), (" 128k ", 131072)])
def test_lengths_are_read_as_people_write_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens
    assert parse_tokens(format_tokens(tokens)) == tokens


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"lengths": ["many"]}, InvalidInputError, "give for example 4096 or 32k"),
        ({"lengths": ["0"]}, InvalidInputError, "no number of tokens"),
        ({"shape": "llama-9"}, InvalidInputError, "unknown shape 'llama-9': known are llama-3.2-1b"),
        ({"shape": "tiny", "model": "folder"}, InvalidInputError, "give one of them"),
        ({"rivals": ["stock", "vllm"]}, InvalidInputError, "unknown rival 'vllm': known are compiled, stock, static"),
        ({"memory": "plenty"}, InvalidInputError, "give for example 16GiB"),
        ({"memory": "0.2"}, InvalidInputError, "give for example 16GiB"),
        ({"dtype": "int8"}, InvalidInputError, "unknown dtype 'int8'"),
        ({"budgets": ["64MiB"]}, InvalidInputError, "give shares"),
        ({"budgets": ["auto:0.9"]}, InvalidInputError, "give shares"),
        ({"budgets": ["2.5"]}, BudgetError, "above one"),
        ({"policies": ["snapkw"]}, UnknownPolicyError, "snapkv"),
        ({"what": ["speed"]}, InvalidInputError, "what.0"),
        ({"batch_sizes": ["0"]}, InvalidInputError, "batch_sizes.0"),
        ({"pythons": {"stock": "python"}}, InvalidInputError, "run in a Python of their own"),
        ({"layerz": 2}, InvalidInputError, "layerz"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    fields: Mapping[str, Any], error: type[DefensiveKVError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_plan(fields)


def test_memory_is_read_in_bytes() -> None:
    assert parse_memory("16GiB") == 16 * 2**30
    assert make_plan({"memory": "1GB"}).memory_bytes == 10**9


def test_all_rivals_and_none_are_spelt_out() -> None:
    assert make_plan({}).rival_names == RIVALS
    assert make_plan({"rivals": ["none"]}).rival_names == ()
    assert make_plan({"rivals": ["kvpress", "all"]}).rival_names[0] == "kvpress"


def test_a_quick_plan_is_tiny_but_for_what_is_named() -> None:
    plan = make_plan({"lengths": ["256"]}, quick=True)
    assert (plan.shape, plan.tokens, plan.repeats) == ("tiny", (256,), 2)
    assert make_plan({"model": "folder"}, quick=True).shape is None
