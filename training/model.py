"""A small Llama with the parameter names of transformers' `LlamaForCausalLM`, written for training on a CPU.

A training row is a document followed by several questions. Every question attends to the document and to itself,
and its positions go on where the document ends: as it will be asked later, of a compressed document.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, under the names of `LlamaConfig`."""

    vocab_size: int
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 256
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    def to_dict(self) -> dict[str, float]:
        """As keyword arguments."""
        return asdict(self)


class RotaryEmbedding:
    """Cosines and sines of positions, and the rotation by them, in Llama's half-split layout."""

    def __init__(self, config: ModelConfig) -> None:
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        self.frequencies = config.rope_theta**-half

    def __call__(self, positions: Float[Tensor, " t"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (t, head_dim) each."""
        angles = positions[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(states: Float[Tensor, "*b t d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*b t d"]:
        """Each state rotated by its position's angles."""
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention within the document; questions read the document and themselves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)

    def forward(
        self, states: Tensor, rotary: tuple[Tensor, Tensor], document: int, mask: Tensor, probe: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attended states; and the probed queries' attention to the first token, (b, q, p), if asked for."""
        b, t, _ = states.shape
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        queries, keys, values = (
            projection(states).view(b, t, -1, config.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = RotaryEmbedding.rotate(queries, *rotary), RotaryEmbedding.rotate(keys, *rotary)
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        read = F.scaled_dot_product_attention(
            queries[:, :, :document], keys[:, :, :document], values[:, :, :document], is_causal=True
        )
        if t > document:
            asked = F.scaled_dot_product_attention(queries[:, :, document:], keys, values, attn_mask=mask)
            read = torch.cat((read, asked), dim=2)
        sink = None
        if probe is not None:
            logits = queries[:, :, probe] @ keys[:, :, :document].mT * config.head_dim**-0.5
            future = torch.arange(document)[None] > probe[:, None]
            sink = logits.masked_fill(future, float("-inf")).log_softmax(-1)[..., 0]
        return self.o_proj(read.transpose(1, 2).reshape(b, t, -1)), sink


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(b, t, hidden) to the same."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return result


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: Tensor, *context: object) -> tuple[Tensor, Tensor | None]:
        """(b, t, hidden) to the same, and the attention to the first token."""
        attended, sink = self.self_attn(self.input_layernorm(states), *context)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states)), sink


class Decoder(nn.Module):
    """Embedding, layers, norm; under the name `model` as in transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The model, its output layer tied to the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.rotary = RotaryEmbedding(config)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        depth_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = depth_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * scale)

    @torch.no_grad()
    def start_as_previous_token_heads(
        self, offsets: tuple[int, ...], gain: float = 2.1, constant: float = 0.27
    ) -> None:
        """Sets layer 0's first heads to look `offsets[head]` tokens back, whatever the tokens are.

        All embeddings share a constant in dimension 0; these heads' queries and keys read only that, the queries
        rotated back by their offset, so that RoPE makes the logit peak there. Disclosed in the model card.
        """
        config, attention = self.config, self.model.layers[0].self_attn
        assert isinstance(attention, Attention)
        self.model.embed_tokens.weight[:, 0] = constant
        d = config.head_dim
        group = config.num_attention_heads // config.num_key_value_heads
        direction = torch.full((1, d), gain)
        for head, offset in enumerate(offsets):
            cos, sin = self.rotary(torch.tensor([-float(offset)]))
            for projection, slot, rows in (
                (attention.q_proj, head, RotaryEmbedding.rotate(direction, cos, sin)[0]),
                (attention.k_proj, head // group, direction[0]),
            ):
                projection.weight[slot * d : (slot + 1) * d] = 0
                projection.weight[slot * d : (slot + 1) * d, 0] = rows

    def forward(
        self, ids: Int[Tensor, "b t"], positions: Int[Tensor, " t"], document: int, mask: Tensor, probe: Tensor | None
    ) -> tuple[Float[Tensor, "b t vocab"], list[Tensor]]:
        """Logits, and for each layer the log attention of the probed document positions to the first token.

        document: tokens before the questions. mask: (t - document, t) True where a question may read.
        """
        rotary = self.rotary(positions.float())
        states = self.model.embed_tokens(ids)
        sinks = []
        for layer in self.model.layers:
            states, sink = layer(states, rotary, document, mask, probe)
            sinks.append(sink)
        logits = F.linear(self.model.norm(states), self.model.embed_tokens.weight)
        return logits, [sink for sink in sinks if sink is not None]
