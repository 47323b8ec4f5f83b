"""DeepSeek-V2 (arXiv 2405.04434): latent attention, and softmax experts that a token may have to pick by group."""

from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.hf_config import HFConfig, shortened
from moesaic.checkpoint.families.keys import (
    Always,
    Fields,
    Key,
    KeyPart,
    LeadingDenseLayers,
    NoEffect,
    Only,
    SharedBias,
    SpecialTokens,
    sizes,
)
from moesaic.checkpoint.families.layout import with_empty_shared_experts
from moesaic.checkpoint.families.rope_keys import Rope
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError


@dataclass(frozen=True)
class LatentHeads:
    """What the parts of a latent head add up to. Comes after the keys of the parts.

    num_key_value_heads has no effect: every query head has keys and values of its own, made from the latent.
    """

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        heads = hf.take("num_attention_heads", int)
        hf.ignore("num_key_value_heads")
        nope, rope = fields["mla.qk_nope_head_dim"], fields["mla.qk_rope_head_dim"]
        if hf.take("head_dim", int, rope) != rope:  # transformers gives this name to the part that is turned
            raise MoesaicError(
                f"config.json: head_dim is {shortened(hf.values['head_dim'])}; with latent attention it repeats "
                f"qk_rope_head_dim, which is {rope}"
            )
        return {
            "hidden_size": hf.take("hidden_size", int),
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": nope + rope,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        heads = config.num_attention_heads
        return {"hidden_size": config.hidden_size, "num_attention_heads": heads, "num_key_value_heads": heads}


@dataclass(frozen=True)
class LatentRope(Rope):
    """Rope whose mscale_all_dim also sharpens the softmax: with YaRN, and by no other method here."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        read = super().read(hf, fields)
        scaling = read["rope_scaling"]
        block = hf.values.get("rope_scaling") or hf.values.get("rope_parameters") or {}
        if scaling is not None and scaling.rope_type != "yarn" and block.get("mscale_all_dim"):
            raise MoesaicError(
                f"config.json: mscale_all_dim = {shortened(block['mscale_all_dim'])} is supported for rope_type yarn "
                f"only, not {scaling.rope_type}"
            )
        return read


LATENT_ATTENTION: tuple[KeyPart, ...] = (
    Key("kv_lora_rank", "mla.kv_lora_rank", int, 512),
    Key("q_lora_rank", "mla.q_lora_rank", int, 1536, null=None),
    Key("qk_nope_head_dim", "mla.qk_nope_head_dim", int, 128),
    Key("qk_rope_head_dim", "mla.qk_rope_head_dim", int, 64),
    Key("v_head_dim", "mla.v_head_dim", int, 128),
    LatentHeads(),
    NoEffect(("qk_head_dim",), "it follows from the sizes above"),
    LatentRope(),
    SharedBias("attention_bias", ("attention_bias", "attention_output_bias")),
    Always({"qk_norm": "none"}),
)
"""Keys of multi-head latent attention, as all families after DeepSeek-V2 spell them."""


@dataclass(frozen=True)
class GroupsByMethod:
    """topk_method says whether the groups count."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        method = hf.take("topk_method", str, "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise hf.unsupported("topk_method", "'greedy' or 'group_limited_greedy'")
        if method == "greedy":
            hf.ignore("n_group", "topk_group")
            return {"moe.n_group": 1, "moe.topk_group": 1}
        return {"moe.n_group": hf.take("n_group", int), "moe.topk_group": hf.take("topk_group", int)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config.moe is None or config.moe.n_group == 1:
            return {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
        groups = {"n_group": config.moe.n_group, "topk_group": config.moe.topk_group}
        return {"topk_method": "group_limited_greedy", **groups}


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=(
        *sizes(max_position_embeddings=2048),
        Key("intermediate_size", "intermediate_size", int, 11008),
        *LATENT_ATTENTION,
        Key("mlp_bias", "mlp_bias", bool, False),
        Key("n_routed_experts", "moe.num_experts", int, 64, also_called=("num_experts",)),
        Key("num_experts_per_tok", "moe.num_experts_per_tok", int),
        Key("moe_intermediate_size", "moe.moe_intermediate_size", int, 1407),
        Key("n_shared_experts", "moe.n_shared_experts", int, 2, null=0),
        GroupsByMethod(),
        Key("routed_scaling_factor", "moe.routed_scaling_factor", float, 1.0),
        Only("norm_topk_prob", False),
        Only("scoring_func", "softmax"),
        LeadingDenseLayers(default=0),
        Only("moe_layer_freq", 1),
        NoEffect(("aux_loss_alpha", "seq_aux"), "they balance the experts in training"),
        SpecialTokens(default_bos=1, default_eos=2),
        Always(
            {
                "rope_interleaved": True,
                "moe.router": "softmax_topk",
                "moe.norm_topk_prob": False,
                "moe.group_score": "max",
            }
        ),
    ),
    layout=with_empty_shared_experts,
)
