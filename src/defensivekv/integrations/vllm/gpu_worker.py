"""The worker on CUDA."""

from vllm.v1.worker.gpu_worker import Worker

from defensivekv.integrations.vllm.worker import EvictingWorker


class EvictingGPUWorker(EvictingWorker, Worker):
    """vLLM's, storing what stays."""
