"""What a policy's budget means for a prompt: how much stays, when all of it, and when it is refused."""

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import defensivekv as dkv
from defensivekv.budget import entry_bytes
from defensivekv.cache import RaggedPrefix
from defensivekv.policies.policy import SHORT_PROMPT_WINDOWS, bytes_per_token
from tests.policies.cases import GENERIC, Shape, observation, observation_for, padded, policy_of, seeds, shapes

WINDOWED = [name for name in GENERIC if dkv.policy(name, 1.0).scorer.has_window]
UNEVEN = ["layer-defensivekv", "pyramidkv", "cake"]
SHAPE = Shape(2, 2, 4, 60, 5, 7)


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("budget", [0.29, "29%", 29, "29"])
def test_29_of_100_tokens_are_29_entries_per_head(name: str, budget: float | int | str) -> None:
    layers = [observation_for(name, replace(SHAPE, t=100), seed) for seed in range(3)]
    kept = torch.stack(policy_of(name, budget).select(layers))
    assert int(kept.sum()) == 3 * 2 * 29


@pytest.mark.parametrize("name", GENERIC)
@settings(max_examples=30)
@given(
    shape=shapes(max_tokens=80),
    layers=st.integers(1, 3),
    seed=seeds(),
    permille=st.integers(50, 1100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    wider=st.integers(0, 9),
)
def test_a_budget_in_bytes_is_never_exceeded_and_all_but_used(
    name: str, shape: Shape, layers: int, seed: int, permille: int, dtype: torch.dtype, wider: int
) -> None:
    # The last layer's heads are wider than the others'.
    sizes = [replace(shape, d=shape.d + wider * (layer == layers - 1)) for layer in range(layers)]
    drawn = [observation_for(name, size, seed + layer) for layer, size in enumerate(sizes)]
    observations = [
        replace(layer, queries=layer.queries.to(dtype), keys=layer.keys.to(dtype), values=layer.values.to(dtype))
        for layer in drawn
    ]
    per_token = sum(bytes_per_token(layer) for layer in observations)
    size = per_token * shape.t * permille // 1000
    assume(size >= per_token * policy_of(name, 1.0, shape.w).num_staying)
    kept = policy_of(name, f"{size}B", shape.w).select(observations)
    held = sum(
        RaggedPrefix.gather(layer.keys, layer.values, mask).nbytes
        for layer, mask in zip(observations, kept, strict=True)
    )
    if wider == 0 or name not in UNEVEN:
        assert held <= size
        # Unused: less than one entry of each head.
        assert held > min(size, per_token * shape.t) - per_token
    else:
        entries = sum(int(mask.sum()) for mask in kept)
        allowed = min(floor(Fraction(size, per_token) * shape.h * layers), shape.h * layers * shape.t)
        assert allowed - (0 if name == "layer-defensivekv" else shape.h * layers) < entries + 1 <= allowed + 1


def test_bytes_per_token_count_keys_values_and_positions_of_every_head() -> None:
    assert bytes_per_token(observation(SHAPE, 0)) == 2 * entry_bytes(5, 7, 4) == 2 * (12 * 4 + 4)


def test_every_row_of_a_batch_has_the_budget_to_itself() -> None:
    rows = [observation(replace(SHAPE, t=tokens), tokens) for tokens in (40, 60)]
    rows = [replace(row, output_projection=rows[0].output_projection) for row in rows]
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, :20] = False
    batch = padded(rows, valid, 0.0)
    kept = {
        budget: dkv.policy("defensivekv", budget, window_size=4).select([batch])[0].sum((1, 2)).tolist()
        for budget in (0.25, 10, f"{10 * bytes_per_token(batch)}B")
    }
    assert list(kept.values()) == [[20, 30], [20, 20], [20, 20]]


@pytest.mark.parametrize("name", ["full", *GENERIC])
def test_the_whole_budget_keeps_everything_but_the_pads(name: str) -> None:
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[0, :20] = False
    kept = policy_of(name, 1.0).select([replace(observation(SHAPE, 0, rows=2), valid=valid)])[0]
    assert torch.equal(kept, valid[:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 31])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_short_prompt_is_kept_whole(name: str, tokens: int) -> None:
    assert tokens < SHORT_PROMPT_WINDOWS * 4
    layer = observation(replace(SHAPE, t=tokens, w=min(4, tokens)), 0)
    kept = policy_of(name, 0.12).select([layer, layer])
    assert all(bool(mask.all()) for mask in kept)


def test_a_short_prompt_whose_budget_holds_the_window_is_compressed() -> None:
    kept = dkv.policy("snapkv", 0.5, window_size=4).select([observation(replace(SHAPE, t=20), 0)])[0]
    assert kept.sum(-1).tolist() == [[10, 10]]


@pytest.mark.parametrize("budget", [0.05, "5%", "300B"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_budget_below_the_window_is_refused_and_says_what_to_give(name: str, budget: float | str) -> None:
    with pytest.raises(dkv.BudgetError, match=r"below the observation window of 4: give at least 0\.0667"):
        policy_of(name, budget).select([observation(SHAPE, 0)])


def test_the_share_that_the_message_says_is_enough() -> None:
    layer = observation(replace(SHAPE, t=300), 0)
    with pytest.raises(dkv.BudgetError, match=r"give at least 0\.0134"):
        dkv.policy("snapkv", 0.01, window_size=4).select([layer])
    assert int(dkv.policy("snapkv", 0.0134, window_size=4).select([layer])[0].sum()) == 2 * 4


def test_a_count_below_the_window_is_refused_without_a_prompt() -> None:
    with pytest.raises(dkv.BudgetError, match="below the observation window of 32"):
        dkv.policy("snapkv", 31)
    assert dkv.policy("snapkv", 31, window_size=31).window_size == 31


@pytest.mark.parametrize("window_size", [0, -1])
def test_a_window_of_nothing_is_refused(window_size: int) -> None:
    with pytest.raises(dkv.InvalidInputError, match="must be at least 1"):
        dkv.policy("snapkv", 0.5, window_size=window_size)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        dkv.policy("snapkv", 0.5).row_share(0, 100)


@given(tokens=st.integers(1, 3000), percent=st.integers(1, 100), window=st.integers(1, 64))
def test_the_share_of_a_row_is_the_budget_or_all_or_an_error(tokens: int, percent: int, window: int) -> None:
    policy = dkv.policy("snapkv", percent / 100, window_size=window)
    entries = tokens * percent // 100
    if entries < window and tokens >= SHORT_PROMPT_WINDOWS * window:
        with pytest.raises(dkv.BudgetError):
            policy.row_share(tokens, 100)
        return
    is_whole = percent == 100 or tokens <= window or entries < window
    assert policy.row_share(tokens, 100) == (1 if is_whole else Fraction(percent, 100))
