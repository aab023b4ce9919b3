"""What kvpress decides on seeded inputs, kept as test data. Run in an environment of kvpress's own:

python3 -m venv /path/to/env && /path/to/env/bin/pip install -r oracles/kvpress/requirements.txt
/path/to/env/bin/python oracles/kvpress/make_decisions.py tests/data/kvpress

Writes `inputs.safetensors` (queries, keys, values, output projections, layer by layer, of one prompt of a small random
model; and what a second reading showed, for KVzip) and `decisions.safetensors` (for each case, what every layer keeps).
`cases.json` says how each case was made.
"""

import argparse
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.utils import get_prerope_query_states
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import rotate_half

LAYERS, HEADS, GROUPS, SIZE, TOKENS, VOCABULARY = 3, 2, 2, 16, 280, 64
PROFILE = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.3]])
PROFILE_SINKS, PROFILE_RECENT = 4, 16

CASES: dict[str, tuple[Callable[[float], Any], tuple[float, ...]]] = {
    "streaming-llm": (lambda ratio: StreamingLLMPress(ratio, n_sink=4), (0.5, 0.75)),
    "tova": (lambda ratio: TOVAPress(ratio), (0.5, 0.75)),
    "observed-attention": (lambda ratio: ObservedAttentionPress(ratio), (0.5, 0.75)),
    "knorm": (lambda ratio: KnormPress(ratio), (0.5, 0.75)),
    "keydiff": (lambda ratio: KeyDiffPress(ratio), (0.5, 0.75)),
    "lagkv": (lambda ratio: LagKVPress(ratio, n_sink=4, lag_size=32), (0.5, 0.75)),
    "snapkv": (lambda ratio: SnapKVPress(ratio, window_size=32, kernel_size=5), (0.5, 0.75, 0.8)),
    "snapkv-wide": (lambda ratio: SnapKVPress(ratio, window_size=64, kernel_size=7), (0.5,)),
    "pyramidkv": (lambda ratio: PyramidKVPress(ratio, window_size=8, beta=5), (0.5, 0.75, 0.8)),
    "chunkkv": (lambda ratio: ChunkKVPress(SnapKVPress(ratio, window_size=20), chunk_length=20), (0.5, 0.75)),
    "adakv": (lambda ratio: AdaKVPress(SnapKVPress(ratio, window_size=32)), (0.5, 0.75)),
    "criticalkv": (lambda ratio: CriticalKVPress(SnapKVPress(ratio, window_size=32)), (0.5, 0.75)),
    "ada-criticalkv": (lambda ratio: CriticalAdaKVPress(SnapKVPress(ratio, window_size=32)), (0.5, 0.75)),
    "expected-attention": (lambda ratio: ExpectedAttentionPress(ratio, n_future_positions=64), (0.5, 0.75)),
    "kvzip": (lambda ratio: KVzipPress(ratio, chunk_size=100), (0.5, 0.75)),
    "duo-attention": (lambda ratio: DuoAttentionPress(head_compression_ratio=ratio), (0.5,)),
}


def make_model(folder: Path) -> LlamaForCausalLM:
    """A small random model whose attention is peaked, saved to `folder` with a tokenizer, as KVzip wants it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * GROUPS * SIZE,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * GROUPS,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        max_position_embeddings=2048,
        initializer_range=0.25,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


class Recorder:
    """Keeps what the presses are given and what they decide."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}

    def observe(self, model: LlamaForCausalLM, ids: torch.Tensor) -> None:
        """Queries, keys, values and output projections of a reading that nothing is evicted from."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            cos, sin = kwargs["position_embeddings"]
            queries = get_prerope_query_states(module, kwargs["hidden_states"])
            queries = queries * cos.unsqueeze(1) + rotate_half(queries) * sin.unsqueeze(1)
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            for name, tensor in (("queries", queries), ("keys", layer.keys), ("values", layer.values)):
                self.inputs[f"{module.layer_idx}.{name}"] = tensor
            self.inputs[f"{module.layer_idx}.output_projection"] = module.o_proj.weight.detach()

        hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        model.model(input_ids=ids, past_key_values=DynamicCache())
        for handle in hooks:
            handle.remove()

    def hear(self, press: KVzipPress) -> None:
        """Makes the press keep the queries and keys of its second reading."""
        compute = press._compute_cross_attention

        def listening(module: Any, hidden_states: Any, keys: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
            cos, sin = kwargs["position_embeddings"]
            queries = get_prerope_query_states(module, hidden_states)
            queries = queries * cos.unsqueeze(1) + rotate_half(queries) * sin.unsqueeze(1)
            name = f"{module.layer_idx}.repeat.{press.start_idx}.{press.end_idx}"
            self.inputs[f"{name}.queries"] = queries
            self.inputs[f"{name}.keys"] = keys[:, :, -queries.shape[2] :]
            return compute(module, hidden_states, keys, kwargs)

        press._compute_cross_attention = listening


def decide(model: LlamaForCausalLM, press: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer keeps, (heads, tokens)."""
    kept: dict[int, torch.Tensor] = {}
    if hasattr(press, "compress") and not isinstance(press, KVzipPress):
        compress = press.compress

        def watching(module: Any, hidden: Any, keys: torch.Tensor, *rest: Any) -> Any:
            new_keys, new_values = compress(module, hidden, keys, *rest)
            # A kept key is one that is found, to the bit, among those that came back.
            same = (keys[:, :, :, None] == new_keys[:, :, None]).all(-1).any(-1)
            kept[module.layer_idx] = same[0]
            return new_keys, new_values

        press.compress = watching
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    result = []
    for layer in model.model.layers:
        module = layer.self_attn
        mask = kept.get(module.layer_idx, torch.ones(HEADS, TOKENS, dtype=torch.bool)).clone()
        if module.masked_key_indices is not None:
            _, heads, positions = module.masked_key_indices
            mask[heads, positions] = False
        result.append(mask)
    return result


def published_profile(_model: Any) -> tuple[int, int, np.ndarray]:
    """Stands for the download of a profile."""
    return PROFILE_SINKS, PROFILE_RECENT, PROFILE


@torch.no_grad()
def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    DuoAttentionPress.load_attention_pattern = staticmethod(published_profile)
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place))
        eager = LlamaForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
        ids = torch.randint(1, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        recorder = Recorder()
        recorder.observe(model, ids)
        decisions: dict[str, torch.Tensor] = {}
        for name, (make, ratios) in CASES.items():
            for ratio in ratios:
                press = make(ratio)
                if isinstance(press, KVzipPress):
                    recorder.hear(press)
                layers = decide(eager if name == "observed-attention" else model, press, ids)
                decisions[f"{name}@{ratio}"] = torch.stack(layers)
    save_file({name: tensor.contiguous() for name, tensor in recorder.inputs.items()}, folder / "inputs.safetensors")
    save_file(decisions, folder / "decisions.safetensors")
    about = {
        "versions": {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")},
        "rope_theta": 10000.0,
        "profile": {"heads": PROFILE.tolist(), "num_sinks": PROFILE_SINKS, "num_recent": PROFILE_RECENT},
        "cases": {name: list(ratios) for name, (_, ratios) in CASES.items()},
    }
    (folder / "cases.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
