"""Where entries are kept: an immutable ragged prefix and a growing tail. Knows no policy and no model."""

from defensivekv.cache.blocks import Blocks
from defensivekv.cache.layer import PrefixIndex, PrefixView, RaggedLayer
from defensivekv.cache.pages import PageLayout, PageTable, Places
from defensivekv.cache.prefix import RaggedPrefix, filled_slots
from defensivekv.cache.static_tail import StaticTail
from defensivekv.cache.tail import Tail

__all__ = [
    "Blocks",
    "PageLayout",
    "PageTable",
    "Places",
    "PrefixIndex",
    "PrefixView",
    "RaggedLayer",
    "RaggedPrefix",
    "StaticTail",
    "Tail",
    "filled_slots",
]
