"""The small operators between a model's products, in C++: for a single token, calling torch costs more than their work.

For inference in float32 on the CPU; `serves` says whether a tensor is such, and whoever asks falls back to torch.

T tokens, B sequences, L new tokens of each, S tokens attended to, H query heads, G key-value heads, d head dim,
D hidden size, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_call import address, is_plain_call, native, raise_for

FEW_TOKENS = 16
"""Up to so many tokens the calls cost more than the work."""

QK_NORMS = {"none": 0, "head": 1, "width": 2}
"""Norms of queries and keys that `attend` knows; names of `ModelConfig.qk_norm`."""
_SCORES = {"softmax": 0, "sigmoid": 1}


def serves(x: Tensor) -> bool:
    """Whether the operators here may take x: float32 on the CPU, without gradients, and nobody is tracing."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and is_plain_call(x)
        and not torch.is_autocast_enabled("cpu")
        and native_module() is not None
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, instruction_set: str = "") -> Tensor:
    """x (..., size) / rms(x), times `weight` (size,) where there is one (arXiv 1910.07467)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    weight = None if weight is None else weight.float().contiguous()
    status = native().rms_norm(
        x.data_ptr(), address(weight), rows, size, eps, torch.get_num_threads(), instruction_set, y.data_ptr()
    )
    raise_for(status, instruction_set, _usable)
    return y


@dataclass(frozen=True)
class Heads:
    """How projected queries and keys become heads: what a layer's config says of it."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    qk_norm: str = "none"
    """`none`; `head` and `width`, before the rotation."""
    norm_eps: float = 1e-6
    interleaved: bool = False
    """Which pairs turn, see `moesaic.model.rope.rotate`."""


def attend(
    heads: Heads,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    num_keys: int,
    mask: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
    instruction_set: str = "",
) -> Tensor:
    """Normalise and turn new queries and keys, put keys and values into the cache, attend to all that it holds.

    Args:
        query, key, value: (B, L, H d), (B, L, G d), (B, L, G d), as projected.
        cache: keys and values (B, G, capacity, d), contiguous; rows num_keys - L to num_keys - 1 are written.
        mask: (B or 1, 1, L, S) bool, S = num_keys, True where a query sees a key; at least one in every row.
        rotary: cos and sin, each (B, 1, L, r).
        norms: weights of the norms of queries and keys, (d,) or (H d,) and (G d,).
        sinks: (H,), as in `moesaic.model.softmax_attention.attend`.

    Returns (B, L, H d).
    """
    batch, length = query.shape[:2]
    query, key, value, mask = query.contiguous(), key.contiguous(), value.contiguous(), mask.contiguous()
    cos, sin = (None, None) if rotary is None else (rotary[0].contiguous(), rotary[1].contiguous())
    norms = None if norms is None else (norms[0].contiguous(), norms[1].contiguous())
    y = torch.empty_like(query)
    sizes = (batch, length, num_keys, heads.num_heads, heads.num_key_value_heads, heads.head_dim)
    status = native().attend(
        sizes,
        (query.data_ptr(), key.data_ptr(), value.data_ptr(), address(sinks)),
        (QK_NORMS[heads.qk_norm], heads.norm_eps, *((0, 0) if norms is None else map(address, norms))),
        (0 if cos is None else cos.shape[-1], int(heads.interleaved), address(cos), address(sin)),
        (cache[0].shape[2], cache[0].data_ptr(), cache[1].data_ptr()),
        (mask.data_ptr(), 0 if mask.shape[0] == 1 else length * num_keys),
        heads.scale,
        torch.get_num_threads(),
        instruction_set,
        y.data_ptr(),
    )
    raise_for(status, instruction_set, _usable)
    return y


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    scores: str,
    normalise: bool,
    least_sum: float,
    scaling: float,
    bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    instruction_set: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D), weight (E, D) -> logits (T, E), experts (T, K) int64 in the order of their scores, weights (T, K).

    `scores` is `softmax` or `sigmoid`. `selection_bias` (E,) takes part in the choice alone. With `normalise` a token's
    weights are divided by their sum, at least `least_sum`; then all are multiplied by `scaling`.
    """
    x, weight = x.contiguous(), weight.contiguous()
    (num_tokens, hidden_size), num_experts = x.shape, weight.shape[0]
    logits_TE, weights_TK = x.new_empty(num_tokens, num_experts), x.new_empty(num_tokens, top_k)
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
    status = native().route(
        (num_tokens, hidden_size, num_experts, top_k),
        (_SCORES[scores], int(normalise), least_sum, scaling),
        (x.data_ptr(), weight.data_ptr(), address(bias), address(selection_bias)),
        torch.get_num_threads(),
        instruction_set,
        (logits_TE.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()),
    )
    raise_for(status, instruction_set, _usable)
    return logits_TE, ids_TK, weights_TK


def _usable() -> list[str]:
    return native().expert_kernels()  # built for the same instruction sets
