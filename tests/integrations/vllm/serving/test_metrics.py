"""The pool of blocks, as /metrics tells of it while requests run."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integrations.vllm.serving.asking import complete, document, without_end
from tests.integrations.vllm.serving.server import BLOCKS, MAX_REQUESTS, Server

BOTH = ("stock", "evicting")
in_both = pytest.mark.parametrize("name", BOTH)

HELD = {"stock": 8, "evicting": 2}
"""Blocks of 128 tokens that prompts of 900 tokens, of which 180 stay, and 70 generated tokens take."""

AT_ONCE = {"stock": BLOCKS // HELD["stock"], "evicting": MAX_REQUESTS}
"""Such requests. Ours are as many as there may be; blocks are left."""

ROUNDS = 30


def _watch(server: Server, prompts: list[str], generated: int, expected: tuple[int, int]) -> set[tuple[int, int]]:
    """Requests that run and blocks that they hold, as they are seen together while the prompts are answered.

    Asked at least thrice and until `expected` was seen: on a busy machine, a round may pass between two looks.
    """
    seen = set()
    server.wait_until_idle()
    with server.connect() as client, ThreadPoolExecutor(1) as thread:
        for number in range(ROUNDS):
            answer = thread.submit(complete, client, prompts, **without_end(generated))
            while not answer.done():
                seen.add((int(server.metric("num_requests_running")), server.blocks))
            assert answer.result().usage.completion_tokens == len(prompts) * generated
            if number >= 2 and expected in seen:
                break
    server.wait_until_idle()
    return seen


@in_both
def test_requests_hold_blocks_for_what_stays_and_give_them_back(servers: dict[str, Server], name: str) -> None:
    prompts = [document(900, seed=seed) for seed in range(4)]
    expected = (4, 4 * HELD[name])
    seen = _watch(servers[name], prompts, 70, expected)
    assert expected in seen
    assert max(blocks for _, blocks in seen) == 4 * HELD[name]


@in_both
def test_more_requests_run_at_once_where_less_stays(servers: dict[str, Server], name: str) -> None:
    prompts = [document(900, seed=seed) for seed in range(2 * MAX_REQUESTS)]
    expected = (AT_ONCE[name], AT_ONCE[name] * HELD[name])
    seen = _watch(servers[name], prompts, 70, expected)
    assert expected in seen
    assert max(running for running, _ in seen) == AT_ONCE[name]


@in_both
def test_a_prompt_in_chunks_gives_blocks_back_once_it_is_read(servers: dict[str, Server], name: str) -> None:
    expected = {"stock": (1, 12), "evicting": (1, 3)}[name]
    seen = _watch(servers[name], [document(1500)], 30, expected)
    assert expected in seen
    assert max(blocks for _, blocks in seen) <= 12
