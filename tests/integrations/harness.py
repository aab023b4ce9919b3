"""Small tasks of the lm-evaluation-harness over documents of the needle world, as files of one's own."""

import json
from pathlib import Path

from defensivekv.needleworld import Sample, make_sample

SAMPLES = [make_sample("multi_key", num_tokens=384, seed=seed, num_questions=2) for seed in (21, 22)]

_GENERATE = 'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
_GENERATE += 'generation_kwargs: {until: ["<end>"], max_gen_toks: 10, do_sample: false, temperature: 1.0}\n'
_GENERATE += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
_CHOICE = 'output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: "{{choices}}"\n'
_CHOICE += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
_ROLLING = 'output_type: loglikelihood_rolling\ndoc_to_target: "{{context}}"\n'
_ROLLING += "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"

_TASKS = {
    "needle_generate": ("{{context}} {{question}}", _GENERATE),
    "needle_choice": ("{{context}} {{question}}", _CHOICE),
    "needle_no_boundary": ("{{question}}", _GENERATE),
    "needle_twice": ("{{context}} {{context}} {{question}}", _GENERATE),
    "needle_rolling": ("", _ROLLING),
}


def choices(sample: Sample) -> list[str]:
    """The replies to the sample's questions, in their order."""
    return [question.reply.removesuffix(" <end>") for question in sample.questions]


def write_tasks(folder: Path) -> Path:
    """Writes the tasks and their documents, two questions about each of two documents; returns the folder."""
    rows = [
        {
            "context": sample.document,
            "question": question.text,
            "answer": question.reply.removesuffix(" <end>"),
            "choices": choices(sample),
            "label": number,
        }
        for sample in SAMPLES
        for number, question in enumerate(sample.questions)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    for name, (prompt, rest) in _TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(
            f"{head}doc_to_text: {json.dumps(prompt)}\n{rest}metadata: {{version: 1}}\n"
        )
    return folder
