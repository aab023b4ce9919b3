"""How fast it is, against what else there is. Not tests: run `python -m benchmarks` on a quiet machine."""
