"""Softmax attention over given queries, keys and values, by torch's fused kernels.

B batch, L queries, S keys, H query heads, G key-value heads, d width of queries and keys, v width of values.
"""

import torch
from torch import Tensor
from torch.nn import functional

_FEW_QUERIES = 16
_SINK_COLUMNS = 8


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """query (B, H, L, d), key (B, G, S, d), value (B, G, S, v) -> (B, H, L, v).

    Args:
        mask: (B or 1, 1, L, S), True where a query sees a key; None: query i sees keys 0 to i, and L = S.
        sinks: (H,) logits that take their share of each softmax and give nothing (arXiv 2309.17453).
    """
    if sinks is not None:
        return _attend_with_sinks(query, key, value, mask, scale, sinks)
    # The kernels that never store all L x S scores want queries, keys and values of one width.
    value_size = value.shape[-1]
    width = max(query.shape[-1], value_size)
    query, key, value = _widened(query, width), _widened(key, width), _widened(value, width)
    heads, length = query.shape[1:3]
    shared_by = heads // key.shape[1]
    if shared_by > 1 and mask is not None and length <= _FEW_QUERIES:
        # Heads that share keys become rows of one head, so that the keys are read once and not once per head.
        rows = query.unflatten(1, (-1, shared_by)).flatten(2, 3)
        mask = mask.repeat(1, 1, shared_by, 1)
        out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        return out.unflatten(2, (shared_by, length)).flatten(1, 2)[..., :value_size]
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared_by > 1
    )
    return out[..., :value_size]


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """Put one more key in front, zero but for a new column in which each query carries the sink of its head.

    So there is no (B, H, L, S) table of logits, and gradients reach the sinks through the queries. The new columns
    are 8, of which 7 stay empty, because GPU kernels want aligned widths.
    """
    batch, heads, length, query_size = query.shape
    value_size = value.shape[-1]
    sink_BHL1 = (sinks.float() / scale).to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
    query = functional.pad(torch.cat((query, sink_BHL1), dim=-1), (0, _SINK_COLUMNS - 1))
    key = functional.pad(key, (0, _SINK_COLUMNS, 1, 0))
    key[:, :, 0, query_size] = 1.0
    value = functional.pad(value, (0, max(0, query.shape[-1] - value_size), 1, 0))
    if mask is not None:
        return attend(query, key, value, functional.pad(mask, (1, 0), value=True), scale=scale)[..., :value_size]
    # One query in front, dropped afterwards, makes query i see keys 0 to i + 1: the sink, its past and itself.
    query = functional.pad(query, (0, 0, 1, 0))
    return attend(query, key, value, None, scale=scale)[:, :, 1:, :value_size]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))
