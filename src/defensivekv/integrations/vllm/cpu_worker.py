"""The worker on CPUs; a module of its own, since vLLM's may not be imported elsewhere."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from defensivekv.integrations.vllm.worker import EvictingWorker
from defensivekv.kernels.native import find_library

logger = init_logger("vllm.plugins.defensivekv")


class EvictingCPUWorker(EvictingWorker, CPUWorker):
    """vLLM's, storing what stays."""

    def load_model(self, **kwargs: Any) -> None:
        """The same, and compiles the kernels before the first request asks for them."""
        library = find_library()
        if library.functions is None:
            logger.warning("DefensiveKV: attention will be slow, since it reads copies: %s", library.reason)
        super().load_model(**kwargs)
