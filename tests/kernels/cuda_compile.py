"""What a call would launch on a GPU, compiled for one on a machine that has none: Triton brings ptxas with it.

The call runs on CPU tensors in a process of its own, without the interpreter; instead of a launch, each kernel is
compiled exactly as a launch would have it, sizes, dtypes and alignment with it. What it computes means nothing.
"""

# mypy: disable-error-code="import-untyped"

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SHARED_BYTES = 99 * 1024
"""Shared memory of a block on the smallest of the GPUs that have tensor cores for bfloat16 (compute capability 8.6)."""


@dataclass(frozen=True)
class Compiled:
    """One kernel. shared: bytes of shared memory. spilled: of what there was no register for."""

    name: str
    shared: int
    registers: int
    spilled: int
    ptx: str


def compile_calls(code: str, capability: int) -> list[Compiled]:
    """All that `code` launches, in order. capability: 80 for an A100, 90 for an H100."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.cuda_compile", str(capability)]
    run = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return [Compiled(**json.loads(line)) for line in run.stdout.splitlines()]


def _main(capability: int, code: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What Triton asks of a driver before a launch."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def compile_only(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            registers, spilled = _resources(compiled.asm["cubin"])
            name, shared, ptx = compiled.metadata.name, compiled.metadata.shared, compiled.asm["ptx"]
            print(json.dumps(asdict(Compiled(name, shared, registers, spilled, ptx))))

        return launch

    triton.runtime.driver.set_active(NoDevice())
    JITFunction.__getitem__ = compile_only
    exec(code, {})


def _resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    assert registers is not None
    assert stack is not None
    assert local is not None
    return int(registers[1]), int(stack[1]) + int(local[1])


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.stdin.read())
