import importlib.util
import json
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import defensivekv as dkv
from defensivekv.policies.aggregation import Mean
from defensivekv.policies.allocation import ByProfile
from defensivekv.policies.encoding import decode, encode
from defensivekv.policies.scoring import Recency
from tests.policies.cases import GENERIC


@pytest.mark.parametrize("name", [*GENERIC, "full", "kvzip"])
@pytest.mark.parametrize("budget", [0.2, Fraction(1, 3), 1024, "64MiB", "auto:0.9,min=0.1"])
def test_every_policy_comes_back_from_json_as_it_was(name: str, budget: Any) -> None:
    try:
        policy = dkv.policy(name, None if name == "full" else budget)
    except (dkv.BudgetError, dkv.InvalidInputError):
        return
    assert decode(json.loads(json.dumps(encode(policy), allow_nan=False))) == policy


def test_parts_with_fields_of_their_own_come_back() -> None:
    policy = dkv.policy("adakv", 0.3, window_size=7, aggregation="defensive", weighting="value-norm")
    assert decode(json.loads(json.dumps(encode(policy)))) == policy
    profile = replace(policy, allocation=ByProfile(((0.1, 0.9), (0.5, 0.25)), num_sinks=3))
    assert decode(json.loads(json.dumps(encode(profile)))) == profile


@dataclass(frozen=True)
class Oldest(Recency):
    """A scorer of one's own."""

    weight: float = 2.0


class Unwritable(Mean):
    """An aggregation with something that no file holds."""

    def __init__(self) -> None:
        object.__setattr__(self, "kernel_size", object())


def test_a_part_of_ones_own_is_written_by_its_full_name_and_asked_for_again() -> None:
    policy = replace(dkv.policy("snapkv", 0.3), scorer=Oldest(weight=3.0), weighting=None)
    values = encode(policy)
    scorer = values["fields"]["scorer"]
    assert (scorer["part"], scorer["fields"]) == (f"{__name__}.Oldest", {"weight": 3.0})
    with pytest.raises(dkv.InvalidInputError, match="Oldest' is no part of this package: pass policy="):
        decode(values)


EDITED = """
from dataclasses import dataclass
from tests.policies.test_encoding import Oldest


@dataclass(frozen=True)
class Newest(Oldest):
    factor: float = {factor}

    @property
    def sign(self) -> float:
        return {sign}
"""


def test_a_part_of_ones_own_is_told_by_its_code(tmp_path: Path) -> None:
    def written(name: str, **values: float) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text(EDITED.format(**values))
        spec = importlib.util.spec_from_file_location("edited", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["edited"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return encode(module.Newest(factor=1.0))

    try:
        first = written("first", factor=1.0, sign=1.0)
        assert written("again", factor=1.0, sign=1.0) == first
        assert written("edited", factor=1.0, sign=-1.0) != first
    finally:
        del sys.modules["edited"]
    scope: dict[str, Any] = {"__name__": "nowhere"}
    exec(EDITED.format(factor=1.0, sign=1.0), scope)
    with pytest.raises(dkv.InvalidInputError, match="source of Newest is not to be found"):
        encode(scope["Newest"]())


def test_what_no_file_holds_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="cannot be written to a file"):
        encode(replace(dkv.policy("snapkv", 0.3), aggregation=Unwritable()))
    with pytest.raises(dkv.InvalidInputError, match="cannot be written"):
        encode(float("nan"))
