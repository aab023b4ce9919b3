"""The most memory that a process takes: the system's count of it, or, on a GPU, the allocator's."""

from pathlib import Path

import psutil
import torch

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which freed blocks of more than 64 KiB go back to the system at once: then the resident set is what
is in use."""


class PeakMemory:
    """Counts from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = psutil.Process().memory_info().rss
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew

    @property
    def bytes(self) -> int:
        """At most, over what there was at the start."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return max(0, peak - self._before)
