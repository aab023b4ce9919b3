"""A transformers model of a given shape with random weights, made in seconds."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

_DRAWN = 1_000_003
"""Numbers drawn, and repeated. A prime, so that no two rows of a matrix are the same."""


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The model in evaluation mode, its attention SDPA. Matrices are normal numbers, norms are ones, biases zeros."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # As transformers draws them, a billion weights take 16 s.
        with device, no_init_weights():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(seed)).to(device, dtype) * 0.02
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0 if name.endswith("bias") else 1)
                continue
            # Each goes on where the last one ended: equal matrices would be stored once by some formats.
            _repeat(drawn.roll(-start), parameter)
            start = (start + parameter.numel()) % _DRAWN
    return model.eval()


def _repeat(drawn: torch.Tensor, parameter: torch.Tensor) -> None:
    flat, count = parameter.view(-1), len(drawn)
    whole = len(flat) // count * count
    flat[:whole].view(-1, count).copy_(drawn)
    flat[whole:].copy_(drawn[: len(flat) - whole])


def model_of(config_file: str, folder: str | None, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The model in a folder, or one of the shape in a `config.json` with random weights."""
    if folder is not None:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        return loaded.to(device).eval()
    return random_model(AutoConfig.from_pretrained(Path(config_file).parent), dtype, device, seed)
