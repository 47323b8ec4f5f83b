"""What the attention of all layers shares in one forward pass: it depends on positions alone, so it is computed once.

B batch, L new tokens, P some of them, S all tokens attended to, r rotary dim.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model.attention_mask import attention_masks
from moesaic.model.kv_cache import KVCache
from moesaic.model.paged_kv import PagedBatch
from moesaic.model.rope import rotary_tables
from moesaic.model.rope_scaling import BY_LENGTH
from moesaic.model_config import LayerType


@dataclass(frozen=True)
class AttentionContext:
    """Tables of the new tokens' positions, and the cache that holds the earlier tokens."""

    positions: Tensor
    """(B, L) int64, negative for padding."""
    rotary: tuple[Tensor, Tensor]
    """cos and sin, each (B, 1, L, r), for layers with RoPE."""
    temperature: Tensor | None
    """(B, 1, L, 1), multiplies the queries of layers without RoPE."""
    masks: dict[LayerType, Tensor | None]
    """By layer type: (B, 1, L, S), True where a query sees a key; None means plainly causal with L = S."""
    kv: KVCache | PagedBatch | None

    def of_tokens(self, config: ModelConfig, index: Tensor, present: Tensor) -> "AttentionContext":
        """For the tokens `index` (B, P) of each sequence alone, padding where not `present` (B, P); without a cache.

        They keep the tables of their positions, so that each is turned as if all tokens were there.
        """
        positions_BP = self.positions.gather(1, index).masked_fill(~present, -1)
        index_B1P1 = index[:, None, :, None]

        def of_table(table: Tensor) -> Tensor:
            return table.take_along_dim(index_B1P1, dim=2)

        cos, sin = self.rotary
        return replace(
            self,
            positions=positions_BP,
            rotary=(of_table(cos), of_table(sin)),
            temperature=None if self.temperature is None else of_table(self.temperature),
            masks=attention_masks(config, positions_BP, positions_BP, plainly_causal=False),
        )

    def of_layer(self, config: ModelConfig, layer_index: int, present: Tensor) -> "AttentionContext":
        """For a layer that computes only the new tokens that are `present` (B, L): the others are padding to it, also
        as keys of later tokens. With a cache, which remembers them; call once in a forward pass."""
        assert isinstance(self.kv, KVCache)
        positions_BL = self.positions.masked_fill(~present, -1)
        key_positions_BS = self.kv.extend_layer(layer_index, positions_BL)
        masks = attention_masks(config, positions_BL, key_positions_BS, plainly_causal=False)
        return replace(self, positions=positions_BL, masks=masks)


def make_attention_context(
    config: ModelConfig, positions: Tensor, kv: KVCache | PagedBatch | None, *, plainly_causal: bool
) -> AttentionContext:
    """For positions (B, L), negative for padding, that `kv` has room for already (`KVCache.extend`)."""
    steps, masks = positions.clamp_min(0), {}
    if not isinstance(kv, PagedBatch):  # which knows what its tokens see
        key_positions = positions if kv is None else kv.positions[:, : kv.length]
        masks = attention_masks(config, positions, key_positions, plainly_causal=plainly_causal)
    return AttentionContext(
        positions=positions,
        rotary=_rotary_of_each(config, kv) if isinstance(kv, PagedBatch) else rotary_tables(steps, config),
        temperature=_temperature(config, steps),
        masks=masks,
        kv=kv,
    )


def _rotary_of_each(config: ModelConfig, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Tables that do not depend on which texts are computed together, nor on how one is cut."""
    if config.rope_scaling is None or config.rope_scaling.rope_type not in BY_LENGTH:
        end = max(sequence.past + sequence.new for sequence in batch.sequences)
        cos_11Sr, sin_11Sr = batch.store.rotary_tables(end)
        return cos_11Sr[:, :, batch.positions[0]], sin_11Sr[:, :, batch.positions[0]]
    tables = []
    for sequence in batch.sequences:
        end = sequence.past + sequence.new
        of_prompt = range(sequence.past, min(end, max(sequence.past, sequence.prompt_length)))
        spans = [of_prompt, *([position] for position in range(max(sequence.past, of_prompt.stop), end))]
        for span in filter(len, spans):
            positions = torch.tensor([span], device=batch.positions.device)
            tables.append(rotary_tables(positions, config, max(span[-1] + 1, sequence.prompt_length)))
    cos, sin = zip(*tables, strict=True)
    return torch.cat(cos, dim=2), torch.cat(sin, dim=2)


def _temperature(config: ModelConfig, positions: Tensor) -> Tensor | None:
    """Queries grow with the logarithm of their position, as the sum over ever more keys does (arXiv 2501.19399)."""
    if not config.attn_scale:
        return None
    intervals_BL = torch.floor((positions.float() + 1) / config.floor_scale)
    return (1 + config.attn_scale * torch.log1p(intervals_BL))[:, None, :, None]
