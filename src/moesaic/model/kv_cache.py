"""Keys and values of the tokens seen so far, and where they stand.

B batch, L new tokens, C capacity, G cached heads, k and v widths of a key and a value.
"""

import torch
from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError


def cached_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """(G, k, v): heads that are cached of a token, and the widths of their keys and values."""
    mla = config.mla
    if mla is not None:
        return 1, mla.kv_lora_rank + mla.qk_rope_head_dim, 0
    return config.num_key_value_heads, config.head_dim, config.head_dim


class KVCache:
    """Room for `capacity` tokens of `batch_size` sequences in every layer.

    A slot's position is -1 while it holds nothing or padding, so that sequences of unequal length share a batch. With
    latent attention the one cached head is the latent followed by the position's key, and values have no width. Where
    tokens may pass a layer by, `layer_positions` holds the positions of those that did not.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        heads, key_size, value_size = cached_sizes(config)
        shape = (config.num_hidden_layers, batch_size, heads, capacity)
        self.keys = torch.zeros((*shape, key_size), dtype=dtype, device=device)
        self.values = torch.zeros((*shape, value_size), dtype=dtype, device=device)
        self.positions = torch.full((batch_size, capacity), -1, dtype=torch.int64, device=device)
        self.layer_positions = {index: self.positions.clone() for index in config.depth_layers}
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @property
    def next_positions(self) -> Tensor:
        """(B,) the position that each sequence's next token takes."""
        return self.positions.max(dim=1).values + 1

    def extend(self, positions: Tensor) -> None:
        """Claim slots for new tokens at positions (B, L); call once before the layers of a forward pass write."""
        if len(positions) != len(self.positions):
            raise MoesaicError(
                f"the KV cache is for {len(self.positions)} sequences, and {len(positions)} come; make it with "
                f"batch_size={len(positions)}"
            )
        end = self.length + positions.shape[1]
        if end > self.capacity:
            raise MoesaicError(
                f"the KV cache holds {self.capacity} tokens and {end} are needed; make it with capacity={end} or more"
            )
        self.positions[:, self.length : end] = positions
        self.length = end

    def extend_layer(self, layer_index: int, positions: Tensor) -> Tensor:
        """Note the positions (B, L) of this forward pass's tokens in a layer that some pass by, -1 for these, in the
        slots that `extend` claimed; returns those of all slots, (B, length)."""
        layer_positions = self.layer_positions[layer_index]
        layer_positions[:, self.length - positions.shape[1] : self.length] = positions
        return layer_positions[:, : self.length]

    def write(self, layer_index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store this forward pass's keys (B, G, L, k) and values (B, G, L, v); return all, (B, G, length, k or v)."""
        start = self.length - keys.shape[2]
        self.keys[layer_index, :, :, start : self.length] = keys
        self.values[layer_index, :, :, start : self.length] = values
        return self.keys[layer_index, :, :, : self.length], self.values[layer_index, :, :, : self.length]
