"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): what is cached of a token is one small latent.

B batch, L new tokens, S all tokens attended to, D hidden size, H heads, c latent size, n and r the parts of a query or
key head without and with position, v value head size.
"""

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.attention_context import AttentionContext
from moesaic.model.linear import Linear
from moesaic.model.norm import RMSNorm
from moesaic.model.paged_kv import PagedBatch
from moesaic.model.rope import rotate
from moesaic.model.rope_scaling import scaling_factor, yarn_mscale
from moesaic.model.softmax_attention import attend
from moesaic.model_config import LayerType

# Published models keep this for their latents, also where rms_norm_eps is another.
_LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """x (B, L, D) -> (B, L, D); keys and values of all heads are projected from the latent of each token."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        assert config.mla is not None
        self.mla = mla = config.mla
        self.layer_index = layer_index
        self.layer_type: LayerType = config.layer_type(layer_index)
        self.has_rope = layer_index not in config.nope_layers
        self.rope_interleaved = config.rope_interleaved
        self.num_heads = heads = config.num_attention_heads
        self.scale = _softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        if mla.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.head_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, mla.q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, heads * config.head_dim, bias=False)
        self.kv_a_proj = Linear(hidden, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=bias)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = Linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False)
        self.o_proj = Linear(heads * mla.v_head_dim, hidden, bias=config.attention_output_bias)
        self.sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        query_BHLd = self._queries(x, context)
        latent_B1Sx = self._latents(x, context)
        no_values = latent_B1Sx[..., :0]
        if isinstance(context.kv, PagedBatch):
            out_BHLv = context.kv.attend(
                self.layer_index, query_BHLd, latent_B1Sx, no_values, self.layer_type, self._attend
            )
            return self.o_proj(out_BHLv.transpose(1, 2).flatten(2))
        if context.kv is not None:
            latent_B1Sx, no_values = context.kv.write(self.layer_index, latent_B1Sx, no_values)
        out_BHLv = self._attend(query_BHLd, latent_B1Sx.to(query_BHLd.dtype), no_values, context.masks[self.layer_type])
        return self.o_proj(out_BHLv.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, latent: Tensor, no_values: Tensor, mask: Tensor | None) -> Tensor:
        """query (B, H, L, n + r), latent (B, 1, S, c + r) -> (B, H, L, v)."""
        few = self._absorbing_is_cheaper(query.shape[2], latent.shape[2])
        return (self._attend_absorbed if few else self._attend_decompressed)(query, latent, mask)

    def _queries(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, H, L, n + r), turned by position."""
        query = self.q_proj(x) if self.mla.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        query_BHLd = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.has_rope:
            nope, rope = query_BHLd.split((self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim), dim=-1)
            return torch.cat((nope, rotate(rope, context.rotary, self.rope_interleaved)), dim=-1)
        if context.temperature is not None:
            return (query_BHLd * context.temperature).to(query_BHLd.dtype)
        return query_BHLd

    def _latents(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, 1, L, c + r): what is cached, the latent and the one key part that carries the position."""
        latent, key_rope = self.kv_a_proj(x).unsqueeze(1).split((self.mla.kv_lora_rank, self.mla.qk_rope_head_dim), -1)
        if self.has_rope:
            key_rope = rotate(key_rope, context.rotary, self.rope_interleaved)
        return torch.cat((self.kv_a_norm(latent), key_rope), dim=-1)

    def _absorbing_is_cheaper(self, new: int, total: int) -> bool:
        """Compare multiply-adds per head: of projections, new queries or all latents, and of attention itself."""
        c, r = self.mla.kv_lora_rank, self.mla.qk_rope_head_dim
        n, v = self.mla.qk_nope_head_dim, self.mla.v_head_dim
        return new * c * (n + v) + new * total * (2 * c + r) < total * c * (n + v) + new * total * (n + r + v)

    def _attend_decompressed(self, query: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """Make keys and values of all heads from the latents (B, 1, S, c + r); -> (B, H, L, v)."""
        latent_B1Sc, key_rope_B1Sr = latent.split((self.mla.kv_lora_rank, self.mla.qk_rope_head_dim), dim=-1)
        key_value_BHSx = self.kv_b_proj(latent_B1Sc.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_nope_BHSn, value_BHSv = key_value_BHSx.split((self.mla.qk_nope_head_dim, self.mla.v_head_dim), dim=-1)
        key_BHSd = torch.cat((key_nope_BHSn, key_rope_B1Sr.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(query, key_BHSd, value_BHSv, mask, scale=self.scale, sinks=self.sinks)

    def _attend_absorbed(self, query: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        """The same with the key projection moved to the queries and the value projection to the result.

        All heads then share one key head, which is the cached latent itself.
        """
        n, v = self.mla.qk_nope_head_dim, self.mla.v_head_dim
        key_weight_Hnc, value_weight_Hvc = self.kv_b_proj.weight.unflatten(0, (self.num_heads, n + v)).split((n, v), 1)
        query_nope_BHLn, query_rope_BHLr = query.split((n, self.mla.qk_rope_head_dim), dim=-1)
        query_BHLx = torch.cat((query_nope_BHLn @ key_weight_Hnc, query_rope_BHLr), dim=-1)
        # The whole latent serves as value, its position part included, so that nothing cached is copied.
        out_BHLx = attend(query_BHLx, latent, latent, mask, scale=self.scale, sinks=self.sinks)
        return out_BHLx[..., : self.mla.kv_lora_rank] @ value_weight_Hvc.transpose(1, 2)


def _softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(n + r); `mscale_all_dim` sharpens it, squared since it stands for both queries and keys."""
    scale, scaling = config.attention_multiplier or config.head_dim**-0.5, config.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * yarn_mscale(scaling_factor(config, scaling), scaling.mscale_all_dim) ** 2
