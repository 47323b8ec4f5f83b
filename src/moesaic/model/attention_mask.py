"""Which keys a query sees, by position: everything before it, a sliding window, or its own chunk.

B batch, L queries, S keys.
"""

from torch import Tensor

from moesaic.config import ModelConfig
from moesaic.model_config import LayerType


def attention_masks(
    config: ModelConfig, query_positions: Tensor, key_positions: Tensor, *, plainly_causal: bool
) -> dict[LayerType, Tensor | None]:
    """For each layer type of `config` a mask (B or 1, 1, L, S), True where a query sees a key, or None.

    Positions are (B, L) and (B, S), negative for padding. `plainly_causal` says that both are 0, 1, 2, … in every
    sequence; then None stands for a mask that only hides what comes later.
    """
    kinds: set[LayerType] = {config.layer_type(index) for index in range(config.num_hidden_layers)}
    if not plainly_causal:
        return {kind: _mask(config, kind, query_positions, key_positions) for kind in kinds}
    same = query_positions[:1]
    length = same.shape[1]
    return {kind: None if _sees_all(config, kind, length) else _mask(config, kind, same, same) for kind in kinds}


def _sees_all(config: ModelConfig, kind: LayerType, length: int) -> bool:
    """Whether nothing that comes before is hidden within `length` tokens."""
    limits = {"sliding_attention": config.sliding_window, "chunked_attention": config.attention_chunk_size}
    limit = limits.get(kind)
    return limit is None or length <= limit


def first_visible(config: ModelConfig, kind: LayerType, positions: Tensor) -> Tensor | None:
    """The first position that queries at `positions` see, where nothing is padding; None: all see the very first."""
    if kind == "sliding_attention":
        assert config.sliding_window is not None
        return (positions - config.sliding_window + 1).clamp_min(0)
    if kind == "chunked_attention":
        assert config.attention_chunk_size is not None
        return positions - positions % config.attention_chunk_size
    return None


def _mask(config: ModelConfig, kind: LayerType, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Padding sees padding, so that no row is empty: a softmax over nothing would be NaN."""
    query_BL1, key_B1S = query_positions.unsqueeze(2), key_positions.unsqueeze(1)
    visible_BLS = (key_B1S <= query_BL1) & (key_B1S >= 0)
    if kind == "sliding_attention":
        assert config.sliding_window is not None
        visible_BLS &= key_B1S > query_BL1 - config.sliding_window
    elif kind == "chunked_attention":
        assert config.attention_chunk_size is not None
        visible_BLS &= key_B1S // config.attention_chunk_size == query_BL1 // config.attention_chunk_size
    padding_BLS = (query_BL1 < 0) & (key_B1S < 0)
    return (visible_BLS | padding_BLS).unsqueeze(1)
