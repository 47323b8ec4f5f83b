"""Grouped-query attention (arXiv 2305.13245): project, normalise, turn by position, attend, project back.

B batch, L new tokens, S all tokens attended to, D hidden size, H query heads, G key-value heads, d head dim.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.attention_context import AttentionContext
from moesaic.model.kv_cache import KVCache
from moesaic.model.linear import Linear
from moesaic.model.norm import RMSNorm, rms_normalize
from moesaic.model.rope import rotate
from moesaic.model.softmax_attention import attend
from moesaic.model_config import LayerType
from moesaic.ops import native_step


class Attention(nn.Module):
    """x (B, L, D) -> (B, L, D); a token sees itself and what its layer's type shows it of the tokens before."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.layer_type: LayerType = config.layer_type(layer_index)
        self.has_rope = layer_index not in config.nope_layers
        self.scale = config.attention_multiplier or config.head_dim**-0.5
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = _head_norm(config, query_size)
        self.k_norm = _head_norm(config, key_value_size)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_sinks else None
        self.heads = native_step.Heads(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=self.scale,
            qk_norm=config.qk_norm,
            norm_eps=config.rms_norm_eps,
            interleaved=config.rope_interleaved,
        )

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if context.kv is not None and self.native_serves(x, context):
            out_BLh = native_step.attend(self.step(context, context.kv), self.q_proj(x), self.k_proj(x), self.v_proj(x))
            return self.o_proj(out_BLh)
        query_BHLd = self._place(self._heads(self.q_proj(x), self.q_norm), self.q_norm, context)
        key_BGSd = self._place(self._heads(self.k_proj(x), self.k_norm), self.k_norm, context)
        value_BGSd = self._heads(self.v_proj(x), None)
        if not self.has_rope and context.temperature is not None:
            query_BHLd = (query_BHLd * context.temperature).to(query_BHLd.dtype)
        if context.kv is not None:
            key_BGSd, value_BGSd = context.kv.write(self.layer_index, key_BGSd, value_BGSd)
        out_BHLd = attend(
            query_BHLd,
            key_BGSd.to(query_BHLd.dtype),
            value_BGSd.to(query_BHLd.dtype),
            context.masks[self.layer_type],
            scale=self.scale,
            sinks=self.sinks,
        )
        return self.o_proj(out_BHLd.transpose(1, 2).flatten(2))

    def native_serves(self, x: Tensor, context: AttentionContext) -> bool:
        """Whether one operator may do what stands between the projections: few tokens, and nothing unusual."""
        return (
            x.shape[1] <= native_step.FEW_TOKENS
            and native_step.serves(x)
            and self.config.qk_norm in native_step.QK_NORMS
            and self.config.clip_qkv is None
            and (self.has_rope or context.temperature is None)
            and context.masks[self.layer_type] is not None
            and context.kv is not None
            and context.kv.keys.dtype == torch.float32
            and not any(norm is not None and has_hooks(norm) for norm in (self.q_norm, self.k_norm))
        )

    def step(self, context: AttentionContext, kv: KVCache) -> native_step.AttentionStep:
        """What that operator reads besides the projected tokens."""
        mask_BLS = context.masks[self.layer_type]
        assert mask_BLS is not None
        return native_step.AttentionStep(
            self.heads,
            kv.keys[self.layer_index],
            kv.values[self.layer_index],
            kv.length,
            mask_BLS.contiguous(),
            rotary=context.rotary if self.has_rope else None,
            norms=None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight),
            sinks=self.sinks,
        )

    def _heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """(B, L, heads * d) -> (B, heads, L, d), normalised if that comes before RoPE, then clamped."""
        if norm is not None and self.config.qk_norm == "width":
            projected = norm(projected)
        heads_BLhd = projected.unflatten(-1, (-1, self.config.head_dim))
        if norm is not None and self.config.qk_norm == "head":
            heads_BLhd = norm(heads_BLhd)
        if self.config.clip_qkv is not None:
            heads_BLhd = heads_BLhd.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        return heads_BLhd.transpose(1, 2)

    def _place(self, heads: Tensor, norm: RMSNorm | None, context: AttentionContext) -> Tensor:
        """Turn queries or keys (B, heads, L, d) by their positions, then normalise them if that comes after RoPE."""
        if self.has_rope:
            heads = rotate(heads, context.rotary, self.config.rope_interleaved)
            if self.config.qk_norm == "l2_after_rope":
                return rms_normalize(heads, self.config.rms_norm_eps)
        return norm(heads) if norm is not None and self.config.qk_norm == "head_after_rope" else heads


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out of it."""
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or everywhere)


def _head_norm(config: ModelConfig, width: int) -> RMSNorm | None:
    """The norm of projected queries or keys, `width` wide over all heads; None where it has no weights or is none."""
    sizes = {"head": config.head_dim, "head_after_rope": config.head_dim, "width": width}
    return RMSNorm(sizes[config.qk_norm], config.rms_norm_eps) if config.qk_norm in sizes else None
