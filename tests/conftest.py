"""Settings of all tests: shapes are checked at run time, and hypothesis draws the same examples every time."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Before anything imports Triton: without a GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before the first import of the package. The rest of it is about models and files, not about shapes.
_CHECKED = ["defensivekv.policies", "defensivekv.cache", "defensivekv.attention"]
if find_spec("beartype") is not None:
    jaxtyping.install_import_hook(_CHECKED, "beartype.beartype")

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Shapes are not checked, as in a user's program: the package's own errors are what remains."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
