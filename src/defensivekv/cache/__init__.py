"""Where entries are kept: an immutable ragged prefix and a growing tail. Knows no policy and no model."""

from defensivekv.cache.blocks import Blocks
from defensivekv.cache.layer import PrefixView, RaggedLayer
from defensivekv.cache.prefix import RaggedPrefix, filled_slots
from defensivekv.cache.tail import Tail

__all__ = ["Blocks", "PrefixView", "RaggedLayer", "RaggedPrefix", "Tail", "filled_slots"]
