"""Experts that compute next to nothing, against their definitions token by token in float64.

B sequences, L positions, T = B x L tokens, D hidden size, E experts that compute, C constant experts.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.free_experts import FreeExperts
from moesaic.model.initialize import initialize
from moesaic.model.moe import MoE
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Routing

B, L, D, E, F, K = 2, 11, 16, 4, 8, 3
KINDS: dict[str, dict[str, Any]] = {
    "zero": {"num_zero_experts": 2},
    "copy": {"num_copy_experts": 3},
    "constant": {"num_constant_experts": 2},
    "zero and copy": {"num_zero_experts": 1, "num_copy_experts": 1},
    "all": {"num_zero_experts": 2, "num_copy_experts": 1, "num_constant_experts": 3},
}
ROUTERS_WITH_FREE = ("softmax_topk", "sigmoid_topk", "topk_softmax", "noisy_topk")


def make_layer(backend: str = "reference", **settings: Any) -> MoE:
    moe = MoEConfig(**{"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": F, **settings})
    config = ModelConfig(
        vocab_size=9, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        initializer_range=0.5, moe=moe,
    )  # fmt: skip
    layer = MoE(config, backend)
    initialize(layer, config, int(torch.randint(0, 2**31, ())))
    return layer


def random_context(mask: Tensor | None = None) -> RoutingContext:
    tokens_BL, keys_BL = torch.randint(0, 9, (B, L)), torch.randint(0, 2**62, (B, L))
    return RoutingContext(tokens=tokens_BL, mask=mask, noise_keys=keys_BL)


def definition(layer: MoE, x: Tensor, routing: Routing, kinds: dict[str, int]) -> Tensor:
    """x (T, D) -> (T, D), one assignment after the other."""
    zeros, copies = kinds.get("num_zero_experts", 0), kinds.get("num_copy_experts", 0)
    rows: list[Tensor] = [torch.zeros(D, dtype=x.dtype) for _ in range(len(x))]
    for token, expert, weight in zip(
        routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights, strict=True
    ):
        x_D = x[token]
        if expert < E:
            gate, up = layer.experts.gate_up[expert].chunk(2)
            out = layer.experts.down[expert] @ (functional.silu(gate @ x_D) * (up @ x_D))
        elif expert < E + zeros:
            continue
        elif expert < E + zeros + copies:
            out = x_D
        else:
            free = layer.free_experts
            assert free is not None
            assert free.mix is not None
            assert free.constants is not None
            constant = expert - E - zeros - copies
            of_token, of_constant = torch.exp(free.mix[constant] @ x_D)
            out = (of_token * x_D + of_constant * free.constants[constant]) / (of_token + of_constant)
        rows[token] = rows[token] + weight * out
    return torch.stack(rows)


@pytest.mark.parametrize("router", ROUTERS_WITH_FREE)
@pytest.mark.parametrize("kinds", KINDS)
def test_outputs_and_gradients_follow_the_definition(kinds: str, router: str) -> None:
    layer = make_layer(router=router, **KINDS[kinds]).double()
    x_BLD, context = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True), random_context()
    y_BLD, routing = layer(x_BLD, context)
    assert routing.num_experts == routing.logits.shape[1] == E + sum(KINDS[kinds].values())
    assert routing.expert_ids.numel() == B * L * K
    x_TD = x_BLD.flatten(0, 1)
    expected_TD = definition(layer, x_TD, layer.router(x_TD, context), KINDS[kinds])
    torch.testing.assert_close(y_BLD.flatten(0, 1), expected_TD, rtol=1e-10, atol=1e-10)
    inputs, mix_TD = [x_BLD, *layer.parameters()], torch.randn_like(expected_TD)
    actual, expected = (
        torch.autograd.grad((y_TD * mix_TD).sum(), inputs, materialize_grads=True)
        for y_TD in (y_BLD.flatten(0, 1), expected_TD)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kinds", KINDS)
def test_only_experts_that_compute_get_rows(kinds: str) -> None:
    layer, rows = make_layer(**KINDS[kinds]), list[Routing]()
    layer.experts.register_forward_pre_hook(lambda module, args: rows.append(args[1]))
    _, routing = layer(torch.randn(B, L, D), random_context())
    (computed,) = rows
    assert computed.num_experts == E
    assert computed.expert_ids.tolist() == [expert for expert in routing.expert_ids.tolist() if expert < E]
    assert torch.equal(computed.tokens_per_expert(), routing.tokens_per_expert()[:E])
    assert computed.logits.shape == (B * L, E)


def test_zero_experts_alone_have_neither_parameters_nor_a_pass() -> None:
    layer = make_layer(**KINDS["zero"])
    assert layer.free_experts is None
    assert not any("free" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_a_batch_that_visits_no_computing_expert_gives_these_zero_gradients(backend: str) -> None:
    layer = make_layer(backend, num_copy_experts=4, router="sigmoid_topk", norm_topk_prob=False)
    assert layer.router.expert_bias is not None
    layer.router.expert_bias[:E] = -10.0
    x_BLD = torch.randn(B, L, D)
    y_BLD, routing = layer(x_BLD, random_context())
    factor_BL = torch.zeros(B * L).index_add(0, routing.token_ids, routing.weights).view(B, L, 1)
    torch.testing.assert_close(y_BLD, x_BLD * factor_BL)
    y_BLD.sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("drop_policy", ["drop", "next_choice", "pad"])
def test_capacity_and_padding_hold_for_free_experts_too(drop_policy: str) -> None:
    layer = make_layer(capacity_factor=0.7, drop_policy=drop_policy, **KINDS["all"]).double()
    x_BLD, mask_BL = torch.randn(B, L, D, dtype=torch.float64), torch.rand(B, L) < 0.7
    mask_BL[:, 0] = True
    context = random_context(mask_BL)
    y_BLD, routing = layer(x_BLD, context)
    x_TD = x_BLD.flatten(0, 1)
    expected_TD = definition(layer, x_TD, layer.router(x_TD, context), KINDS["all"])
    torch.testing.assert_close(y_BLD.flatten(0, 1), expected_TD, rtol=1e-10, atol=1e-10)
    assert not y_BLD[~mask_BL].any()
    weighted = routing.token_ids[routing.weights != 0]
    assert mask_BL.flatten()[weighted].all()


def test_a_token_may_own_several_rows_of_one_expert() -> None:
    """Rows of weight 0, with which a capacity is filled up, take nothing from the row that counts."""
    layer = make_layer(num_copy_experts=1, num_constant_experts=1).double()
    free, x_TD = layer.free_experts, torch.randn(2, D, dtype=torch.float64)
    assert free is not None
    ids_N, weights_N = torch.tensor([E, E, E + 1, E + 1]), torch.tensor([0.3, 0.0, 0.6, 0.0], dtype=torch.float64)
    routing = Routing(torch.ones(4, dtype=torch.int64), ids_N, weights_N, torch.zeros(2, E + 2), E + 2, None)
    expected = definition(layer, x_TD, routing, {"num_copy_experts": 1})
    torch.testing.assert_close(free(x_TD, routing), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    layer = make_layer(**KINDS["all"]).to(dtype)
    x_BLD = torch.randn(B, L, D).to(dtype)
    y_BLD, routing = layer(x_BLD, random_context())
    assert y_BLD.dtype == dtype
    assert routing.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = make_layer(**KINDS["all"]).double()
    exact.load_state_dict(layer.state_dict())
    expected_TD = definition(exact, x_BLD.flatten(0, 1).double(), routing, KINDS["all"])
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-3, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(y_BLD.flatten(0, 1).double(), expected_TD, rtol=tolerance, atol=tolerance)


def test_constants_start_small_and_mixes_like_routers() -> None:
    layer = make_layer(**KINDS["all"])
    config = ModelConfig(
        vocab_size=9, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        initializer_range=0.0, moe=MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F),
    )  # fmt: skip
    initialize(layer, config, 0)
    assert layer.free_experts is not None
    assert layer.free_experts.constants is not None
    assert layer.free_experts.mix is not None
    assert not layer.free_experts.constants.any()
    assert 0.01 < float(layer.free_experts.mix.detach().std()) < 0.03


def test_no_token_at_all() -> None:
    layer = make_layer(**KINDS["all"])
    y, routing = layer(torch.randn(0, L, D), RoutingContext(tokens=torch.zeros(0, L, dtype=torch.int64)))
    assert y.shape == (0, L, D)
    assert routing.num_tokens == 0


def test_all_of_them_are_made_on_the_meta_device() -> None:
    moe = MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, **KINDS["all"])
    with torch.device("meta"):
        free = FreeExperts(D, moe)
    assert {name: tuple(value.shape) for name, value in free.named_parameters()} == {
        "constants": (3, D), "mix": (3, 2, D),
    }  # fmt: skip
    assert all(isinstance(value, nn.Parameter) and value.is_meta for value in free.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "sparsemixer", "num_experts_per_tok": 2, "num_copy_experts": 1}, "sparsemixer does not"),
        ({"num_copy_experts": 1, "n_group": 2, "topk_group": 2}, "n_group is 2"),
        ({"num_zero_experts": -1}, "num_zero_experts is -1"),
    ],
)
def test_impossible_free_experts_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_layer(**settings)
