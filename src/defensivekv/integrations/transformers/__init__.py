"""DefensiveKV for Hugging Face transformers: one attention function, one mask function, one cache."""

from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.contexts import (
    Answer,
    Context,
    ContextFacts,
    ContextStore,
    StoredContext,
    compress,
    context_key,
    load_context,
)
from defensivekv.integrations.transformers.finished import ReleaseFinished
from defensivekv.integrations.transformers.model import check_supported, disable, enable, is_enabled
from defensivekv.integrations.transformers.prefill import prefill
from defensivekv.integrations.transformers.report import CacheReport, LayerReport

__all__ = [
    "Answer",
    "CacheReport",
    "Context",
    "ContextFacts",
    "ContextStore",
    "EvictingCache",
    "LayerReport",
    "ReleaseFinished",
    "StoredContext",
    "check_supported",
    "compress",
    "context_key",
    "disable",
    "enable",
    "is_enabled",
    "load_context",
    "prefill",
]
