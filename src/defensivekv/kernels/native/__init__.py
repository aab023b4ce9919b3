"""Kernels for CPUs in C++, compiled on the machine that runs them, once, where it has a compiler.

Without a compiler, or with DEFENSIVEKV_NATIVE=0, PyTorch's own kernels are used instead: slower, the same results.
"""

from defensivekv.kernels.native.library import DTYPES, Library, find_library

__all__ = ["DTYPES", "Library", "find_library"]
