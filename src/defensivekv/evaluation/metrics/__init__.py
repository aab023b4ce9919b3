"""How an answer is scored, by the published scorers' own rules. Knows no task, no policy and no model."""

from defensivekv.evaluation.metrics.matching import (
    classification,
    count,
    needle_recall,
    paragraph_number,
    retrieval,
    string_match_all,
    string_match_any,
    word_recall,
)
from defensivekv.evaluation.metrics.metric import Metric
from defensivekv.evaluation.metrics.similarity import code_similarity
from defensivekv.evaluation.metrics.text import f1, f1_first_line, load_rouge, rouge_l, rouge_l_first_line

__all__ = ["METRICS", "Metric", "load_rouge", "paragraph_number"]

_LONGBENCH = "LongBench metrics.py and eval.py (arXiv 2308.14508, MIT)"
_RULER = "RULER scripts/eval (arXiv 2404.06654, Apache-2.0)"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("f1", 1, f1, "F1 over words", _LONGBENCH),
        Metric("f1_first_line", 1, f1_first_line, "F1 over words of the first line", _LONGBENCH),
        Metric("rouge_l", 1, rouge_l, "ROUGE-L by the package rouge 1.0.1", _LONGBENCH),
        Metric("rouge_l_first_line", 1, rouge_l_first_line, "ROUGE-L of the first line", _LONGBENCH),
        Metric("classification", 1, classification, "the class named in the first line", _LONGBENCH),
        Metric("count", 1, count, "share of the numbers named that are right", _LONGBENCH),
        Metric("retrieval", 1, retrieval, "share of the numbers named that are the paragraph's", _LONGBENCH),
        Metric("code_similarity", 1, code_similarity, "edit similarity of the first line of code", _LONGBENCH),
        Metric("string_match_all", 1, string_match_all, "share of the references found", _RULER),
        Metric("string_match_any", 1, string_match_any, "whether any reference is found", _RULER),
        Metric(
            "needle_recall",
            1,
            needle_recall,
            "share of the needle's words found",
            "after Fu et al. (arXiv 2402.10171), over different words, without punctuation",
        ),
        Metric(
            "word_recall", 1, word_recall, "share of the references found as whole words", "defensivekv.needleworld"
        ),
    )
}
"""Every metric by its name."""
