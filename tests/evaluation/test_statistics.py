import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.evaluation import mean_interval


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_the_interval_holds_the_mean(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= interval.low <= interval.mean + 1e-9
    assert interval.mean - 1e-9 <= interval.high <= max(values) + 1e-9


def test_more_values_make_a_narrower_interval() -> None:
    few, many = mean_interval([0.0, 1.0] * 5), mean_interval([0.0, 1.0] * 500)
    assert many.high - many.low < (few.high - few.low) / 5


def test_about_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        interval = mean_interval(rng.uniform(0, 1, size=40).tolist())
        hits += interval.low <= 0.5 <= interval.high
    assert 180 <= hits <= 198


def test_one_value_or_equal_values_have_no_width() -> None:
    assert mean_interval([0.4]).low == mean_interval([0.4]).high == 0.4
    assert mean_interval([1.0, 1.0, 1.0]).low == 1.0
