"""Caches filled with random entries, as of the package."""

from defensivekv.bench.caches import dense_entries, filled_evicting, filled_stock, ragged_lengths, ragged_prefix

__all__ = ["dense_entries", "filled_evicting", "filled_stock", "ragged_lengths", "ragged_prefix"]
