"""Made-up records of runs that look like real ones."""

import hashlib
from collections.abc import Iterable, Sequence
from random import Random

from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.report import CellKey
from defensivekv.evaluation.report.order import LONGBENCH, RULER

LLAMA = "Llama-3.1-8B-Instruct"
NEEDLEWORLD = tuple(
    f"needleworld/{task}@1024" for task in ("single_key", "multi_key", "multi_value", "multi_query", "variable_chain")
)
RULER_4K = tuple(f"ruler/{task}@4096" for task in RULER)
LONGBENCH_ALL = tuple(f"longbench/{task}" for tasks in LONGBENCH.values() for task in tasks)
HAYSTACK = tuple(f"haystack/city@{length}" for length in (4096, 8192, 16384))

_DOMAINS = {task: domain for domain, tasks in LONGBENCH.items() for task in tasks}
_RULER_DOMAINS = {"cwe": "aggregation", "fwe": "aggregation", "qa_1": "QA", "qa_2": "QA", "vt": "variable tracking"}
_STRENGTH = {
    "full": 9.0,
    "layer-defensivekv": 5.5,
    "defensivekv": 4.5,
    "ada-criticalkv": 3.6,
    "criticalkv": 3.2,
    "cake": 2.7,
    "duo-attention": 2.2,
    "adakv": 2.4,
    "snapkv": 2.0,
    "streaming-llm": 1.1,
    "random": 0.8,
}
_TOKEN_BYTES = 131072
Made = tuple[Record, tuple[CellKey, Timing]]


def record(**changes: object) -> Record:
    """One sample that was answered, with what is given put in place of the rest."""
    fields: dict[str, object] = {
        "model": LLAMA,
        "model_revision": "0e9e39f249a1",
        "dtype": "bfloat16",
        "policy": "snapkv",
        "policy_parts": {"preset": "snapkv", "scorer": "window attention", "window_size": "32"},
        "budget": "0.2",
        "task": "ruler/vt@4096",
        "suite": "ruler",
        "domain": "variable tracking",
        "metric": "recall",
        "metric_version": 1,
        "split": "authors",
        "revision": "generator 1 seed 42",
        "not_comparable": "",
        "seed": 42,
        "sample": "0000",
        "query_aware": False,
        "template": "chat",
        "status": "ok",
        "error": "",
        "context_tokens": 4096,
        "truncated_tokens": 0,
        "context_sha256": "ab",
        "questions": ["What is the number of misty harbor?"],
        "answer_prefixes": [""],
        "references": [["4783"]],
        "choices": [],
        "outputs": ["4783"],
        "scores": [1.0],
        "achieved": 0.2,
        "lengths": [[800, 838], [810, 828]],
        "cache_bytes": 4096 * _TOKEN_BYTES // 5,
        "full_bytes": 4096 * _TOKEN_BYTES,
        "metadata": {},
        "versions": {"defensivekv": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        "device": "NVIDIA H100 80GB HBM3",
    }
    unknown = set(changes) - set(fields)
    assert not unknown, unknown
    return Record.model_validate(fields | changes)


def failed(**changes: object) -> Record:
    """One sample that was not answered."""
    empty = {"outputs": [], "scores": [], "achieved": 0.0, "lengths": [], "cache_bytes": 0, "full_bytes": 0}
    return record(**({"status": "failed", "error": "CUDA out of memory: tried to allocate 2 GiB"} | empty | changes))


def timing(sample: str, token_seconds: float | None = 0.02, batch_size: int = 1) -> Timing:
    """The seconds of one sample."""
    return Timing(sample=sample, prefill_seconds=0.5, token_seconds=token_seconds, new_tokens=30, batch_size=batch_size)


def grid(
    policies: Sequence[str],
    budgets: Sequence[str],
    tasks: Sequence[str],
    *,
    samples: int = 8,
    failures: int = 0,
    **changes: object,
) -> list[Made]:
    """A run: every policy at every budget on every task, the full cache once; the last `failures` samples failed."""
    made: list[Made] = []
    for policy in policies:
        for budget in ["1"] if policy == "full" else budgets:
            for task in tasks:
                made += _cell(policy, budget, task, samples, failures, changes)
    return made


def split(made: Iterable[Made]) -> tuple[list[Record], list[tuple[CellKey, Timing]]]:
    """Records and timings apart, as a report takes them."""
    pairs = list(made)
    return [record for record, _ in pairs], [timing for _, timing in pairs]


def _cell(
    policy: str, budget: str, task: str, samples: int, failures: int, changes: dict[str, object]
) -> Iterable[Made]:
    suite, base = task.split("/")[0], task.split("/")[1].split("@")[0]
    length = int(task.split("@")[1]) if "@" in task else 9000
    try:
        share = float(budget)
    except ValueError:
        share = 0.3
    domain = {"longbench": _DOMAINS.get(base, "other"), "ruler": _RULER_DOMAINS.get(base, "retrieval")}.get(
        suite, "Needle-in-a-Haystack" if suite == "haystack" else base.replace("_", " ")
    )
    hardness = Random(base).uniform(0.6, 1.4)
    # Names that are not known differ in strength, too.
    strength = _STRENGTH.get(policy, Random(policy).uniform(1, 5))
    for number in range(samples):
        rng = Random(f"{policy} {budget} {task} {number} {changes.get('query_aware')}")
        depth = 10 * (number % 11)
        chance = 1 - (1 - share) ** (strength / hardness)
        if suite == "haystack":
            chance *= 1 - 0.5 * (1 - share) * (depth / 100) * (length / 16384)
        score = 1.0 if suite == "haystack" and rng.random() < chance else 0.0
        if suite != "haystack":
            ceiling = 0.45 if suite == "longbench" else 0.97
            score = min(1.0, max(0.0, ceiling * chance + rng.gauss(0, 0.12)))
        own: dict[str, object] = {
            "policy": policy,
            "policy_parts": {"preset": policy, "window_size": "32"},
            "budget": budget,
            "task": task,
            "suite": suite,
            "domain": domain,
            "sample": f"{number:04}",
            "context_sha256": hashlib.sha256(f"{task} {number}".encode()).hexdigest(),
            "context_tokens": length,
            "truncated_tokens": 1000 if suite == "longbench" and number == 0 else 0,
            "scores": [score],
            "outputs": ["the number is 4783" if score > 0.5 else "I could not find it."],
            "achieved": share,
            "cache_bytes": int(share * length * _TOKEN_BYTES),
            "full_bytes": length * _TOKEN_BYTES,
            "metadata": {"depth": depth, "length": length} if suite == "haystack" else {},
        }
        of_sample = own | changes
        if number >= samples - failures:
            of_sample |= {"status": "failed", "error": f"CUDA out of memory at sample {number}"}
            of_sample |= {"scores": [], "outputs": [], "achieved": 0.0, "cache_bytes": 0, "full_bytes": 0}
        made = record(**of_sample)
        seconds = (0.012 + 0.02 * share) * (1 + 0.05 * rng.random())
        yield made, (CellKey.of(made), timing(made.sample, seconds))
