"""Serving by vLLM, with and without eviction, in the same memory: `python -m benchmarks.serving`."""
