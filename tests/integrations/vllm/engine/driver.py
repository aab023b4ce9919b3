"""One engine, one job, one process: `python -m tests.integrations.vllm.engine.driver JOB RESULT`.

job     engine: arguments of vLLM's; options: of the plugin, null for stock vLLM; prompts: token ids, with
        max_tokens and abort_after (tokens after which a request is aborted, or null), all submitted at once, or one
        after the other where quiet.
result  outputs: tokens and log-probabilities; kept: what the workers kept, where they are in this process; preempted:
        how often; most_running: requests at once; most_used, least_used_after_prompts: blocks; free, blocks: at the
        end; states, held: of requests that are gone.
"""

import json
import sys
from pathlib import Path
from typing import Any

ENGINE = {
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": False,
}


def main(asked: str, answer: str) -> None:
    from vllm import LLM

    import defensivekv as dkv

    job = json.loads(Path(asked).read_text())
    kept: dict[str, Any] = {}
    record_kept(kept)
    engine = {**ENGINE, **job.get("engine", {})}
    if job.get("options") is not None:
        engine["additional_config"] = {"defensivekv": job["options"]}
    llm = LLM(dkv.demo_model(), **engine)
    inner = getattr(llm.llm_engine.engine_core, "engine_core", None)
    counts = watch(inner.scheduler) if inner is not None else {}
    outputs = generate(llm, job)
    result = {"outputs": outputs, "kept": kept, "metrics": metrics(llm), **counts}
    if inner is not None:
        pool = inner.scheduler.kv_cache_manager.block_pool
        managers = inner.scheduler.kv_cache_manager.coordinator.single_type_managers
        # The workers hear of what ended last when they are next given something.
        result["free"], result["blocks"] = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
        result["states"] = sum(len(getattr(manager, "_requests", {})) for manager in managers)
        result["held"] = sum(len(manager.req_to_blocks) for manager in managers)
    Path(answer).write_text(json.dumps(result))


def record_kept(kept: dict[str, Any]) -> None:
    """Of each prompt, by its number of tokens: the positions that stay, layer by layer and head by head."""
    from defensivekv.integrations.vllm.state import RequestState

    remember = RequestState.remember

    def remembered(self: Any, layer: int, mask: Any) -> None:
        kept.setdefault(str(self.prompt), {})[str(layer)] = [head.nonzero().flatten().tolist() for head in mask]
        remember(self, layer, mask)

    RequestState.remember = remembered  # type: ignore[method-assign, assignment]


def watch(scheduler: Any) -> dict[str, int]:
    """Counts as the scheduler goes."""
    counts = {"preempted": 0, "most_running": 0, "most_used": 0, "least_used_after_prompts": 2**31}
    preempt, schedule = scheduler._preempt_request, scheduler.schedule
    pool = scheduler.kv_cache_manager.block_pool

    def preempted(*args: Any, **kwargs: Any) -> Any:
        counts["preempted"] += 1
        return preempt(*args, **kwargs)

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        running = list(scheduler.running)
        are_read = all(request.num_computed_tokens >= request.num_prompt_tokens for request in running)
        made = schedule(*args, **kwargs)
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        counts["most_running"] = max(counts["most_running"], len(scheduler.running))
        counts["most_used"] = max(counts["most_used"], used)
        if running and are_read and len(running) == len(scheduler.running):
            counts["least_used_after_prompts"] = min(counts["least_used_after_prompts"], used)
        return made

    scheduler._preempt_request, scheduler.schedule = preempted, scheduled
    return counts


def generate(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each request came to; of an aborted one, what it had."""
    requests = list(enumerate(job["prompts"]))
    batches = [[request] for request in requests] if job.get("quiet") else [requests]
    outputs: dict[int, dict[str, Any]] = {}
    for batch in batches:
        for number, prompt in batch:
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt["tokens"]}, sampling(prompt))
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                completion = output.outputs[0]
                number = int(output.request_id)
                outputs[number] = told(completion)
                after = job["prompts"][number].get("abort_after")
                if after is not None and len(completion.token_ids) >= after and not output.finished:
                    llm.llm_engine.abort_request([output.request_id])
    return [outputs.get(number, {"tokens": [], "logprobs": []}) for number, _ in requests]


def sampling(prompt: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=prompt.get("max_tokens", 32), temperature=0, ignore_eos=True, logprobs=prompt.get("logprobs", 1)
    )


def told(completion: Any) -> dict[str, Any]:
    chosen = zip(completion.logprobs, completion.token_ids, strict=True)
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [logprobs[token].logprob for logprobs, token in chosen],
        "finish": completion.finish_reason,
    }


def metrics(llm: Any) -> dict[str, float]:
    found = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value is not None:
            found[metric.name] = value
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
