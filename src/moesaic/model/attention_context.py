"""What the attention of all layers shares in one forward pass: it depends on positions alone, so it is computed once.

B batch, L new tokens, S all tokens attended to, r rotary dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.attention_mask import attention_masks
from moesaic.model.kv_cache import KVCache
from moesaic.model.rope import rotary_tables
from moesaic.model_config import LayerType


@dataclass(frozen=True)
class AttentionContext:
    """Tables of the new tokens' positions, and the cache that holds the earlier tokens."""

    rotary: tuple[Tensor, Tensor]
    """cos and sin, each (B, 1, L, r), for layers with RoPE."""
    temperature: Tensor | None
    """(B, 1, L, 1), multiplies the queries of layers without RoPE."""
    masks: dict[LayerType, Tensor | None]
    """By layer type: (B, 1, L, S), True where a query sees a key; None means plainly causal with L = S."""
    kv: KVCache | None


def make_attention_context(
    config: ModelConfig, positions: Tensor, kv: KVCache | None, *, plainly_causal: bool
) -> AttentionContext:
    """For positions (B, L), negative for padding, that `kv` has room for already (`KVCache.extend`)."""
    steps = positions.clamp_min(0)
    key_positions = positions if kv is None else kv.positions[:, : kv.length]
    return AttentionContext(
        rotary=rotary_tables(steps, config),
        temperature=_temperature(config, steps),
        masks=attention_masks(config, positions, key_positions, plainly_causal=plainly_causal),
        kv=kv,
    )


def _temperature(config: ModelConfig, positions: Tensor) -> Tensor | None:
    """Queries grow with the logarithm of their position, as the sum over ever more keys does (arXiv 2501.19399)."""
    if not config.attn_scale:
        return None
    intervals_BL = torch.floor((positions.float() + 1) / config.floor_scale)
    return (1 + config.attn_scale * torch.log1p(intervals_BL))[:, None, :, None]
