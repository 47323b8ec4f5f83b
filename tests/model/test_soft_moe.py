"""Soft mixtures of experts against the paper's formulas, in plain loops and float64.

B sequences, L positions, D hidden size, E experts, S slots of one expert, M = E x S slots.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.initialize import initialize
from moesaic.model.mlp import MLP
from moesaic.model.moe import MoE
from moesaic.model.routing_context import RoutingContext
from moesaic.model.soft_moe import SoftMoE, SoftRouter
from moesaic.model.transformer import Transformer
from moesaic.ops import Choice, Routing

B, L, D, E, S, F = 3, 7, 12, 4, 2, 6
BASE = ModelConfig(
    vocab_size=10, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=6,
    intermediate_size=10, initializer_range=0.5,
    moe=MoEConfig(num_experts=E, num_experts_per_tok=1, moe_intermediate_size=F, router="soft", slots_per_expert=S),
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one slot": {"slots_per_expert": 1},
    "scaled, biases": {"routed_scaling_factor": 2.5, "projection_bias": True},
    "shared experts, gated": {"n_shared_experts": 2, "shared_expert_gate": True},
}


def with_moe(**settings: Any) -> ModelConfig:
    assert BASE.moe is not None
    return replace(BASE, moe=replace(BASE.moe, **settings))


def build(config: ModelConfig, backend: str = "reference") -> SoftMoE:
    """In float64, with random biases and a scale that prefers some tokens."""
    layer = SoftMoE(config, backend)
    initialize(layer, config, int(torch.randint(0, 2**31, ())))
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    assert isinstance(layer.router, SoftRouter)
    nn.init.uniform_(layer.router.scale, 3.0, 8.0)
    return layer.double()


def seen(mask: Tensor | None = None, batch: int = B, length: int = L) -> RoutingContext:
    return RoutingContext(tokens=torch.randint(0, 10, (batch, length)), mask=mask)


def expert_output(layer: SoftMoE, expert: int, x: Tensor) -> Tensor:
    experts = layer.experts
    hidden_2F = experts.gate_up[expert] @ x
    if experts.gate_up_bias is not None:
        hidden_2F = hidden_2F + experts.gate_up_bias[expert]
    gate_F, up_F = hidden_2F.chunk(2)
    y_D = experts.down[expert] @ (functional.silu(gate_F) * up_F)
    return y_D if experts.down_bias is None else y_D + experts.down_bias[expert]


def definition(layer: SoftMoE, x: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence x (n, D) without padding -> (n, D), its logits (n, M), the dispatch weights (n, M)."""
    router = layer.router
    assert isinstance(router, SoftRouter)
    slots = router.slots_per_expert
    logits = torch.stack([
        torch.stack([
            router.scale[0] * (token / token.norm()) @ (vector / vector.norm()) for vector in router.weight
        ])
        for token in x
    ])  # fmt: skip
    powers = logits.exp()
    dispatch, combine = powers / powers.sum(0, keepdim=True), powers / powers.sum(1, keepdim=True)
    results = []
    for slot in range(E * slots):
        mixture = sum(dispatch[token, slot] * x[token] for token in range(len(x)))
        assert isinstance(mixture, Tensor)
        results.append(expert_output(layer, slot // slots, mixture))
    out = []
    for token in range(len(x)):
        y_D = sum(scaling * combine[token, slot] * result for slot, result in enumerate(results))
        assert isinstance(y_D, Tensor)
        shared = layer.shared_experts
        if isinstance(shared, MLP):
            hidden = functional.silu(shared.gate_proj(x[token])) * shared.up_proj(x[token])
            assert layer.shared_expert_gate is not None
            y_D = y_D + torch.sigmoid(layer.shared_expert_gate(x[token])) * shared.down_proj(hidden)
        out.append(y_D)
    return torch.stack(out), logits, dispatch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_gradients_follow_the_formulas(name: str, padded: bool) -> None:
    config = with_moe(**SETTINGS[name])
    assert config.moe is not None
    layer, mask_BL = build(config), torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask_BL[0, :3], mask_BL[1, 5:] = False, False
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    y_BLD, routing = layer(x_BLD, seen(mask_BL if padded else None))
    parts = [definition(layer, x_BLD[b, mask_BL[b]], config.moe.routed_scaling_factor) for b in range(B)]
    expected_ND = torch.cat([part[0] for part in parts])
    torch.testing.assert_close(y_BLD[mask_BL], expected_ND, rtol=1e-10, atol=1e-10)

    names, parameters = zip(*layer.named_parameters(), strict=True)
    mix_ND = torch.randn_like(expected_ND)
    actual, expected = (
        torch.autograd.grad((out * mix_ND).sum(), (*parameters, x_BLD), materialize_grads=True)
        for out in (y_BLD[mask_BL], expected_ND)
    )
    for which, ours, theirs in zip((*names, "x"), actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, which=which: f"{which}: {text}")
    assert_analysis(layer, routing, mask_BL, parts)


def assert_analysis(layer: SoftMoE, routing: Routing, mask: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    slots = layer.slots_per_expert
    rows = []
    for sequence, (_, logits, dispatch) in enumerate(parts):
        places = mask[sequence].nonzero().flatten()
        for slot in range(E * slots):
            best = int(dispatch[:, slot].argmax())
            rows.append((sequence * L + int(places[best]), slot // slots, float(dispatch[best, slot].detach())))
        per_expert = torch.stack([logits[:, e * slots : (e + 1) * slots].exp().sum(1).log() for e in range(E)], 1)
        torch.testing.assert_close(routing.logits.view(B, L, E)[sequence, places], per_expert, rtol=1e-9, atol=1e-9)
    assert routing.token_ids.tolist() == [row[0] for row in rows]
    assert routing.expert_ids.tolist() == [row[1] for row in rows]
    assert routing.weights.tolist() == pytest.approx([row[2] for row in rows], rel=1e-9)
    assert routing.load().tolist() == [B * slots] * E
    assert routing.num_dropped() == 0


def test_padding_neither_gives_nor_gets_whatever_it_holds() -> None:
    layer, mask_BL = build(BASE), torch.rand(B, L) < 0.6
    mask_BL[0], mask_BL[1, 0] = False, True
    x_BLD = torch.randn(B, L, D, dtype=torch.float64)
    context = seen(mask_BL)
    expected, _ = layer(x_BLD, context)
    poisoned = x_BLD.masked_fill(~mask_BL.unsqueeze(2), torch.nan).requires_grad_()
    y_BLD, routing = layer(poisoned, context)
    assert torch.equal(y_BLD[mask_BL], expected[mask_BL])
    assert not y_BLD[~mask_BL].any()
    assert mask_BL.flatten()[routing.token_ids].all()
    assert (routing.token_ids >= L).all()  # a sequence of padding alone fills no slot
    y_BLD.sum().backward()
    assert poisoned.grad is not None
    assert not poisoned.grad[~mask_BL].any()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_sequence_gets_the_same_alone_as_beside_others() -> None:
    layer, x_BLD = build(BASE), torch.randn(B, L, D, dtype=torch.float64)
    together, _ = layer(x_BLD, seen())
    for sequence in range(B):
        alone, _ = layer(x_BLD[sequence : sequence + 1], seen(batch=1))
        torch.testing.assert_close(together[sequence], alone[0], rtol=1e-10, atol=1e-10)


def test_every_token_depends_on_later_ones() -> None:
    layer, x_BLD = build(BASE), torch.randn(B, L, D, dtype=torch.float64)
    changed = x_BLD.clone()
    changed[:, -1] = torch.randn(B, D, dtype=torch.float64)
    assert not torch.allclose(layer(x_BLD, seen())[0][:, 0], layer(changed, seen())[0][:, 0])
    assert layer.router.looks_ahead == "always"
    assert BASE.looks_ahead


def test_backends_agree() -> None:
    x_BLD = torch.randn(B, L, 16)
    config = replace(with_moe(moe_intermediate_size=8), hidden_size=16)
    grouped, reference = SoftMoE(config, "grouped"), SoftMoE(config, "reference")
    initialize(grouped, config, 3)
    reference.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped(x_BLD, seen())[0], reference(x_BLD, seen())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mixing_weights_stay_in_float32(dtype: torch.dtype) -> None:
    layer = build(BASE).to(dtype)
    y_BLD, routing = layer(torch.randn(B, L, D).to(dtype), seen())
    assert y_BLD.dtype == dtype
    assert routing.logits.dtype == routing.weights.dtype == torch.float32


def test_no_sequence_at_all() -> None:
    y_BLD, routing = build(BASE)(torch.randn(0, L, D, dtype=torch.float64), seen(batch=0))
    assert y_BLD.shape == (0, L, D)
    assert routing.token_ids.numel() == 0


def test_the_model_chooses_the_layer_and_hands_out_its_routing() -> None:
    model, routings = Transformer(with_moe(first_k_dense_replace=1)), list[Routing]()
    model.init_weights(0)
    model(torch.randint(0, 10, (B, L)), routings=routings)
    (layer,) = model.moe_layers
    assert isinstance(layer, SoftMoE)
    assert not isinstance(layer, MoE)
    (routing,) = routings
    assert routing.load().tolist() == [B * S] * E


def test_recomputation_gives_the_same_gradients() -> None:
    model, tokens = Transformer(with_moe(n_shared_experts=1)), torch.randint(0, 10, (B, L))
    model.init_weights(int(torch.randint(0, 2**31, ())))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(tokens).square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    assert len(expected) == len(list(model.parameters()))
    model.activation_checkpointing = True
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))


def test_initial_slots_are_drawn_and_the_scale_is_1() -> None:
    model = Transformer(BASE)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    router = model.moe_layers[0].router
    assert isinstance(router, SoftRouter)
    assert router.scale.tolist() == [1.0]
    assert router.weight.shape == (E * S, D)
    assert 0.3 < float(router.weight.detach().std()) < 0.7


def test_nothing_can_be_replayed() -> None:
    model, routings, tokens = Transformer(BASE), list[Routing](), torch.randint(0, 10, (B, L))
    model.init_weights(0)
    model(tokens, routings=routings)
    with pytest.raises(UsageError, match="the router soft chooses no experts"):
        model(tokens, replay=routings)
    choice = Choice(torch.tensor([0]), torch.tensor([0]), None)
    layer = build(BASE)
    with pytest.raises(UsageError, match="the router soft chooses no experts"):
        layer(torch.randn(1, 1, D).double(), RoutingContext(tokens=torch.zeros(1, 1).long(), replay=(choice,)))
    with pytest.raises(MoesaicError, match="call the layer"):
        layer.router(torch.randn(1, D).double(), RoutingContext(tokens=torch.zeros(1, 1).long()))


def test_a_model_is_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(BASE)
    assert all(parameter.is_meta for parameter in model.parameters())
