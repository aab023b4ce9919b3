"""How entries are read: new queries against a ragged prefix and a dense tail."""

from defensivekv.attention.paged import attend_pages
from defensivekv.attention.ragged import Backend, attend, causal_mask
from defensivekv.attention.reference import masked_attention, scatter_prefix

__all__ = ["Backend", "attend", "attend_pages", "causal_mask", "masked_attention", "scatter_prefix"]
