"""Attention written out in float64, one query and one head at a time. B sequences, L positions, d head dim."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.attention_context import make_attention_context

LENGTH = 7
PADDED = torch.stack([torch.cat([torch.full((2,), -1), torch.arange(5)]), torch.arange(LENGTH)])
"""Positions of two sequences, the first of which begins with two tokens of padding."""


def randomize(module: nn.Module) -> None:
    """Norm weights around 1, everything else normal, of a size that keeps the softmax away from one-hot."""
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.normal_(1.0, 0.3)
        else:
            parameter.data.normal_(0.0, 0.3)


def run(attention: nn.Module, config: ModelConfig, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """One forward pass without a cache; `positions` None: consecutive."""
    steps = torch.arange(x.shape[1]).expand(x.shape[:2]) if positions is None else positions
    return attention(x, make_attention_context(config, steps, None, plainly_causal=positions is None))


def doubled(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}


def assert_equals_loop(
    attention: nn.Module,
    config: ModelConfig,
    padded: bool,
    loop: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
) -> None:
    """Outputs and all gradients of layer 1 against `loop`, which takes float64 (weights, x, positions)."""
    x = torch.randn(2, LENGTH, config.hidden_size)
    positions = PADDED if padded else torch.arange(LENGTH).expand(2, LENGTH)
    is_token = (positions >= 0).unsqueeze(-1)
    weights, x64, probe = doubled(attention), x.double().requires_grad_(), torch.randn_like(x)
    expected = loop(weights, x64, positions) * is_token
    x.requires_grad_()
    out = run(attention, config, x, PADDED if padded else None) * is_token
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    (expected * probe).sum().backward()
    (out * probe).sum().backward()
    ours = {"x": x, **dict(attention.named_parameters())}
    for key, value in {"x": x64, **weights}.items():
        assert value.grad is not None
        torch.testing.assert_close(ours[key].grad.double(), value.grad, rtol=1e-3, atol=1e-3, msg=key)


def rms(x: Tensor, eps: float, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def project(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def rotated_by_hand(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """x (B, H, L, d): plain RoPE in float64, pair after pair as one complex number."""
    columns, rotary = list(x.double().unbind(-1)), config.rotary_dim
    for pair in range(rotary // 2):
        first, second = (2 * pair, 2 * pair + 1) if config.rope_interleaved else (pair, pair + rotary // 2)
        angle_B1L = (positions.double() * config.rope_theta ** (-2 * pair / rotary)).unsqueeze(1)
        unit_B1L = torch.polar(torch.ones_like(angle_B1L), angle_B1L)
        turned_BHL = torch.complex(columns[first], columns[second]) * unit_B1L
        columns[first], columns[second] = turned_BHL.real, turned_BHL.imag
    return torch.stack(columns, dim=-1)


def turned(heads: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """heads (B, L, heads, d)."""
    return rotated_by_hand(heads.transpose(1, 2), positions.clamp_min(0), config).transpose(1, 2)


def sees(config: ModelConfig, layer_index: int, query: int, key: int) -> bool:
    if key < 0 or key > query:
        return False
    kind = config.layer_type(layer_index)
    if kind == "sliding_attention":
        assert config.sliding_window is not None
        return query - key < config.sliding_window
    if kind == "chunked_attention":
        assert config.attention_chunk_size is not None
        return query // config.attention_chunk_size == key // config.attention_chunk_size
    return True


def attended(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, config: ModelConfig, layer_index: int, scale: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """query (B, L, H, d), key (B, L, G, d), value (B, L, G, v) -> (B, L, H * v); zero for padding."""
    batch, length, heads = query.shape[:3]
    rows = []
    for sequence in range(batch):
        steps = positions[sequence].tolist()
        for index in range(length):
            visible = [other for other in range(length) if sees(config, layer_index, steps[index], steps[other])]
            for head in range(heads):
                shared = head * key.shape[2] // heads
                if not visible:
                    rows.append(torch.zeros(value.shape[-1], dtype=torch.float64))
                    continue
                logits = torch.stack([query[sequence, index, head] @ key[sequence, k, shared] for k in visible]) * scale
                if sinks is not None:
                    logits = torch.cat((logits, sinks[head : head + 1]))
                shares = logits.softmax(0)[: len(visible)]
                rows.append(sum(share * value[sequence, k, shared] for share, k in zip(shares, visible, strict=True)))
    return torch.stack([torch.as_tensor(row) for row in rows]).view(batch, length, -1)


def grouped_query_attention(
    weights: dict[str, Tensor], config: ModelConfig, layer_index: int, x: Tensor, positions: Tensor
) -> Tensor:
    """x (B, L, D) float64 -> the same."""
    rope = layer_index not in config.nope_layers
    parts = {}
    for name in ("q", "k", "v"):
        part = project(x, weights, f"{name}_proj")
        if name != "v" and config.qk_norm == "width":
            part = rms(part, config.rms_norm_eps, weights[f"{name}_norm.weight"])
        part = part.unflatten(-1, (-1, config.head_dim))
        if name != "v" and config.qk_norm == "head":
            part = rms(part, config.rms_norm_eps, weights[f"{name}_norm.weight"])
        if config.clip_qkv is not None:
            part = part.clamp(-config.clip_qkv, config.clip_qkv)
        if name != "v" and rope:
            part = turned(part, positions, config)
        if name != "v" and config.qk_norm == "head_after_rope":
            part = rms(part, config.rms_norm_eps, weights[f"{name}_norm.weight"])
        if name != "v" and config.qk_norm == "l2_after_rope" and rope:
            part = rms(part, config.rms_norm_eps)
        parts[name] = part
    if not rope and config.attn_scale:
        steps = positions.clamp_min(0).double()
        grown = 1 + config.attn_scale * torch.log(1 + torch.floor((steps + 1) / config.floor_scale))
        parts["q"] = parts["q"] * grown[..., None, None]
    scale = config.attention_multiplier or 1 / config.head_dim**0.5
    out = attended(
        parts["q"], parts["k"], parts["v"], positions, config, layer_index, scale, weights.get("sinks")
    )  # fmt: skip
    return project(out, weights, "o_proj")
