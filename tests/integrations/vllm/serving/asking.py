"""What is asked: documents of the needle world and questions about them."""

from collections.abc import Sequence
from typing import Any

from defensivekv.needleworld import make_sample
from tests.integrations.vllm.serving.server import MODEL

TOLERANCE = 1e-3
"""Of log-probabilities."""

_GREEDY = {"model": MODEL, "max_tokens": 12, "temperature": 0}


def document(num_tokens: int, seed: int = 11) -> str:
    text: str = make_sample("multi_key", num_tokens=num_tokens, seed=seed).document
    return text


def questions(num_tokens: int, seed: int = 11, count: int = 1) -> list[tuple[str, str]]:
    """Questions about a document, with it; and what is right to reply."""
    sample = make_sample("multi_key", num_tokens=num_tokens, seed=seed, num_questions=count)
    replies = [question.reply.removesuffix(" <end>") for question in sample.questions]
    return [(f"{sample.document} {one.text}", reply) for one, reply in zip(sample.questions, replies, strict=True)]


def complete(client: Any, prompt: str | Sequence[str], **options: Any) -> Any:
    return client.completions.create(prompt=prompt, **{**_GREEDY, **options})


def chat(client: Any, *messages: str, **options: Any) -> Any:
    said = [{"role": "user", "content": message} for message in messages]
    return client.chat.completions.create(messages=said, **{**_GREEDY, **options})


def without_end(num_tokens: int) -> dict[str, Any]:
    """Options for so many tokens, whatever they are."""
    return {"max_tokens": num_tokens, "extra_body": {"ignore_eos": True}}
