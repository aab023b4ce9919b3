"""One engine under one load, in a process of its own: `python -m benchmarks.serving.engine JOB RESULT`."""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

BLOCK = 128


def main(asked: str, answer: str) -> None:
    """Reads the job, writes seconds and counts."""
    from vllm import LLM

    job = json.loads(Path(asked).read_text())
    longest = job["prompt"] + job["generated"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(job["config"]))
        options = {} if job["options"] is None else {"additional_config": {"defensivekv": job["options"]}}
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=job["dtype"],
            max_model_len=longest + BLOCK,
            max_num_batched_tokens=longest + 2 * BLOCK,
            max_num_seqs=BLOCK,
            block_size=BLOCK,
            # One is never given out.
            num_gpu_blocks_override=-(-job["cache_tokens"] // BLOCK) + 1,
            enable_prefix_caching=False,
            enforce_eager=not job["is_compiled"],
            **options,
        )
        warm_up(llm, job)
        Path(answer).write_text(json.dumps(measure(llm, job)))


def warm_up(llm: Any, job: dict[str, Any]) -> None:
    """A short request: kernels are compiled, memory is touched."""
    add(llm, {**job, "requests": 1, "prompt": min(300, job["prompt"]), "generated": 3}, "warm")
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def add(llm: Any, job: dict[str, Any], name: str) -> None:
    """Gives the engine all of the requests, of random tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=job["generated"], temperature=0, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    for number in range(job["requests"]):
        tokens = [draw.randrange(3, job["config"]["vocab_size"]) for _ in range(job["prompt"])]
        llm.llm_engine.add_request(f"{name}-{number}", {"prompt_token_ids": tokens}, sampling)


def measure(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the start to each request's first and last token, and of each step in which all were generating."""
    add(llm, job, "request")
    start = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    steps: list[float] = []
    counts: dict[str, int] = {}
    running: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = llm.llm_engine.step()
        now = time.perf_counter()
        grown = 0
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            grown += count > counts.get(output.request_id, 0) > 0
            counts[output.request_id] = count
            first.setdefault(output.request_id, now - start)
            if output.finished:
                last[output.request_id] = now - start
        running.append(len(first) - len(last))
        if grown == job["requests"]:
            steps.append(now - before)
    return {
        "seconds": max(last.values()),
        "first": sorted(first.values()),
        "last": sorted(last.values()),
        "steps": steps,
        "step": median(steps) if steps else None,
        "most_generating": max(running),
        "preempted": preempted(llm),
    }


def preempted(llm: Any) -> float:
    """How often a request lost its blocks."""
    return float(
        sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
        if llm.llm_engine.log_stats
        else 0
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
