"""What must be equal for two runs to give the same records: the model, its weights, its machine, the packages."""

import hashlib
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from defensivekv import __version__
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.integrations.transformers.model import max_positions

PACKAGED_NAME = "needleworld (packaged)"
_SAMPLED = 4096
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Facts:
    """Fields as of `Record`. max_positions: of the model, as far as its configuration says."""

    model: str
    model_revision: str
    dtype: str
    template: Literal["chat", "plain"]
    device: str
    versions: dict[str, str]
    max_positions: int | None

    @property
    def fixed(self) -> dict[str, object]:
        """What all records of a folder have in common."""
        return {name: getattr(self, name) for name in ("model", "model_revision", "dtype", "template")}

    @property
    def noted(self) -> dict[str, object]:
        """All of them, for `run.json`."""
        return asdict(self)


def find_facts(model: PreTrainedModel, plan: RunPlan, *, template: Literal["chat", "plain"]) -> Facts:
    """The facts of this process."""
    name = PACKAGED_NAME if plan.model is None else plan.model
    if Path(name).is_dir():
        name = Path(name).resolve().name
    return Facts(
        model=name,
        model_revision=getattr(model.config, "_commit_hash", None) or fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        template=template,
        device=_device_name(model.device),
        versions={"defensivekv": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
        max_positions=max_positions(model),
    )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the weights' names, shapes and up to 4096 evenly spaced elements of each: seconds for large models."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED)]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sampled.to("cpu", torch.float32).numpy().tobytes())
    return f"weights-{digest.hexdigest()[:16]}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
