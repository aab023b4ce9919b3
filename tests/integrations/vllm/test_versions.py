import pytest

import defensivekv as dkv
from defensivekv.integrations.vllm import versions


def test_another_release_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.99.0")
    with pytest.raises(dkv.UnsupportedModelError, match=r"vLLM 0\.99\.0 is not supported: .*install vllm==0\.32\.0"):
        versions.check_version()
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.32.0")
    versions.check_version()
