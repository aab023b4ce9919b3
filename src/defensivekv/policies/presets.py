"""Policies by name: a factory for each, never a shared instance."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from defensivekv.budget import Budget
from defensivekv.errors import BudgetError, InvalidInputError, UnknownPolicyError
from defensivekv.policies.aggregation import Defensive, Mean
from defensivekv.policies.allocation import AcrossLayers, PerHead, PerLayer
from defensivekv.policies.policy import Policy
from defensivekv.policies.scoring import Recency, UniformRandom, WindowAttention
from defensivekv.policies.weighting import TwoStageCritical, TwoStageValueNorm

_DEFENSIVEKV = "https://arxiv.org/abs/2510.13334"
_WHOLE = Budget.parse(1.0)
"""The budget that a factory sets; `policy` puts the asked one in its place."""


def _full() -> Policy:
    """Everything is kept; the yardstick."""
    return Policy("full", _WHOLE, Recency(), PerHead())


def _streaming_llm() -> Policy:
    """The first four tokens and the most recent ones."""
    return Policy("streaming-llm", _WHOLE, Recency(), PerHead(), Mean(1), paper="https://arxiv.org/abs/2309.17453")


def _random() -> Policy:
    """Entries drawn by chance, the window kept; the floor."""
    return Policy("random", _WHOLE, UniformRandom(), PerHead(), Mean(1))


def _snapkv() -> Policy:
    """Mean attention of the last prompt tokens, smoothed."""
    return Policy("snapkv", _WHOLE, WindowAttention(), PerHead(), paper="https://arxiv.org/abs/2404.14469")


def _adakv() -> Policy:
    """SnapKV's scores; the heads of a layer compete, a fifth of each head's even share is safe."""
    allocation = PerLayer(safeguard=Fraction(1, 5))
    return Policy("adakv", _WHOLE, WindowAttention(), allocation, paper="https://arxiv.org/abs/2407.11550")


def _criticalkv() -> Policy:
    """SnapKV's scores for half of the budget, weighted by value norms for the rest."""
    paper = "https://arxiv.org/abs/2502.03805"
    return Policy("criticalkv", _WHOLE, WindowAttention(), PerHead(), Mean(), TwoStageCritical(), paper=paper)


def _defensivekv() -> Policy:
    """Worst-case risk over the last prompt tokens, weighted by value norms."""
    parts = (WindowAttention(), PerLayer(), Defensive(), TwoStageValueNorm())
    return Policy("defensivekv", _WHOLE, *parts, paper=_DEFENSIVEKV)


def _layer_defensivekv() -> Policy:
    """DefensiveKV's scores; the heads of all layers compete."""
    parts = (WindowAttention(), AcrossLayers(), Defensive(), TwoStageValueNorm())
    return Policy("layer-defensivekv", _WHOLE, *parts, paper=_DEFENSIVEKV)


_FACTORIES: dict[str, Callable[[], Policy]] = {
    "full": _full,
    "random": _random,
    "streaming-llm": _streaming_llm,
    "snapkv": _snapkv,
    "adakv": _adakv,
    "criticalkv": _criticalkv,
    "defensivekv": _defensivekv,
    "layer-defensivekv": _layer_defensivekv,
}


def policies() -> tuple[str, ...]:
    """The names that `policy` knows."""
    return tuple(_FACTORIES)


def summary(name: str) -> str:
    """One line on the policy of that name."""
    return (_factory(name).__doc__ or "").strip()


def policy(
    name: str,
    budget: float | int | str | Fraction | Budget | None = None,
    *,
    window_size: int = 32,
    protect_window: bool = True,
) -> Policy:
    """The policy of that name with a budget of its own.

    name: one of `policies()`. budget: a share of the prompt's entries (`0.2`), entries per head on average
    (`1024`) or bytes per sequence (`"64MiB"`); "full" needs none. window_size: tokens of the observation
    window. protect_window: see `Policy`.

    Raises UnknownPolicyError, BudgetError or InvalidInputError.
    """
    factory = _factory(name)
    if budget is None:
        if name != "full":
            raise BudgetError(f'policy {name!r} needs a budget, for example budget=0.2, 1024 or "64MiB"')
        budget = 1.0
    if isinstance(window_size, bool) or not isinstance(window_size, int):
        raise InvalidInputError(f"window_size {window_size!r} must be an integer")
    asked = Budget.parse(budget)
    if name == "full" and not asked.is_full:
        raise BudgetError(f"policy 'full' keeps everything, but the budget is {asked}: leave the budget out")
    # The budget is held against the window once both are set, and not against the default window.
    return replace(factory(), budget=asked, window_size=window_size, protect_window=protect_window)


def _factory(name: str) -> Callable[[], Policy]:
    if name in _FACTORIES:
        return _FACTORIES[name]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), _FACTORIES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UnknownPolicyError(f"unknown policy {name!r}: {hint}known are {', '.join(_FACTORIES)}")
