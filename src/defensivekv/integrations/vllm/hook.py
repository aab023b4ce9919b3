"""The one place where vLLM is changed: the making of an engine's configuration."""

import functools
from typing import Any

from defensivekv.integrations.vllm.options import KEY


def register() -> None:
    """Called by vLLM in each of its processes, as often as it likes."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "defensivekv"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.additional_config
        if not isinstance(given, dict) or KEY not in given:
            return original(self, *args, **kwargs)
        from defensivekv.integrations.vllm.versions import check_version

        check_version()
        from defensivekv.integrations.vllm.configure import configure
        from defensivekv.integrations.vllm.options import Options

        options = Options.parse(given[KEY])
        return configure(original(self, *args, **kwargs), options)

    create_engine_config.defensivekv = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
