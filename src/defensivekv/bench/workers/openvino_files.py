"""A transformers model as OpenVINO's own files, with the smallest tokenizer that its pipelines accept."""

import shutil
from pathlib import Path

import openvino
import torch
from openvino_tokenizers import build_rwkv_tokenizer
from optimum.exporters.openvino import export_from_model

from .random_model import model_of


def convert(config_file: str, model: str | None, folder: Path, seed: int) -> None:
    """Writes the folder, and last a file `done` with the size of the vocabulary."""
    shutil.rmtree(folder, ignore_errors=True)
    loaded = model_of(config_file, model, torch.float16, torch.device("cpu"), seed)
    loaded.config._name_or_path = "model"
    vocabulary = loaded.config.vocab_size
    export_from_model(loaded, output=folder, task="text-generation-with-past", stateful=True, patch_16bit_model=True)
    # Prompts are given as tokens. A tokenizer must be there, and must know every byte.
    tokenizer, detokenizer = build_rwkv_tokenizer([f"{number + 1} {bytes([number])!r} 1" for number in range(256)])
    openvino.save_model(tokenizer, folder / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, folder / "openvino_detokenizer.xml")
    (folder / "done").write_text(str(vocabulary), encoding="ascii")
