"""Compressed documents: made once, asked many times, kept in files and stores."""

from defensivekv.integrations.transformers.contexts.compressing import compress, context_key
from defensivekv.integrations.transformers.contexts.context import Answer, Context
from defensivekv.integrations.transformers.contexts.files import ContextFacts, load_context
from defensivekv.integrations.transformers.contexts.store import ContextStore, StoredContext

__all__ = [
    "Answer",
    "Context",
    "ContextFacts",
    "ContextStore",
    "StoredContext",
    "compress",
    "context_key",
    "load_context",
]
