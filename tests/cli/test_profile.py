"""`defensivekv profile`, from the command to a policy that uses what it wrote."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app
from defensivekv.policies.profile import HeadProfile


def test_a_profile_of_the_packaged_model_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    result = CliRunner().invoke(app, ["profile", "--output", str(path), "--sinks", "4", "--recent", "64"])
    assert result.exit_code == 0, result.output
    profile = HeadProfile.load(path)
    assert (profile.num_sinks, profile.num_recent) == (4, 64)
    assert all(0 <= share <= 1 for layer in profile.heads for share in layer)
    assert "layer   0" in result.output
    policy = dkv.policy("duo-attention", 0.5, profile=path)
    assert policy.num_sinks == 4


def test_a_model_of_ones_own_needs_texts(tmp_path: Path) -> None:
    with pytest.raises(dkv.InvalidInputError, match="no text: give --text FILE"):
        CliRunner().invoke(app, ["profile", "some/model"], catch_exceptions=False)
    with pytest.raises(dkv.InvalidInputError, match="there is no folder"):
        CliRunner().invoke(app, ["profile", "--output", str(tmp_path / "no" / "p.json")], catch_exceptions=False)
