"""The experts of a layer as a model builds them, against transformers.

T tokens, E experts, K per token, D hidden size.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, Llama4TextConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from moesaic.config import ModelConfig, MoEConfig
from moesaic.model.experts import Experts
from moesaic.ops import Routing

T, E, K, D, F = 13, 4, 2, 16, 32
BACKENDS = ["grouped", "reference"]


def make_experts(backend: str, **moe: object) -> Experts:
    config = ModelConfig(
        vocab_size=8, hidden_size=D, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16,
        moe=MoEConfig(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, **moe),  # type: ignore[arg-type]
    )  # fmt: skip
    experts = Experts(config, backend)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def make_routing(mask: Tensor | None = None) -> Routing:
    ids_TK = torch.rand(T, E).topk(K).indices
    keep = torch.ones(T, dtype=torch.bool) if mask is None else mask
    return Routing(
        token_ids=torch.arange(T)[:, None].expand(T, K)[keep].reshape(-1),
        expert_ids=ids_TK[keep].reshape(-1),
        weights=torch.rand(T, K)[keep].reshape(-1).requires_grad_(),
        logits=torch.zeros(T, E),
        num_experts=E,
        top_k=K if mask is None else None,
        mask=mask,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamped_experts_with_biases_equal_gpt_oss(backend: str) -> None:
    ours = make_experts(backend, activation="clamped_swiglu", projection_bias=True, swiglu_limit=1.0)
    theirs = GptOssExperts(GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K))
    theirs.limit = 1.0
    assert ours.gate_up_bias is not None
    assert ours.down_bias is not None
    with torch.no_grad():
        theirs.gate_up_proj.copy_(ours.gate_up.view(E, 2, F, D).transpose(1, 2).reshape(E, 2 * F, D).mT)
        theirs.gate_up_proj_bias.copy_(ours.gate_up_bias.view(E, 2, F).mT.reshape(E, 2 * F))
        theirs.down_proj.copy_(ours.down.mT)
        theirs.down_proj_bias.copy_(ours.down_bias)
    x, routing = torch.randn(T, D), make_routing()
    expected = theirs(x, routing.expert_ids.view(T, K), routing.weights.view(T, K))
    torch.testing.assert_close(ours(x, routing), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_on_the_input_equal_llama4(backend: str, masked: bool) -> None:
    ours = make_experts(backend, router="topk_sigmoid_input")
    theirs = Llama4TextExperts(Llama4TextConfig(hidden_size=D, intermediate_size=F, num_local_experts=E))
    with torch.no_grad():
        theirs.gate_up_proj.copy_(ours.gate_up.mT)
        theirs.down_proj.copy_(ours.down.mT)
    x, routing = torch.randn(T, D), make_routing(torch.rand(T) < 0.7 if masked else None)
    scores_TE = torch.zeros(T, E).index_put((routing.token_ids, routing.expert_ids), routing.weights)
    rows_ETD = x * scores_TE.mT.unsqueeze(-1)
    expected = theirs(rows_ETD.reshape(E * T, D)).view(E, T, D).sum(0)
    y = ours(x, routing)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    grad_y = torch.randn(T, D)
    grads = [torch.autograd.grad(result, routing.weights, grad_y)[0] for result in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("router", ["softmax_topk", "topk_sigmoid_input"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_reaches_the_biases_and_gradients_stay_float32(backend: str, router: str) -> None:
    experts = make_experts(backend, router=router, projection_bias=True)
    x, routing = torch.randn(T, D, requires_grad=True), make_routing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, routing)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for leaf in (x, routing.weights, *experts.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_on_the_input_differ_from_weights_on_the_output(backend: str) -> None:
    experts, x, routing = make_experts(backend, router="topk_sigmoid_input"), torch.randn(T, D), make_routing()
    inside = experts(x, routing)
    experts.weighs_inputs = False
    assert not torch.allclose(inside, experts(x, routing), rtol=1e-2)
    ones = replace(routing, weights=torch.ones_like(routing.weights))
    outside = experts(x, ones)
    experts.weighs_inputs = True
    torch.testing.assert_close(experts(x, ones), outside)
