"""Our decisions against those of the authors' code; `tests/data/reference/README.md` says how they were made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import defensivekv as dkv

OPS = Path(__file__).parent.parent / "data" / "reference" / "ops"
CASES = json.loads((OPS / "index.json").read_text())

pytestmark = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])


def _policy(case: dict[str, Any]) -> dkv.Policy:
    return dkv.policy(case["method"].replace("_", "-"), budget=case["budget"], protect_window=False)


def _layers(case: dict[str, Any]) -> tuple[list[dkv.Observation], list[Tensor], list[Tensor]]:
    """Observations, the authors' scores and the authors' kept sets."""
    tensors = load_file(OPS / f"{case['name']}.safetensors")

    def of(layer: int, name: str) -> Tensor:
        tensor: Tensor = tensors[f"layer{layer}.{name}"]
        return tensor

    numbers = range(case["num_layers"])
    observations = [
        dkv.Observation(
            queries=of(layer, "q_window")[None],
            keys=of(layer, "keys")[None],
            values=of(layer, "values")[None],
            output_projection=of(layer, "o_proj"),
            scaling=case["head_dim"] ** -0.5,
        )
        for layer in numbers
    ]
    return observations, [of(n, "scores") for n in numbers], [of(n, "kept").bool() for n in numbers]


def test_our_scores_are_the_authors(case: dict[str, Any]) -> None:
    observations, scores, _ = _layers(case)
    for observation, expected in zip(observations, scores, strict=True):
        ours = _policy(case).score(observation, num_layers=len(observations)).scores[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


def test_our_kept_sets_are_the_authors_entry_for_entry(case: dict[str, Any]) -> None:
    observations, scores, kept = _layers(case)
    ours = torch.stack([mask[0] for mask in _policy(case).select(observations)])
    theirs, reference = torch.stack(kept), torch.stack(scores)
    assert int(ours.sum()) == int(theirs.sum()) == sum(map(sum, case["kept_per_head"]))
    is_tied = reference == reference[theirs].min()  # which of them stay is not decided, only how many
    assert torch.equal(ours & ~is_tied, theirs & ~is_tied)
