"""Policies by name: a factory for each, never a shared instance."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from defensivekv.budget import Budget
from defensivekv.errors import BudgetError, InvalidInputError, UnknownPolicyError
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
from defensivekv.policies.parts import SAFEGUARD, part
from defensivekv.policies.policy import Policy
from defensivekv.policies.preference import DispersionAndShift
from defensivekv.policies.profile import HeadProfile
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

_ARXIV = "https://arxiv.org/abs/"
_WHOLE = Budget.parse(1.0)
"""The budget that a factory sets; `policy` puts the asked one in its place."""


def _full() -> Policy:
    """Everything is kept; the yardstick."""
    return Policy("full", _WHOLE, Recency(), PerHead(), Mean(1))


def _random() -> Policy:
    """Entries drawn by chance, the window kept; the floor."""
    return Policy("random", _WHOLE, UniformRandom(), PerHead(), Mean(1))


def _streaming_llm() -> Policy:
    """The first four tokens and the most recent ones."""
    return Policy("streaming-llm", _WHOLE, Recency(), PerHead(), Mean(1), num_sinks=4, paper=_ARXIV + "2309.17453")


def _h2o() -> Policy:
    """Attention summed over all prompt tokens for half of the budget, recency for the other."""
    parts = (PromptAttention(), PerHead(), Mean(1), RecentFirst())
    return Policy("h2o", _WHOLE, *parts, paper=_ARXIV + "2306.14048")


def _tova() -> Policy:
    """Attention of the last token, averaged over the heads of a layer."""
    parts = (WindowAttention(remembers=False), PerPosition(), Mean(1))
    return Policy("tova", _WHOLE, *parts, window_size=1, paper=_ARXIV + "2401.06104")


def _knorm() -> Policy:
    """Entries with the smallest keys; no attention is looked at."""
    return Policy("knorm", _WHOLE, KeyNorm(), PerHead(), Mean(1), paper=_ARXIV + "2406.11430")


def _keydiff() -> Policy:
    """Entries whose keys are least like the others; no attention is looked at."""
    return Policy("keydiff", _WHOLE, KeyDifference(), PerHead(), Mean(1), paper=_ARXIV + "2504.15364")


def _lagkv() -> Policy:
    """Entries that stand out against the next 128 tokens; no attention is looked at."""
    return Policy("lagkv", _WHOLE, LagRelative(), PerHead(), Mean(1), num_sinks=4, paper=_ARXIV + "2504.04704")


def _snapkv() -> Policy:
    """Mean attention of the last prompt tokens, smoothed."""
    return Policy("snapkv", _WHOLE, WindowAttention(), PerHead(), paper=_ARXIV + "2404.14469")


def _pyramidkv() -> Policy:
    """SnapKV's scores; lower layers keep more."""
    return Policy("pyramidkv", _WHOLE, WindowAttention(), Pyramid(), paper=_ARXIV + "2406.02069")


def _chunkkv() -> Policy:
    """SnapKV's scores; chunks of twenty tokens stay or go together, in all heads."""
    return Policy("chunkkv", _WHOLE, WindowAttention(), PerPosition(20), paper=_ARXIV + "2502.00299")


def _cake() -> Policy:
    """Mean and variance of window attention; layers share by its dispersion and shift."""
    parts = (WindowAttention(), ByPreference(DispersionAndShift()), MeanAndVariance())
    return Policy("cake", _WHOLE, *parts, paper=_ARXIV + "2503.12491")


def _expected_attention() -> Policy:
    """Attention that a normal model of the queries expects of the next 512, times value size."""
    parts = (ExpectedAttention(), PerHead(), Mean(1), ValueSize())
    return Policy("expected-attention", _WHOLE, *parts, num_sinks=4, paper=_ARXIV + "2510.00636")


def _kvzip() -> Policy:
    """Worst case while the model repeats the prompt: twice the prefill, with compress() only."""
    parts = (Reconstruction(), AcrossLayers(), Max())
    return Policy("kvzip", _WHOLE, *parts, num_sinks=4, paper=_ARXIV + "2505.23416")


def _adakv() -> Policy:
    """SnapKV's scores; the heads of a layer compete, a fifth of each head's even share is safe."""
    return Policy("adakv", _WHOLE, WindowAttention(), PerLayer(SAFEGUARD), paper=_ARXIV + "2407.11550")


def _criticalkv() -> Policy:
    """SnapKV's scores for half of the budget, weighted by value norms for the rest."""
    parts = (WindowAttention(), PerHead(), Mean(), TwoStageCritical())
    return Policy("criticalkv", _WHOLE, *parts, paper=_ARXIV + "2502.03805")


def _ada_criticalkv() -> Policy:
    """CriticalKV within the head budgets of AdaKV."""
    parts = (WindowAttention(), PerLayer(), Mean(), TwoStageCritical(head_budgets=PerLayer(SAFEGUARD)))
    return Policy("ada-criticalkv", _WHOLE, *parts, paper=_ARXIV + "2502.03805")


def _defensivekv() -> Policy:
    """Worst-case risk over the last prompt tokens, weighted by value norms."""
    parts = (WindowAttention(), PerLayer(), Defensive(), TwoStageValueNorm())
    return Policy("defensivekv", _WHOLE, *parts, paper=_ARXIV + "2510.13334")


