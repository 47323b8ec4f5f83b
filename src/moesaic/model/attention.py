"""Causal grouped-query attention (arXiv 2305.13245) with optional normalisation of queries and keys.

B batch, L new tokens, S all tokens attended to, D hidden size, H query heads, G key-value heads, d head dim.
"""

from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.model.kv_cache import KVCache
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rotate


class Attention(nn.Module):
    """x (B, L, D) -> (B, L, D); every token sees itself and what stands before it."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, kv: KVCache | None) -> Tensor:
        """`mask` (B, 1, L, S) is True where a query sees a key; None means plainly causal with L = S."""
        query_BHLd = self._heads(self.q_proj(x), self.q_norm)
        key_BGLd = self._heads(self.k_proj(x), self.k_norm)
        value_BGLd = self._heads(self.v_proj(x), None)
        query_BHLd, key_BGLd = rotate(query_BHLd, rotary), rotate(key_BGLd, rotary)
        key_BGSd, value_BGSd = key_BGLd, value_BGLd
        if kv is not None:
            key_BGSd, value_BGSd = kv.write(self.layer_index, key_BGLd, value_BGLd)
        out_BHLd = functional.scaled_dot_product_attention(
            query_BHLd,
            key_BGSd.to(query_BHLd.dtype),
            value_BGSd.to(query_BHLd.dtype),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query_BHLd.shape[1] != key_BGSd.shape[1],
        )
        return self.o_proj(out_BHLd.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """(B, L, heads * d) -> (B, heads, L, d)."""
        heads_BLhd = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            heads_BLhd = norm(heads_BLhd)
        return heads_BLhd.transpose(1, 2)
