"""What an engine's configuration must be, to serve evicted caches: checked, adjusted with a message, or refused."""

import os
from typing import Any

from vllm.logger import init_logger

from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.vllm.options import Options
from defensivekv.policies.allocation import PerHead, Pyramid

logger = init_logger("vllm.plugins.defensivekv")

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "defensivekv.integrations.vllm.cpu_worker.EvictingCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "defensivekv.integrations.vllm.gpu_worker.EvictingGPUWorker",
}
_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DRAFTERS = ("ngram", "suffix")
"""Ways of drafting that have no cache of their own."""

_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def configure(config: Any, options: Options) -> Any:
    """Adjusts an engine's configuration, a `VllmConfig`, for the options.

    Prefix caching, and what else cannot go with eviction but changes no answer, is switched off with a message. Raises
    UnsupportedModelError for what was asked for and cannot be had.
    """
    _refuse(config, options)
    if config.cache_config.enable_prefix_caching:
        logger.warning(
            "DefensiveKV: prefix caching is switched off: what stays of a prompt depends on the whole of it, so blocks "
            "of one prompt cannot serve another"
        )
        config.cache_config.enable_prefix_caching = False
    if config.speculative_config is not None and config.scheduler_config.async_scheduling:
        logger.warning("DefensiveKV: asynchronous scheduling is switched off beside speculative decoding")
        config.scheduler_config.async_scheduling = False
    if config.use_v2_model_runner:
        if os.environ.get(_RUNNER) == "1":
            raise UnsupportedModelError(f"DefensiveKV works inside vLLM's first model runner: leave {_RUNNER} out")
        # Read in each process; those of the engine are started after this.
        os.environ[_RUNNER] = "0"
    config.parallel_config.worker_cls = _WORKERS[config.parallel_config.worker_cls]
    return config


def _refuse(config: Any, options: Options) -> None:
    parallel, ranks = config.parallel_config, config.parallel_config.tensor_parallel_size
    speculative = config.speculative_config
    reasons = {
        f"the worker {parallel.worker_cls}, of another platform or plugin": parallel.worker_cls not in _WORKERS,
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "models that pool": config.model_config.runner_type != "generate",
        f"a cache of dtype {config.cache_config.cache_dtype}": config.cache_config.cache_dtype not in _CACHE_DTYPES,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "micro-batches (dual-batch overlap)": parallel.use_ubatching,
        "a KV connector": config.kv_transfer_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "drafts of a model": speculative is not None and speculative.method not in _DRAFTERS,
    }
    for what, is_asked in reasons.items():
        if is_asked:
            raise UnsupportedModelError(
                f"DefensiveKV does not support {what} inside vLLM: leave either out (docs/serving.md says what goes)"
            )
    heads = config.model_config.get_total_num_kv_heads()
    if heads % options.head_groups:
        raise UnsupportedModelError(
            f"{heads} key-value heads cannot be shared out among {options.head_groups} head groups: give head_groups a "
            f"divisor of {heads}"
        )
    allocation = options.make_policy().allocation
    if ranks > 1 and options.head_groups % ranks and not isinstance(allocation, PerHead | Pyramid):
        raise UnsupportedModelError(
            f"policy {options.policy!r} shares a budget among heads that lie on {ranks} ranks, whose blocks are one "
            f'number: give "head_groups": {ranks} (--head-groups {ranks}), so that the heads of each rank share one of '
            "their own, or a policy that gives every head the same, such as 'snapkv'"
        )
