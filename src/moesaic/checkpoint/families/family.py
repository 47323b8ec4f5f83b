"""One Hugging Face `model_type`: what its config keys mean, and where it keeps the tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from moesaic.checkpoint.families.hf_config import HFConfig, shortened
from moesaic.checkpoint.families.keys import KeyPart, dense_layer_fields, dense_layers, window_fields
from moesaic.checkpoint.families.layout import Layout, decoder_layout
from moesaic.config import MLAConfig, ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.moe_config import SCORE_ROUTERS

MAX_EXPERTS = 1_000_000
"""In all layers; a hostile config.json must not make us name more tensors than that."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` says what our ModelConfig says, both ways."""

    model_type: str
    architecture: str
    """The class of transformers."""
    keys: tuple[KeyPart, ...]
    """Translated in this order; a part sees what those before it have read."""
    sparse: bool = True
    """Its models are mixtures of experts."""
    layout: Callable[[ModelConfig], Layout] = decoder_layout
    nested: tuple[str, ...] = ()
    """Blocks of config.json whose keys are named `block.key` in `keys`."""
    inside: str = ""
    """The block of config.json that describes the language model, where the file describes more (images, say). Only
    that block is read, and the model is then written without the rest."""
    folds_into_experts: bool = False
    """The family has no routed_scaling_factor; writing multiplies it into the experts' last projection instead."""

    def config_from_hf(self, values: Mapping[str, Any]) -> ModelConfig:
        """Raises MoesaicError for a key or value that is not supported, by name."""
        hf = HFConfig(self._language_model(values) if self.inside else values, self.nested)
        read: dict[str, Any] = {"model_type": self.model_type}
        for part in self.keys:
            read |= part.read(hf, read)
        hf.finish()
        if (experts := read["num_hidden_layers"] * read.get("moe.num_experts", 0)) > MAX_EXPERTS:
            raise MoesaicError(f"config.json: it promises {experts:,} experts; no model has more than {MAX_EXPERTS:,}")
        try:
            return _assemble(read)
        except UsageError as error:  # what a config says of itself; here it came from a file
            raise MoesaicError(f"config.json: {error}") from error

    def _language_model(self, values: Mapping[str, Any]) -> dict[str, Any]:
        block = values.get(self.inside)
        if not isinstance(block, Mapping):
            raise MoesaicError(f"config.json: {self.inside} is {shortened(block)}; it must describe a language model")
        return {**block, "model_type": self.model_type}

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json. Raises MoesaicError for what the family cannot express, by name."""
        written, differences = self.try_to_write(config)
        if differences:
            raise MoesaicError(f"{self.model_type} cannot express this model: {'; '.join(differences)}")
        return written

    def try_to_write(self, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
        """The keys of config.json, and what would be lost: found by reading back what was written."""
        if self.sparse != (config.moe is not None):
            return {}, [f"it is {'sparse' if self.sparse else 'dense'} and the model is not"]
        if self.folds_into_experts:
            assert config.moe is not None
            config = replace(config, moe=replace(config.moe, routed_scaling_factor=1.0))
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        try:
            for part in self.keys:
                written |= part.write(config)
            written = _nest(written, self.nested) | {"use_cache": True}
            read_back = self.config_from_hf(written)
        except MoesaicError as error:
            return written, [str(error)]
        return written, _differences(_canonical(config), _canonical(read_back))


def _assemble(read: Mapping[str, Any]) -> ModelConfig:
    """Fields named `moe.x` and `mla.x` make the nested configs."""
    inner: dict[str, dict[str, Any]] = {"moe": {}, "mla": {}, "": {}}
    for name, value in read.items():
        block, _, leaf = name.rpartition(".")
        inner[block][leaf] = value
    return ModelConfig(
        **inner[""],
        moe=MoEConfig(**inner["moe"]) if inner["moe"] else None,
        mla=MLAConfig(**inner["mla"]) if inner["mla"] else None,
    )


def _nest(flat: Mapping[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        block, _, leaf = name.rpartition(".")
        if block in blocks:
            nested.setdefault(block, {})[leaf] = value
        else:
            nested[name] = value
    return nested


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same model in the one spelling that families read; fields that then mean nothing get one value."""
    layer_types = [config.layer_type(index) for index in range(config.num_hidden_layers)]
    moe = config.moe
    if moe is not None:
        dense = {name.removeprefix("moe."): value for name, value in dense_layer_fields(dense_layers(config)).items()}
        scores_all = moe.router in SCORE_ROUTERS
        normalised = scores_all and moe.norm_topk_prob
        moe = replace(
            moe,
            **dense,
            expert_bias=moe.has_expert_bias,
            n_shared_experts=0,
            shared_expert_intermediate_size=moe.shared_intermediate_size,
            topk_group=moe.topk_group if moe.n_group > 1 else 1,
            group_score=moe.group_score if moe.n_group > 1 else "max",
            norm_topk_prob=normalised or not scores_all,
            norm_topk_min=moe.norm_topk_min if normalised else MoEConfig.norm_topk_min,
            norm_topk_order=moe.norm_topk_order if normalised else 1.0,
            swiglu_limit=moe.swiglu_limit if moe.activation == "clamped_swiglu" else 1.0,
            swiglu_alpha=moe.swiglu_alpha if moe.activation == "clamped_swiglu" else 1.0,
            router_jitter_noise=moe.router_jitter_noise if moe.router == "sparsemixer" else 0.0,
            expert_bias_form=moe.expert_bias_form if moe.has_expert_bias else "add",
            router_input_jitter=0.0,  # this and a capacity are of training alone, except for expert choice
            capacity_factor=moe.capacity_factor if moe.router == "expert_choice" else None,
            drop_policy="drop",
        )
    return replace(
        config,
        **window_fields(layer_types, config.sliding_window),
        moe=moe,
        model_type="",
        initializer_range=0.0,
        intermediate_size=config.intermediate_size if config.num_dense_layers else 0,
        attention_chunk_size=config.attention_chunk_size if "chunked_attention" in layer_types else None,
        floor_scale=config.floor_scale if config.attn_scale else 1,
    )


def _differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(ours):
        mine, read = getattr(ours, field.name), getattr(theirs, field.name)
        if mine == read:
            continue
        if is_dataclass(mine) and is_dataclass(read):
            found += _differences(mine, read, f"{field.name}.")
        else:
            found.append(f"{prefix}{field.name} = {shortened(mine)} would become {shortened(read)}")
    return found
