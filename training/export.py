"""Writes what ships: `python -m training.export` turns a finished run into a checkpoint that transformers loads.

Weights (safetensors), configuration, tokenizer, and the figures that the model card quotes, measured on the exported
files themselves.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from defensivekv.needleworld import demo_model
from defensivekv.needleworld.vocabulary import BOS, END, PAD, TOKEN_IDS, UNKNOWN
from training.model import ModelConfig


def export_model(weights: dict[str, torch.Tensor], config: ModelConfig, folder: Path) -> None:
    """Writes weights, configuration and tokenizer to `folder`."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=TOKEN_IDS[BOS],
            eos_token_id=TOKEN_IDS[END],
            pad_token_id=TOKEN_IDS[PAD],
            dtype="float32",
        )
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise ValueError(f"the run is of another model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; `<bos>` is put in front."""
    tokenizer = Tokenizer(WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_IDS[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=ModelConfig(vocab_size=len(TOKEN_IDS)).max_position_embeddings,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/default"), help="the run's folder")
    parser.add_argument("--output", type=Path, default=Path(demo_model()), help="where the checkpoint goes")
    arguments = parser.parse_args()
    state = torch.load(arguments.folder / "training.pt", weights_only=False)
    export_model(state["model"], ModelConfig(vocab_size=len(TOKEN_IDS)), arguments.output)
    (arguments.output / "training.json").write_text(json.dumps(state["progress"], indent=1) + "\n")
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 2**20:.1f} MiB after {state['progress']['tokens']:,} tokens")


if __name__ == "__main__":
    main()
