"""Grouped-query attention (arXiv 2305.13245): project, normalise, turn by position, attend, project back.

B batch, L new tokens, S all tokens attended to, D hidden size, H query heads, G key-value heads, d head dim.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.attention_context import AttentionContext
from moesaic.model.linear import Linear
from moesaic.model.norm import RMSNorm, rms_normalize
from moesaic.model.paged_kv import PagedBatch
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
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if isinstance(context.kv, PagedBatch):
            return self.o_proj(self._attend_paged(query, key, value, context, context.kv))
        query_BHLd, key_BGSd, value_BGSd = self._placed(query, key, value, context)
        if context.kv is not None:
            key_BGSd, value_BGSd = context.kv.write(self.layer_index, key_BGSd, value_BGSd)
        out_BHLd = self._attend(
            query_BHLd,
            key_BGSd.to(query_BHLd.dtype),
            value_BGSd.to(query_BHLd.dtype),
            context.masks[self.layer_type],
        )
        return self.o_proj(out_BHLd.transpose(1, 2).flatten(2))

    def _attend_paged(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, batch: PagedBatch
    ) -> Tensor:
        """(1, T, heads * d), as projected -> (1, T, H * d)."""
        dtype = query.dtype
        if self.native_places(context) and native_step.serves(query.float()):
            step = self.step(context, batch)
            return native_step.attend(step, query.float(), key.float(), value.float()).to(dtype)
        placed = self._placed(query, key, value, context)
        if native_step.serves(query.float()) and batch.store.keys.dtype == torch.float32:
            step = self.step(context, batch, placed=True)
            rows = (each.transpose(1, 2).flatten(2).float() for each in placed)
            return native_step.attend(step, *rows).to(dtype)
        out_1HTd = batch.attend(self.layer_index, *placed, self.layer_type, self._attend)
        return out_1HTd.transpose(1, 2).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, mask, scale=self.scale, sinks=self.sinks)

    def native_places(self, context: AttentionContext) -> bool:
        """Whether one operator may do all that stands between the projections."""
        return (
            self.config.qk_norm in native_step.QK_NORMS
            and self.config.clip_qkv is None
            and (self.has_rope or context.temperature is None)
            and isinstance(context.kv, PagedBatch)
            and context.kv.store.keys.dtype == torch.float32
            and not any(norm is not None and has_hooks(norm) for norm in (self.q_norm, self.k_norm))
        )

    def step(self, context: AttentionContext, batch: PagedBatch, *, placed: bool = False) -> native_step.AttentionStep:
        """What that operator reads besides the projected tokens; of queries and keys that are `placed` already, the
        part that is left of it."""
        normed = not placed and self.q_norm is not None and self.k_norm is not None
        return native_step.AttentionStep(
            replace(self.heads, qk_norm="none") if placed else self.heads,
            batch.store.keys[self.layer_index],
            batch.store.values[self.layer_index],
            batch.first_tokens,
            batch.num_keys,
            batch.block_tables,
            batch.first_keys(self.layer_type),
            rotary=context.rotary if self.has_rope and not placed else None,
            norms=(self.q_norm.weight, self.k_norm.weight) if normed else None,  # type: ignore[union-attr]
            sinks=self.sinks,
        )

    def _placed(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, heads * d), as projected -> (B, heads, L, d), normalised and turned."""
        query_BHLd = self._turned(self._heads(query, self.q_norm), self.q_norm, context)
        key_BGLd = self._turned(self._heads(key, self.k_norm), self.k_norm, context)
        if not self.has_rope and context.temperature is not None:
            query_BHLd = (query_BHLd * context.temperature).to(query_BHLd.dtype)
        return query_BHLd, key_BGLd, self._heads(value, None)

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

    def _turned(self, heads: Tensor, norm: RMSNorm | None, context: AttentionContext) -> Tensor:
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
