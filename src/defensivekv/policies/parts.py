"""Parts by name, for compositions by keyword."""

import difflib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from defensivekv.errors import InvalidInputError
from defensivekv.policies.aggregation import Aggregation, Defensive, Max, Mean, MeanAndVariance
from defensivekv.policies.allocation import (
    AcrossLayers,
    Allocation,
    ByPreference,
    PerHead,
    PerLayer,
    PerPosition,
    Pyramid,
)
from defensivekv.policies.key_scoring import KeyDifference, KeyNorm, LagRelative
from defensivekv.policies.preference import DispersionAndShift
from defensivekv.policies.scoring import (
    ExpectedAttention,
    PromptAttention,
    Recency,
    Reconstruction,
    Scorer,
    UniformRandom,
    WindowAttention,
)
from defensivekv.policies.weighting import RecentFirst, TwoStageCritical, TwoStageValueNorm, ValueSize, Weighting

SAFEGUARD = Fraction(1, 5)
"""The share of an even split that AdaKV leaves every head (arXiv 2407.11550, and kvpress)."""

PARTS: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "scoring": {
        "window-attention": WindowAttention,
        "prompt-attention": PromptAttention,
        "expected-attention": ExpectedAttention,
        "reconstruction": Reconstruction,
        "key-norm": KeyNorm,
        "key-difference": KeyDifference,
        "lag": LagRelative,
        "recency": Recency,
        "random": UniformRandom,
    },
    "aggregation": {
        "mean": Mean,
        "plain-mean": lambda: Mean(1),
        "max": Max,
        "defensive": Defensive,
        "mean-and-variance": MeanAndVariance,
    },
    "weighting": {
        "none": lambda: None,
        "value-norm": TwoStageValueNorm,
        "critical": TwoStageCritical,
        "ada-critical": lambda: TwoStageCritical(head_budgets=PerLayer(SAFEGUARD)),
        "value-size": ValueSize,
        "recent-first": RecentFirst,
    },
    "allocation": {
        "per-head": PerHead,
        "per-layer": PerLayer,
        "per-layer-safe": lambda: PerLayer(SAFEGUARD),
        "across-layers": AcrossLayers,
        "per-position": PerPosition,
        "per-chunk": lambda: PerPosition(20),
        "pyramid": Pyramid,
        "by-preference": lambda: ByPreference(DispersionAndShift()),
    },
}
"""For each keyword of `policy`, the names that it takes and the part that each stands for."""


_KINDS = {"scoring": Scorer, "aggregation": Aggregation, "weighting": Weighting, "allocation": Allocation}


def part(kind: str, given: Any) -> Any:
    """The part of that name; a part that is one already, as it is. Raises InvalidInputError with the nearest names."""
    names = PARTS[kind]
    if not isinstance(given, str):
        if isinstance(given, type) or not isinstance(given, _KINDS[kind]):
            raise InvalidInputError(f"{kind} {given!r} is no part of that kind: give one, or one of {', '.join(names)}")
        return given
    if given in names:
        return names[given]()
    near = difflib.get_close_matches(given.lower().replace("_", "-"), names, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InvalidInputError(f"unknown {kind} {given!r}: {hint}known are {', '.join(names)}")
