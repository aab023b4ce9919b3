"""DefensiveKV: evict the part of the KV cache that does not matter, and really give the memory back.

Importing this package imports no model library; `enable`, `EvictingCache` and `compress` do on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from defensivekv.budget import Budget
from defensivekv.errors import (
    BudgetError,
    CacheError,
    DefensiveKVError,
    DefensiveKVWarning,
    InvalidInputError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from defensivekv.policies import Observation, Policy, policies, policy

if TYPE_CHECKING:
    from defensivekv.integrations.transformers import EvictingCache, disable, enable

__version__ = "0.1.0"

_LAZY = {
    "EvictingCache": "defensivekv.integrations.transformers",
    "disable": "defensivekv.integrations.transformers",
    "enable": "defensivekv.integrations.transformers",
}

__all__ = [
    "Budget",
    "BudgetError",
    "CacheError",
    "DefensiveKVError",
    "DefensiveKVWarning",
    "EvictingCache",
    "InvalidInputError",
    "Observation",
    "Policy",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "__version__",
    "disable",
    "enable",
    "policies",
    "policy",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
