"""The kinds of cells: steps of decoding, prefills, peak memory, capacity."""
