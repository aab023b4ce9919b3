"""Policies as plain values, for files: every part by its name and its fields."""

import hashlib
import inspect
import math
import sys
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.policies.aggregation import Defensive, Max, Mean, MeanAndVariance
from defensivekv.policies.allocation import (
    AcrossLayers,
    ByPreference,
    ByProfile,
    PerHead,
    PerLayer,
    PerPosition,
    Pyramid,
)
from defensivekv.policies.key_scoring import KeyDifference, KeyNorm, LagRelative
from defensivekv.policies.policy import Policy
from defensivekv.policies.preference import DispersionAndShift
from defensivekv.policies.scoring import (
    ExpectedAttention,
    PromptAttention,
    Recency,
    Reconstruction,
    UniformRandom,
    WindowAttention,
)
from defensivekv.policies.weighting import RecentFirst, TwoStageCritical, TwoStageValueNorm, ValueSize

_KNOWN = (
    *(Policy, DispersionAndShift),
    *(WindowAttention, PromptAttention, ExpectedAttention, Reconstruction, Recency, UniformRandom),
    *(KeyNorm, KeyDifference, LagRelative),
    *(Mean, Max, Defensive, MeanAndVariance),
    *(TwoStageValueNorm, TwoStageCritical, ValueSize, RecentFirst),
    *(PerHead, PerLayer, AcrossLayers, PerPosition, Pyramid, ByPreference, ByProfile),
)
_BY_NAME = {kind.__name__: kind for kind in _KNOWN}


def encode(value: Any) -> Any:
    """A policy, or a part or field of one, as what JSON can hold.

    Of a part that is not this package's own, the code of its class is told by a hash; of what that calls, nothing is.
    Raises InvalidInputError for a part that is no dataclass, has fields of other kinds, or no source.
    """
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Fraction):
        return {"fraction": str(value)}
    if isinstance(value, Budget):
        return {"budget": str(value)}
    if isinstance(value, frozenset):
        return {"set": sorted(value)}
    if isinstance(value, tuple):
        return [encode(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        held = {field.name: encode(getattr(value, field.name)) for field in fields(value)}
        if _BY_NAME.get(kind.__name__) is kind:
            return {"part": kind.__name__, "fields": held}
        return {"part": f"{kind.__module__}.{kind.__qualname__}", "code": _hash_code(kind), "fields": held}
    raise InvalidInputError(
        f"{value!r} of a policy cannot be written to a file: make the part a frozen dataclass of numbers, texts, "
        "fractions and tuples"
    )


def _hash_code(kind: type) -> str:
    """sha256 of the source of a class that is not this package's own, and of those that it extends."""
    known = sys.stdlib_module_names | {"defensivekv"}
    foreign = [one for one in kind.__mro__ if one.__module__.split(".")[0] not in known]
    try:
        sources = [inspect.getsource(one) for one in foreign]
    except (OSError, TypeError):
        raise InvalidInputError(
            f"the source of {kind.__qualname__} is not to be found, and a file is told from others by it: define it in "
            "a module or a notebook"
        ) from None
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def decode(value: Any) -> Any:
    """What `encode` was given. Raises InvalidInputError for parts that are not this package's own."""
    if isinstance(value, list):
        return tuple(decode(one) for one in value)
    if not isinstance(value, dict):
        return value
    if "fraction" in value:
        return Fraction(value["fraction"])
    if "budget" in value:
        return Budget.parse(value["budget"])
    if "set" in value:
        return frozenset(value["set"])
    if value.get("part") not in _BY_NAME:
        raise InvalidInputError(
            f"{value.get('part')!r} is no part of this package: pass policy=, the policy that the context was made with"
        )
    return _BY_NAME[value["part"]](**{name: decode(field) for name, field in value["fields"].items()})
