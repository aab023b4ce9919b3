"""What is ours in the workers, whose attention layers store what stays."""

from typing import Any

from torch import nn
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from defensivekv.errors import UnsupportedModelError
from defensivekv.integrations.projections import find_projection
from defensivekv.integrations.vllm.backend import EvictingBackend, EvictingImpl
from defensivekv.integrations.vllm.blocks import EvictingSpec
from defensivekv.integrations.vllm.options import KEY, Options
from defensivekv.integrations.vllm.plan import EvictionPlan
from defensivekv.integrations.vllm.step import EvictingMetadataBuilder
from defensivekv.policies import Policy


class EvictingWorker:
    """What a worker does beside vLLM's own; mixed into that of each platform."""

    vllm_config: Any
    model_runner: Any

    def load_model(self, **kwargs: Any) -> None:
        """Loads the model, then gives its attention layers a backend of ours."""
        super().load_model(**kwargs)  # type: ignore[misc]
        modules = dict(self.model_runner.get_model().named_modules())
        owners = {id(module): modules.get(name.rpartition(".")[0]) for name, module in modules.items()}
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        policy = self._options.make_policy()
        for number, (name, layer) in enumerate(layers.items()):
            layer.impl = EvictingImpl.of(layer, number, _projection(policy, name, owners.get(id(layer))))
            layer.attn_backend = EvictingBackend

    @property
    def _options(self) -> Options:
        return Options.parse(self.vllm_config.additional_config[KEY])

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Blocks for what stays, in every layer. Raises UnsupportedModelError for layers of another kind."""
        specs: dict[str, Any] = super().get_kv_cache_spec()  # type: ignore[misc]
        for name, spec in specs.items():
            is_plain = type(spec) is FullAttentionSpec and spec.sliding_window is None
            if not is_plain or spec.attention_chunk_size is not None or spec.head_size != spec.head_size_v:
                raise UnsupportedModelError(
                    f"layer {name} is not of full attention with keys and values of one size ({type(spec).__name__}): "
                    "models with such layers cannot be served with DefensiveKV"
                )
        if len({(spec.num_kv_heads, spec.head_size, spec.dtype) for spec in specs.values()}) > 1:
            raise UnsupportedModelError("layers differ in their heads, which share blocks: this model cannot be served")
        plan = self._plan(specs)
        return {name: EvictingSpec.of(spec, plan) for name, spec in specs.items()}

    def _plan(self, specs: dict[str, Any]) -> EvictionPlan:
        options, ranks = self._options, self.vllm_config.parallel_config.tensor_parallel_size
        spec = next(iter(specs.values()))
        heads = self.vllm_config.model_config.get_total_num_kv_heads()
        if heads % max(ranks, options.head_groups) or heads % ranks:
            raise UnsupportedModelError(
                f"{heads} key-value heads cannot be shared among {ranks} ranks and {options.head_groups} head groups"
            )
        return EvictionPlan(
            policy=options.make_policy(),
            layers=len(specs),
            heads=spec.num_kv_heads,
            groups=max(1, options.head_groups // ranks),
            whole_up_to=self._whole_up_to(),
        )

    def _whole_up_to(self) -> int:
        """Prompts of so many tokens fit into one step beside a token, and its drafts, of every other request."""
        model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
        if not scheduler.enable_chunked_prefill:
            return int(model.max_model_len)
        if model.is_multimodal_model:
            # A step's images bound what is read of a prompt as well.
            return 0
        speculative = self.vllm_config.speculative_config
        drafts = 0 if speculative is None else speculative.num_speculative_tokens
        most = min(scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens or 2**62)
        whole = most - scheduler.max_num_seqs * (1 + drafts)
        if scheduler.long_prefill_token_threshold > 0:
            whole = min(whole, scheduler.long_prefill_token_threshold)
        return max(0, int(whole))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocates the blocks, then tells the layers and their metadata where these are."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        for group in self.model_runner._attn_group_iterator():
            builder = group.get_metadata_builder()
            assert isinstance(builder, EvictingMetadataBuilder)
            builder.bind(self.model_runner)


def _projection(policy: Policy, name: str, owner: nn.Module | None) -> nn.Module | None:
    """The output projection of a layer's module, where the policy asks for it."""
    if policy.weighting is None or not policy.weighting.needs_projection:
        return None
    projection = None if owner is None else find_projection(owner)
    if projection is None:
        raise UnsupportedModelError(
            f"{name} has no output projection that is known, which policy {policy.name!r} weights values by: use a "
            "policy without value weighting, such as 'snapkv'"
        )
    return projection
