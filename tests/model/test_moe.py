"""The MoE layer as a whole: routed and shared experts together. B sequences, L positions, T = B x L, E experts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3Config, Llama4TextConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.initialize import initialize
from moesaic.model.moe import MoE
from moesaic.model.routers import ROUTERS
from moesaic.model.routing_context import RoutingContext
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing

B, L, D, E, F = 2, 9, 12, 8, 6
BASE = ModelConfig(
    vocab_size=10, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=6,
    initializer_range=0.5,
    moe=MoEConfig(num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F, norm_topk_prob=False),
)  # fmt: skip
SHARED = {
    "no shared experts": {},
    "shared experts": {"n_shared_experts": 2},
    "shared experts of another width": {"shared_expert_intermediate_size": 5},
    "gated shared experts": {"shared_expert_intermediate_size": 10, "shared_expert_gate": True},
}


def build(config: ModelConfig, backend: str = "auto") -> MoE:
    """With random biases too, so that none can be forgotten."""
    layer = MoE(config, backend)
    initialize(layer, config, int(torch.randint(0, 2**31, ())))
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return layer


def with_moe(config: ModelConfig = BASE, **settings: Any) -> ModelConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, **settings))


def seen_by_routers(x: Tensor, mask: Tensor | None = None) -> RoutingContext:
    """With random tokens and noise keys for x (B, L, D)."""
    tokens_BL, keys_BL = (torch.randint(0, high, x.shape[:2]) for high in (BASE.vocab_size, 2**62))
    return RoutingContext(tokens=tokens_BL, mask=mask, noise_keys=keys_BL)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (functional.silu(gate @ x) * (up @ x))


def definition(layer: MoE, x: Tensor, context: RoutingContext, *, scale_input: bool) -> Tensor:
    """x (T, D) -> (T, D), one assignment after the other."""
    routing = layer.router(x, context)
    out = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_ids, routing.expert_ids, routing.weights, strict=True):
        gate, up = layer.experts.gate_up[expert].chunk(2)
        x_D = weight * x[token] if scale_input else x[token]
        y_D = swiglu(x_D, gate, up, layer.experts.down[expert])
        out[token] += y_D if scale_input else weight * y_D
    shared = layer.shared_experts
    if shared is not None:
        for token in range(len(x)):
            hidden = functional.silu(shared.gate_proj(x[token])) * shared.up_proj(x[token])
            y_D = shared.down_proj(hidden)
            if layer.shared_expert_gate is not None:
                y_D = y_D / (1 + torch.exp(-(layer.shared_expert_gate.weight[0] @ x[token])))
            out[token] += y_D
    return out


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_is_the_sum_of_routed_and_shared_experts(router: str, shared: str, mlp_bias: bool) -> None:
    config = replace(with_moe(router=router, **SHARED[shared]), mlp_bias=mlp_bias)
    layer = build(config, "reference").double()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    context = seen_by_routers(x_BLD)
    y_BLD, routing = layer(x_BLD, context)
    expected = definition(layer, x_BLD.flatten(0, 1), context, scale_input=router == "topk_sigmoid_input")
    assert routing.num_tokens == B * L
    torch.testing.assert_close(y_BLD.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
    inputs, mix_TD = [x_BLD, *layer.parameters()], torch.randn_like(expected)
    actual_grads, expected_grads = (
        torch.autograd.grad((y_TD * mix_TD).sum(), inputs, materialize_grads=True)
        for y_TD in (y_BLD.flatten(0, 1), expected)
    )
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_sequence_gets_the_same_alone_as_beside_others_and_padding(router: str) -> None:
    layer = build(with_moe(router=router, shared_expert_gate=True, n_shared_experts=1), "reference").double()
    x_BLD, mask_BL = torch.randn(B, L, D, dtype=torch.float64), torch.rand(B, L) < 0.6
    context = seen_by_routers(x_BLD, mask_BL)
    y_BLD, _ = layer(x_BLD, context)
    for sequence, mask_L in enumerate(mask_BL):
        tokens_1L, keys_1L = (
            part[sequence, mask_L].unsqueeze(0) for part in (context.tokens, context.noise_keys) if part is not None
        )
        alone, _ = layer(x_BLD[sequence, mask_L].unsqueeze(0), RoutingContext(tokens=tokens_1L, noise_keys=keys_1L))
        torch.testing.assert_close(y_BLD[sequence, mask_L], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y_BLD[~mask_BL], layer._shared(x_BLD[~mask_BL]), rtol=1e-10, atol=1e-10)


GROUPS = {"n_group": 4, "topk_group": 2}
CHOICES = [*((router, {}) for router in ROUTERS), ("softmax_topk", GROUPS), ("sigmoid_topk", GROUPS)]


@pytest.mark.parametrize(("router", "settings"), CHOICES)
def test_recomputation_keeps_the_experts_of_every_router(router: str, settings: dict[str, Any]) -> None:
    """The logits are turned round between forward and backward; what is recomputed are still the first choices."""
    model = Transformer(with_moe(router=router, **settings), "reference")
    model.init_weights(int(torch.randint(0, 2**31, ())))
    model.activation_checkpointing = True
    layer, seen = model.moe_layers[0], list[Routing]()

    def keep(module: nn.Module, args: object, routing: Routing) -> None:
        seen.append(routing)

    layer.router.register_forward_hook(keep)
    logits_BLV = model(torch.randint(0, BASE.vocab_size, (B, L)))
    for parameter in layer.router.parameters():
        parameter.data.neg_()
    logits_BLV.sum().backward()
    first, again = seen
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.expert_ids, again.expert_ids)


def test_the_layer_equals_qwen2_moe_of_transformers() -> None:
    layer = build(with_moe(shared_expert_intermediate_size=7, shared_expert_gate=True), "reference")
    config = Qwen2MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=2, moe_intermediate_size=F,
        shared_expert_intermediate_size=7, norm_topk_prob=False,
    )  # fmt: skip
    peer = Qwen2MoeSparseMoeBlock(config)
    load(peer, layer, {"router": "gate", "shared_experts": "shared_expert"})
    assert_same(layer, peer)


def test_the_layer_equals_deepseek_v3_of_transformers() -> None:
    settings: dict[str, Any] = GROUPS | {"n_shared_experts": 2, "routed_scaling_factor": 2.5}
    layer = build(with_moe(router="sigmoid_topk", norm_topk_prob=True, **settings), "reference")
    assert layer.router.expert_bias is not None
    layer.router.expert_bias.normal_()
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=2, moe_intermediate_size=F, norm_topk_prob=True,
        **settings,
    )  # fmt: skip
    peer = DeepseekV3MoE(config)
    load(peer, layer, {"router": "gate", "expert_bias": "e_score_correction_bias"})
    assert_same(layer, peer)


def test_the_layer_equals_llama4_of_transformers() -> None:
    shared: dict[str, Any] = {"shared_expert_intermediate_size": F}
    layer = build(with_moe(router="topk_sigmoid_input", num_experts_per_tok=1, **shared), "reference")
    config = Llama4TextConfig(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=1, intermediate_size=F, num_attention_heads=2,
        num_key_value_heads=2, head_dim=6, num_hidden_layers=1,
    )  # fmt: skip
    peer = Llama4TextMoe(config)
    load(peer, layer, {"shared_experts": "shared_expert"}, transpose="experts")
    assert_same(layer, peer)


def load(peer: nn.Module, layer: MoE, renamed: dict[str, str], transpose: str = "none") -> None:
    """Copy the weights of our layer into a module of transformers."""
    names = renamed | {"gate_up": "gate_up_proj", "down": "down_proj"}
    state = {}
    for name, value in layer.state_dict().items():
        theirs = ".".join(names.get(part, part) for part in name.split("."))
        state[theirs] = value.mT.contiguous() if name.startswith(transpose) else value
    peer.load_state_dict(state)


def assert_same(layer: MoE, peer: nn.Module) -> None:
    x_BLD = torch.randn(B, L, D)
    expected = peer(x_BLD)
    expected = expected[0] if isinstance(expected, tuple) else expected
    y_BLD, _ = layer(x_BLD, seen_by_routers(x_BLD))
    torch.testing.assert_close(y_BLD.flatten(), expected.flatten(), rtol=1e-4, atol=1e-4)
