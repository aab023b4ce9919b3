import pytest
from transformers import PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import tiny_model


@pytest.fixture
def model() -> PreTrainedModel:
    """A small Llama, enabled."""
    made = tiny_model("llama")
    dkv.enable(made)
    return made
