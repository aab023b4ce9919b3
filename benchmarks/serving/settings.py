"""Shapes of models and loads."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 32_000

    def config(self, max_tokens: int, dtype: str) -> dict[str, Any]:
        """As transformers writes it."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": max_tokens,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@dataclass(frozen=True)
class Load:
    """Requests that are all there at the start, and the cache that they share.

    cache_tokens: for as many tokens there is memory; whole blocks of it. ways: of serving, by label; None: stock vLLM.
    is_compiled: as vLLM does unless told otherwise, which takes minutes at the start of each engine. rounds: times that
    every way is run, in turns.
    """

    name: str
    shape: Shape
    requests: int
    prompt: int
    generated: int
    cache_tokens: int
    ways: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    dtype: str = "bfloat16"
    is_compiled: bool = False
    rounds: int = 3


def _ways(budgets: tuple[float, ...], policy: str = "defensivekv") -> dict[str, dict[str, Any] | None]:
    ways: dict[str, dict[str, Any] | None] = {"stock": None}
    for budget in budgets:
        ways[f"{budget:.0%}"] = {"policy": policy, "budget": budget} if budget < 1 else {"policy": "full"}
    return ways


STEP = Load(
    "decode-step",
    Shape(2048, 8192, 4, 32, 8, 64),
    requests=8,
    prompt=8192,
    generated=33,
    cache_tokens=8 * 8448,
    ways=_ways((0.2,)),
    is_compiled=True,
    rounds=2,
)
"""Eight requests of 8k tokens, all in the cache at once: what a step takes. Four layers of Llama-3.2-1B's shape."""

THROUGHPUT = Load(
    "throughput",
    Shape(768, 2048, 12, 12, 4, 64),
    requests=24,
    prompt=2048,
    generated=512,
    cache_tokens=4 * 2560,
    ways=_ways((1.0, 0.5, 0.2, 0.1)),
)
"""More requests than fit: four without eviction."""

FULL = (STEP, THROUGHPUT)

_TINY = Shape(64, 128, 2, 4, 2, 32, vocab_size=512)
QUICK = (
    Load("decode-step", _TINY, 2, 300, 5, 2 * 384, _ways((0.2,)), "float32"),
    Load("throughput", _TINY, 6, 300, 40, 2 * 384, _ways((1.0, 0.2)), "float32"),
)
