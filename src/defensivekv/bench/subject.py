"""The model that is measured: a folder's, the packaged one, or a shape with random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from defensivekv.bench.caches import head_size, key_value_heads
from defensivekv.bench.dtypes import dtype_of
from defensivekv.bench.plan import BenchPlan
from defensivekv.bench.shapes import shape_config
from defensivekv.bench.workers.random_model import random_model
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.model import config_positions
from defensivekv.needleworld import demo_model


@dataclass(frozen=True)
class Subject:
    """Fields as of `BenchPlan`."""

    model: str | None
    shape: str | None
    layers: int | None
    dtype: str
    device: str
    seed: int

    @classmethod
    def of(cls, plan: BenchPlan) -> "Subject":
        """What the plan names."""
        return cls(plan.model, plan.shape, plan.layers, plan.dtype, plan.device, plan.seed)

    @property
    def source(self) -> str | None:
        """Where its weights come from; None: they are random."""
        return None if self.shape is not None else str(self.model or demo_model())

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape}'s shape, random weights" if self.shape else self.model or "the packaged model"

    def config(self) -> PreTrainedConfig:
        """Its configuration, shortened. Raises InvalidInputError where there is none, or it has fewer layers."""
        if self.shape is not None:
            config = shape_config(self.shape)
        else:
            try:
                config = AutoConfig.from_pretrained(self.source)
            except (OSError, ValueError) as error:
                raise InvalidInputError(f"cannot load {self.model!r}: {error}") from error
        text = config.get_text_config(decoder=True)
        if self.layers is not None:
            if self.layers > text.num_hidden_layers:
                raise InvalidInputError(
                    f"{self.name} has {text.num_hidden_layers} layers: --layers {self.layers} is more"
                )
            text.num_hidden_layers = self.layers
            if getattr(text, "layer_types", None) is not None:
                text.layer_types = text.layer_types[: self.layers]
        config.dtype = self.torch_dtype(config)
        return config

    def torch_dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """That of the weights, "auto" resolved."""
        if self.dtype != "auto":
            return dtype_of(self.dtype)
        own = None if self.shape is not None else config.dtype
        return own if isinstance(own, torch.dtype) else torch.bfloat16

    def load(self) -> PreTrainedModel:
        """The model, its attention SDPA. Raises InvalidInputError where it cannot be loaded."""
        config, device = self.config(), torch.device(self.device)
        if self.source is None:
            made: PreTrainedModel = random_model(config, config.dtype, device, self.seed)
            return made
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.source, config=config, dtype=config.dtype, attn_implementation="sdpa"
            )
        except Exception as error:  # broken files fail in many ways
            raise InvalidInputError(f"cannot load {self.source!r}: {type(error).__name__}: {error}") from error
        return loaded.to(device).eval()

    def save_config(self, folder: Path) -> Path:
        """Its `config.json` for rivals, written to the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config().save_pretrained(folder)
        return folder / "config.json"


@dataclass(frozen=True)
class ModelFacts:
    """What a model takes and reads.

    layers, of_layers: measured, and of the model itself. weight_bytes: all of them. read_bytes: those that one
    token's step reads, which the input embedding is not a part of where it is not the output's too; None: unknown,
    as where experts are chosen for each token. token_bytes: keys and values of one token in all layers. positions:
    that the model has, as far as its configuration says.
    """

    name: str
    layers: int
    of_layers: int
    dtype: str
    parameters: int
    weight_bytes: int
    read_bytes: int | None
    token_bytes: int
    positions: int | None


def model_facts(subject: Subject, model: PreTrainedModel) -> ModelFacts:
    """The facts of the loaded model."""
    text = model.config.get_text_config(decoder=True)
    whole = Subject(subject.model, subject.shape, None, subject.dtype, subject.device, subject.seed).config()
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = output is not None and output.weight.data_ptr() == embedding.data_ptr()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    has_experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    read = None if has_experts else weights - (0 if is_tied else embedding.nbytes)
    heads = text.num_hidden_layers * key_value_heads(text)
    return ModelFacts(
        subject.name,
        text.num_hidden_layers,
        whole.get_text_config(decoder=True).num_hidden_layers,
        str(model.dtype).removeprefix("torch."),
        sum(parameter.numel() for parameter in model.parameters()),
        weights,
        read,
        2 * heads * head_size(text) * embedding.element_size(),
        config_positions(text),
    )
