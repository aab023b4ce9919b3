"""DefensiveKV: evict the part of the KV cache that does not matter, and really give the memory back.

Importing this package imports no model library; `enable`, `EvictingCache` and `compress` do on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from defensivekv.budget import Budget
from defensivekv.errors import (
    BudgetError,
    CacheError,
    ContextError,
    DamagedContextError,
    DefensiveKVError,
    DefensiveKVWarning,
    InvalidInputError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from defensivekv.policies import Observation, Policy, policies, policy

if TYPE_CHECKING:
    from defensivekv.integrations.transformers import (
        Context,
        ContextStore,
        EvictingCache,
        ReleaseFinished,
        compress,
        context_key,
        disable,
        enable,
        load_context,
        prefill,
    )
    from defensivekv.needleworld import demo_model

__version__ = "0.1.0"

_TRANSFORMERS = "defensivekv.integrations.transformers"
_LAZY = {
    "Context": _TRANSFORMERS,
    "ContextStore": _TRANSFORMERS,
    "EvictingCache": _TRANSFORMERS,
    "ReleaseFinished": _TRANSFORMERS,
    "compress": _TRANSFORMERS,
    "context_key": _TRANSFORMERS,
    "demo_model": "defensivekv.needleworld",
    "disable": _TRANSFORMERS,
    "enable": _TRANSFORMERS,
    "load_context": _TRANSFORMERS,
    "prefill": _TRANSFORMERS,
}

__all__ = [
    "Budget",
    "BudgetError",
    "CacheError",
    "Context",
    "ContextError",
    "ContextStore",
    "DamagedContextError",
    "DefensiveKVError",
    "DefensiveKVWarning",
    "EvictingCache",
    "InvalidInputError",
    "Observation",
    "Policy",
    "ReleaseFinished",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "__version__",
    "compress",
    "context_key",
    "demo_model",
    "disable",
    "enable",
    "load_context",
    "policies",
    "policy",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