def _layer_defensivekv() -> Policy:
    """DefensiveKV's scores; the heads of all layers compete."""
    parts = (WindowAttention(), AcrossLayers(), Defensive(), TwoStageValueNorm())
    return Policy("layer-defensivekv", _WHOLE, *parts, paper=_ARXIV + "2510.13334")


_FACTORIES: dict[str, Callable[[], Policy]] = {
    "full": _full,
    "random": _random,
    "streaming-llm": _streaming_llm,
    "h2o": _h2o,
    "tova": _tova,
    "knorm": _knorm,
    "keydiff": _keydiff,
    "lagkv": _lagkv,
    "snapkv": _snapkv,
    "pyramidkv": _pyramidkv,
    "chunkkv": _chunkkv,
    "cake": _cake,
    "expected-attention": _expected_attention,
    "kvzip": _kvzip,
    "adakv": _adakv,
    "criticalkv": _criticalkv,
    "ada-criticalkv": _ada_criticalkv,
    "defensivekv": _defensivekv,
    "layer-defensivekv": _layer_defensivekv,
}


DUO_ATTENTION = "duo-attention"
"""The one policy that is made from a file, and so has no factory without arguments."""


def duo_attention(profile: HeadProfile) -> Policy:
    """Retrieval heads whole, streaming heads their first and latest; which is which, from a profile."""
    parts = (Recency(), profile.allocation(), Mean(1))
    return Policy(DUO_ATTENTION, _WHOLE, *parts, num_sinks=profile.num_sinks, paper=_ARXIV + "2410.10819")


def policies() -> tuple[str, ...]:
    """The names that `policy` knows."""
    return (*_FACTORIES, DUO_ATTENTION)


def summary(name: str) -> str:
    """One line on the policy of that name."""
    return ((duo_attention if name == DUO_ATTENTION else _factory(name)).__doc__ or "").strip()


def policy(
    name: str,
    budget: float | int | str | Fraction | Budget | None = None,
    *,
    scoring: str | Scorer | None = None,
    aggregation: str | Aggregation | None = None,
    weighting: str | Weighting | None = None,
    allocation: str | Allocation | None = None,
    window_size: int | None = None,
    protect_window: bool = True,
    profile: str | Path | HeadProfile | None = None,
) -> Policy:
    """The policy of that name with a budget of its own, and with other parts where they are given.

    name: one of `policies()`. budget: a share of the prompt's entries (`0.2`), entries per head on average
    (`1024`) or bytes per sequence (`"64MiB"`); "full" needs none. scoring, aggregation, weighting, allocation: in
    place of the policy's own, a name of `PARTS` (of `defensivekv.policies`) or a part, as in
    `policy("kvzip", 0.2, aggregation="defensive")`; the policy's name then tells them.
    window_size: tokens of the observation window, 32 unless the method has another; only where the scorer has one.
    protect_window: see `Policy`. profile: file of a `HeadProfile`, or one; "duo-attention" needs it and no other
    takes it.

    Raises UnknownPolicyError, BudgetError, or InvalidInputError for parts that cannot go together.
    """
    if (profile is not None) != (name == DUO_ATTENTION):
        if name == DUO_ATTENTION:
            raise InvalidInputError(
                "policy 'duo-attention' needs profile=FILE, which `defensivekv profile MODEL` makes for a model"
            )
        _factory(name)
        raise InvalidInputError(f"policy {name!r} takes no profile: leave it out")
    if profile is None:
        preset = _factory(name)()
    else:
        preset = duo_attention(profile if isinstance(profile, HeadProfile) else HeadProfile.load(profile))
    if budget is None:
        if name != "full":
            raise BudgetError(f'policy {name!r} needs a budget, for example budget=0.2, 1024 or "64MiB"')
        budget = 1.0
    asked = Budget.parse(budget)
    if name == "full" and not asked.is_full:
        raise BudgetError(f"policy 'full' keeps everything, but the budget is {asked}: leave the budget out")
    asked_parts = {"scoring": scoring, "aggregation": aggregation, "weighting": weighting, "allocation": allocation}
    changes: dict[str, Any] = {
        "scorer" if kind == "scoring" else kind: part(kind, given)
        for kind, given in asked_parts.items()
        if given is not None
    }
    if window_size is not None:
        if isinstance(window_size, bool) or not isinstance(window_size, int):
            raise InvalidInputError(f"window_size {window_size!r} must be an integer")
        if not changes.get("scorer", preset.scorer).has_window:
            raise InvalidInputError(f"policy {name!r} observes no window: leave window_size out")
        changes["window_size"] = window_size
    if not isinstance(protect_window, bool):
        raise InvalidInputError(f"protect_window {protect_window!r} must be True or False")
    composed = [f"{key}={_called(given)}" for key, given in asked_parts.items() if given is not None]
    changes["name"] = "+".join((preset.name, *composed))
    # All at once: parts are held against each other, and the budget against the window, when all are set.
    return replace(preset, budget=asked, protect_window=protect_window, **changes)


def _called(given: object) -> str:
    return given if isinstance(given, str) else type(given).__name__


def _factory(name: str) -> Callable[[], Policy]:
    if name in _FACTORIES:
        return _FACTORIES[name]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), policies(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UnknownPolicyError(f"unknown policy {name!r}: {hint}known are {', '.join(policies())}")
