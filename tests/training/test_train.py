from pathlib import Path

import pytest
import torch

from training import train
from training.train import STAGES, Trainer


def test_a_killed_run_goes_on_from_its_last_save_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    folders = (tmp_path / "whole", tmp_path / "killed")
    for folder in folders:
        folder.mkdir()
    whole = Trainer(folders[0])
    whole.run(stop_after=5)
    Trainer(folders[1]).run(stop_after=3)
    resumed = Trainer(folders[1])
    assert resumed.progress.step == 2, "the last save"
    resumed.run(stop_after=3)
    assert resumed.progress == whole.progress
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_schedule_is_in_steps_and_fits_its_time() -> None:
    assert [stage.num_tokens for stage in STAGES] == sorted(stage.num_tokens for stage in STAGES)
    assert STAGES[-1].num_tokens == 2048
    # 4 thousand tokens a step at 5 thousand a second, on one core of a laptop: less than ninety minutes at most.
    assert sum(stage.max_steps for stage in STAGES) * 4_000 / 5_000 < 90 * 60
