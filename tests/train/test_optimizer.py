"""Muon against singular value decompositions and a plain computation; parameter roles; saving of moments. E experts."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig, MoEConfig, OptimizerConfig
from moesaic.model.transformer import Transformer
from moesaic.ops import native_muon
from moesaic.train.optimizer import (
    FOR_EXPERTS,
    NEWTON_SCHULZ,
    Muon,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    orthogonalize,
    prepare_step,
    role_of,
)

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    moe=MoEConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="sigmoid_topk", n_shared_experts=1
    ),
)


def make_model(seed: int = 0) -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(seed)
    return model


def train_steps(model: Transformer, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def exact_update(nesterov: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """(..., M, N) float64: its singular vectors, and what the iterations make of its singular values one by one."""
    left, values, right = torch.linalg.svd(nesterov, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (300, 280), (3, 24, 16), (2, 258, 260)])
def test_muon_turns_singular_values_to_one(shape: tuple[int, ...]) -> None:
    """Three updates with momentum and decay, against singular value decompositions; also of matrices left to torch."""
    coefficients = FOR_EXPERTS if len(shape) > 2 else NEWTON_SCHULZ
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    expected, momentum = parameter.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        gradient = parameter.grad.double()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = exact_update(0.1 * gradient + 0.9 * momentum, coefficients)
        expected = 0.99 * expected - 0.1 * 0.2 * max(shape[-2:]) ** 0.5 * update
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coefficients", [FOR_EXPERTS, NEWTON_SCHULZ])
def test_singular_values_end_around_one_unless_they_are_tiny(
    coefficients: Sequence[tuple[float, float, float]],
) -> None:
    values = torch.logspace(-6, 0, 200, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64)).Q for _ in range(2))
    ends = torch.linalg.svdvals(orthogonalize(left @ torch.diag(values) @ right, coefficients)).flip(0)
    share = values / values.norm()
    assert (ends[share > 0.01] > 0.65).all()
    assert (ends < 1.3).all()
    assert (ends[share < 1e-5] < 0.01).all()
    assert (ends[share < 1e-4] < 0.01).all() == (coefficients is FOR_EXPERTS)


def test_each_expert_is_orthogonalised_alone() -> None:
    gradient = torch.randn(5, 12, 8) * torch.logspace(-6, 2, 5)[:, None, None]
    together = orthogonalize(gradient)
    for expert in range(5):
        torch.testing.assert_close(together[expert], orthogonalize(gradient[expert]), rtol=1e-4, atol=1e-5)
    singular_values = torch.linalg.svdvals(together)
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.3


def test_gate_and_up_are_orthogonalised_apart() -> None:
    parameter = nn.Parameter(torch.randn(3, 20, 8))
    start = parameter.detach().clone()
    parameter.grad = torch.randn(3, 20, 8)
    Muon([parameter], lr=1.0, momentum=0.0, stacked=2).step()
    update = start - parameter.detach()
    for half in (slice(0, 10), slice(10, 20)):
        torch.testing.assert_close(
            update[:, half], orthogonalize(parameter.grad[:, half], FOR_EXPERTS) * 0.2 * 10**0.5, rtol=1e-4, atol=1e-5
        )


def test_an_expert_without_tokens_is_only_decayed_also_when_it_had_some_before() -> None:
    parameter = nn.Parameter(torch.randn(2, 8, 8))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.randn(2, 8, 8)
    optimizer.step()
    before = parameter.detach().clone()
    momentum = optimizer.state[parameter]["momentum"].clone()
    parameter.grad[1] = 0
    optimizer.step()
    torch.testing.assert_close(parameter[1].detach(), before[1] * 0.95)
    torch.testing.assert_close(optimizer.state[parameter]["momentum"][1], momentum[1] * 0.95)
    assert (parameter[0] - before[0] * 0.95).abs().max() > 1e-3


def test_muon_steps_without_kernels_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(300, 270))
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in (small, large)]
    ours, by_torch = Muon([small, large], lr=0.1), Muon(copies, lr=0.1)
    ours.step()
    for parameter, copy in zip((small, large), copies, strict=True):
        parameter.grad = torch.randn_like(parameter)
        copy.grad = parameter.grad.clone()
    version = small._version
    ours.step()
    assert small._version > version  # whoever differentiates what it was before is told
    with monkeypatch.context() as patch:
        patch.setattr(native_muon, "native_module", lambda: None)
        by_torch.step()
    for parameter, copy in zip((small, large), copies, strict=True):
        torch.testing.assert_close(parameter, copy, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_role() -> None:
    roles = {name: role_of(name, parameter) for name, parameter in make_model().named_parameters()}
    assert roles["layers.0.feed_forward.experts.gate_up"] == "gate_up"
    assert roles["layers.0.feed_forward.experts.down"] == "feed_forward"
    assert roles["layers.1.feed_forward.shared_experts.up_proj.weight"] == "feed_forward"
    assert roles["layers.1.attention.o_proj.weight"] == "attention"
    assert roles["embed_tokens.weight"] == "embedding"
    for other in ("feed_forward.router.weight", "attention.q_norm.weight", "feed_forward_norm.weight"):
        assert roles[f"layers.0.{other}"] == "other"
    assert roles["lm_head.weight"] == "other"


def test_biases_of_experts_and_the_gate_of_shared_experts_are_no_matrices() -> None:
    assert CONFIG.moe is not None
    moe = replace(CONFIG.moe, projection_bias=True, router_bias=True, n_shared_experts=1, shared_expert_gate=True)
    model = Transformer(replace(CONFIG, moe=moe))
    roles = {name: role_of(name, parameter) for name, parameter in model.named_parameters()}
    for other in ("experts.gate_up_bias", "experts.down_bias", "router.bias", "shared_expert_gate.weight"):
        assert roles[f"layers.1.feed_forward.{other}"] == "other"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_moves_once_and_only_matrices_decay(name: str) -> None:
    model = make_model()
    optimizers = make_optimizers(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
    owned = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    decaying = {
        parameter
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    for parameter_name, parameter in model.named_parameters():
        matrix = (parameter.ndim > 1 and "proj" in parameter_name) or "experts." in parameter_name
        assert (parameter in decaying) == matrix, parameter_name
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_steps(model, optimizers, range(3))
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_that_are_put_back_continue_bitwise(name: str) -> None:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    straight, broken = make_model(), make_model()
    optimizers = make_optimizers(straight, config)
    train_steps(straight, optimizers, range(6))

    optimizers = make_optimizers(broken, config)
    train_steps(broken, optimizers, range(3))
    moments = {key: value.clone() for key, value in optimizer_tensors(optimizers, broken).items()}
    resumed = make_model(seed=1)
    resumed.load_state_dict(broken.state_dict())
    optimizers = make_optimizers(resumed, config)
    load_optimizer_tensors(optimizers, resumed, moments)
    train_steps(resumed, optimizers, range(3, 6))
    expected = straight.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_experts_move_once_in_some_steps_by_as_much() -> None:
    start, gradients = torch.randn(3, 12, 8), torch.randn(4, 3, 12, 8)
    parameter, whole = nn.Parameter(start.clone()), nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([parameter, whole], lr=0.1, momentum=0.9, weight_decay=0.5, stack_every=2)
    momentum, expected = torch.zeros(3, 12, 8), start.clone()
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["number"] = number
        parameter.grad, whole.grad = gradient.clone(), torch.randn(8, 8)
        before = whole.detach().clone()
        optimizer.step()
        assert not torch.equal(whole, before)
        momentum = 0.9 * momentum + 0.1 * gradient
        if number % 2:
            update = orthogonalize(0.1 * gradient + 0.9 * momentum, FOR_EXPERTS)
            expected = expected * 0.95**2 - 2 * 0.1 * 0.2 * 12**0.5 * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum, rtol=1e-5, atol=1e-6)


def test_rates_are_a_factor_on_each_groups_peak() -> None:
    optimizers = make_optimizers(make_model(), OptimizerConfig(name="muon", lr=0.1, matrix_lr=0.2, feed_forward_lr=0.3))
    prepare_step(optimizers, 0, 0.5)
    rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
    assert {0.05, 0.1, 0.15} <= rates
