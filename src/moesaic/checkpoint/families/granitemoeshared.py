"""Granite MoE with shared experts: Granite 3 MoE, and one MLP besides the experts that every token visits."""

from functools import partial

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.granitemoe import KEYS, NAMES, experts
from moesaic.checkpoint.families.keys import Key
from moesaic.checkpoint.families.layout import Alternatives, Names, Region, StoredTensor, decoder_layout, same
from moesaic.config import ModelConfig


def shared_experts(config: ModelConfig, names: Names, ours: str, theirs: str) -> list[Alternatives]:
    """Besides the block of experts, not in it; gate and up are one tensor."""
    assert config.moe is not None
    if not config.moe.shared_intermediate_size:
        return []
    mlp = f"{theirs.removesuffix(names.moe)}shared_mlp"
    gate_up = tuple(Region(f"{ours}.shared_experts.{leaf}.weight") for leaf in ("gate_proj", "up_proj"))
    return [
        ((StoredTensor(f"{mlp}.input_linear.weight", gate_up),),),
        same(f"{ours}.shared_experts.down_proj.weight", f"{mlp}.output_linear.weight"),
    ]


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    keys=(*KEYS, Key("shared_intermediate_size", "moe.shared_expert_intermediate_size", int, 0)),
    layout=partial(decoder_layout, names=NAMES, experts=experts, shared_experts=shared_experts),
)
