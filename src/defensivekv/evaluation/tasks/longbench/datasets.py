"""LongBench's 16 English datasets: how each is answered and scored.

Metrics and numbers of new tokens are LongBench's own (eval.py and config/dataset2maxlen.json, MIT licence).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """domain: axis of the radar. metric: a name in `METRICS`. max_new_tokens: of an answer.

    is_bare: asked without chat template and special tokens. stop: texts that end an answer.
    """

    domain: str
    metric: str
    max_new_tokens: int
    is_bare: bool = False
    stop: tuple[str, ...] = ()


DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset("single-document QA", "f1", 128),
    "qasper": Dataset("single-document QA", "f1", 128),
    "multifieldqa_en": Dataset("single-document QA", "f1", 64),
    "hotpotqa": Dataset("multi-document QA", "f1", 32),
    "2wikimqa": Dataset("multi-document QA", "f1", 32),
    "musique": Dataset("multi-document QA", "f1", 32),
    "gov_report": Dataset("summarisation", "rouge_l", 512),
    "qmsum": Dataset("summarisation", "rouge_l", 512),
    "multi_news": Dataset("summarisation", "rouge_l", 512),
    "trec": Dataset("few-shot", "classification", 64, is_bare=True),
    "triviaqa": Dataset("few-shot", "f1_first_line", 32, is_bare=True),
    # Models go on with the next dialogue; LongBench's pred.py ends the answer at the newline before it.
    "samsum": Dataset("few-shot", "rouge_l_first_line", 128, is_bare=True, stop=("\n",)),
    "passage_count": Dataset("synthetic", "count", 32),
    "passage_retrieval_en": Dataset("synthetic", "retrieval", 32),
    "lcc": Dataset("code", "code_similarity", 64, is_bare=True),
    "repobench-p": Dataset("code", "code_similarity", 64, is_bare=True),
}
"""By LongBench's own names."""
