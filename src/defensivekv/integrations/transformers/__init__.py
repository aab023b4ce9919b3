"""DefensiveKV for Hugging Face transformers: one attention function, one mask function, one cache."""

from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.context import Answer, Context, compress
from defensivekv.integrations.transformers.finished import ReleaseFinished
from defensivekv.integrations.transformers.model import check_supported, disable, enable, is_enabled
from defensivekv.integrations.transformers.prefill import prefill
from defensivekv.integrations.transformers.report import CacheReport, LayerReport

__all__ = [
    "Answer",
    "CacheReport",
    "Context",
    "EvictingCache",
    "LayerReport",
    "ReleaseFinished",
    "check_supported",
    "compress",
    "disable",
    "enable",
    "is_enabled",
    "prefill",
]
