"""What OpenAI's client asks of either server."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integrations.vllm.serving.asking import TOLERANCE, chat, complete, document, questions, without_end
from tests.integrations.vllm.serving.server import MAX_LENGTH, MODEL, READ_WHOLE, Server

openai = pytest.importorskip("openai")

NUM_TOKENS = 768
((PROMPT, REPLY),) = questions(NUM_TOKENS)
DOCUMENT, QUESTION = document(NUM_TOKENS), PROMPT[len(document(NUM_TOKENS)) + 1 :]
PROMPT_TOKENS = NUM_TOKENS + len(QUESTION.split())

REPLY_TOKENS = len(REPLY.split()) + 1
"""The last is <end>."""

LONG = 2500
"""Tokens that take much longer than it takes to leave."""

REFUSED: dict[str, dict[str, Any]] = {
    "no text": {"prompt": ""},
    "no prompt": {"prompt": []},
    "a prompt that is too long": {"prompt": document(MAX_LENGTH)},
    "a negative number of tokens": {"prompt": PROMPT, "max_tokens": -1},
}


def test_the_model_is_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, MAX_LENGTH)


def test_a_completion(client: Any) -> None:
    answer = complete(client, PROMPT)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (f" {REPLY}", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, REPLY_TOKENS)


def test_a_chat_completion(client: Any) -> None:
    answer = chat(client, DOCUMENT, QUESTION)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", f" {REPLY}", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, REPLY_TOKENS)


def test_prompts_of_one_request_are_answered_in_their_order(client: Any) -> None:
    prompts = [PROMPT, *(document(length) for length in (256, 1536, 300))]
    answer = complete(client, prompts)
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == alone


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1536])
def test_a_streamed_completion_is_the_same_text_in_pieces(client: Any, num_tokens: int) -> None:
    prompt = document(num_tokens)
    whole = complete(client, prompt, max_tokens=40)
    *pieces, last = complete(client, prompt, max_tokens=40, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert len([piece for piece in pieces if piece.choices[0].text]) > 1
    assert [piece.choices[0].finish_reason for piece in pieces[-2:]] == [None, "length"]
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_streamed_chat_completion_is_the_same_text_in_pieces(client: Any) -> None:
    whole = chat(client, DOCUMENT, QUESTION)
    *pieces, last = chat(client, DOCUMENT, QUESTION, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage == whole.usage


def test_log_probabilities_of_a_completion(client: Any) -> None:
    logprobs = complete(client, DOCUMENT, logprobs=4, **without_end(20)).choices[0].logprobs
    assert [len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.top_logprobs)] == [20, 20, 20]
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 4
        assert logprob == top[token] == max(top.values()) <= 0
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5


def test_log_probabilities_of_a_chat_completion(client: Any) -> None:
    answer = chat(client, DOCUMENT, logprobs=True, top_logprobs=4, **without_end(20))
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 20
    for token in tokens:
        tops = [top.logprob for top in token.top_logprobs]
        assert token.top_logprobs[0].token == token.token
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 4
        assert token.logprob == tops[0] <= 0
        assert sum(map(math.exp, tops)) <= 1 + 1e-5


def test_text_ends_before_a_stop_string(client: Any) -> None:
    free = complete(client, DOCUMENT, max_tokens=40).choices[0]
    ended = complete(client, DOCUMENT, max_tokens=40, stop=["never", "."]).choices[0]
    assert "." in free.text
    assert ended.text == free.text.partition(".")[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", ".")


def test_a_seed_gives_the_same_samples_again(client: Any) -> None:
    def samples(seed: int) -> list[str]:
        answer = complete(client, DOCUMENT, n=2, temperature=1.5, seed=seed, **without_end(24))
        assert answer.usage.completion_tokens == 48
        return [choice.text for choice in answer.choices]

    first = samples(3)
    assert samples(3) == first
    assert len({*first, *samples(8)}) == 4


@pytest.mark.parametrize("num_tokens", [1, 7, 200])
def test_no_more_tokens_come_than_are_asked_for(client: Any, num_tokens: int) -> None:
    answer = complete(client, DOCUMENT, **without_end(num_tokens))
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (num_tokens, "length")


@pytest.mark.parametrize("max_tokens", [9, 10, None])
def test_a_text_ends_where_it_is_as_long_as_may_be(client: Any, max_tokens: int | None) -> None:
    prompt = document(MAX_LENGTH - 9)
    answer = complete(client, prompt, max_tokens=max_tokens, extra_body={"ignore_eos": True})
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (MAX_LENGTH, "length")


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_status_400(client: Any, server: Server, reason: str) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, **REFUSED[reason])
    server.wait_until_idle()


@pytest.mark.parametrize("num_tokens", [300, READ_WHOLE - 1, READ_WHOLE, 1536])
def test_the_same_prompt_is_answered_the_same_twice(client: Any, num_tokens: int) -> None:
    first, second = (complete(client, document(num_tokens), logprobs=0, **without_end(24)) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    scores = [answer.choices[0].logprobs.token_logprobs for answer in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)


def test_prompts_beside_each_other_are_answered_as_alone(client: Any, server: Server) -> None:
    asked = [pair for length in (256, 512, 900, 1536) for pair in questions(length, seed=length, count=4)]

    def ask(pair: tuple[str, str]) -> str:
        text: str = complete(client, pair[0]).choices[0].text
        return text

    alone = [ask(pair) for pair in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        beside = list(threads.map(ask, asked))
    assert beside == alone
    assert sum(text == f" {reply}" for text, (_, reply) in zip(alone, asked, strict=True)) >= 12
    server.wait_until_idle()


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1536])
def test_a_client_that_leaves_a_stream_leaves_nothing_behind(client: Any, server: Server, num_tokens: int) -> None:
    # A small model may be done before its server notices that the client has left, though not every time.
    prompts = [document(num_tokens, seed=seed) for seed in range(4)]
    for _ in range(10):
        before = server.metric("generation_tokens_total")
        with complete(client, prompts, stream=True, **without_end(LONG)) as pieces:
            assert len(list(itertools.islice(pieces, 5))) == 5
        server.wait_until_generated(before + 5)
        server.wait_until_idle()
        assert complete(client, PROMPT).choices[0].text == f" {REPLY}"
        if server.metric("generation_tokens_total") - before < len(prompts) * LONG:
            return
    pytest.fail("every request went on to its end")


def test_a_client_that_does_not_wait_leaves_nothing_behind(client: Any, server: Server) -> None:
    before = server.metric("generation_tokens_total")
    prompts = [document(1536, seed=seed) for seed in range(6)]
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.5), prompts, **without_end(LONG))
    server.wait_until_idle()
    assert server.metric("generation_tokens_total") - before < len(prompts) * LONG
    assert complete(client, PROMPT).choices[0].text == f" {REPLY}"
