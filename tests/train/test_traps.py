"""The mistakes that training mixtures of experts is known for, one test each. tests/test_mutations.py plants every one.

B sequences, L positions, T = B x L tokens, E experts, K experts per token, D hidden size. What one layer's terms can
get wrong is in tests/model/test_balance.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.config import BalanceConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moesaic.errors import UsageError
from moesaic.model.routers import LinearRouter, Router
from moesaic.model.routers.topk import SigmoidTopKRouter
from moesaic.model.routing_context import RoutingContext
from moesaic.model.transformer import Transformer
from moesaic.ops import Choice, Routing
from moesaic.train.evaluate import evaluate
from moesaic.train.objective import Batch, accumulate_gradients, update_after_step
from moesaic.train.optimizer import make_optimizers

B, L, D, E, K, V = 4, 6, 16, 8, 2, 40


def make_model(**settings: Any) -> Transformer:
    sizes: dict[str, Any] = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 8}
    config = ModelConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        initializer_range=0.3,
        moe=MoEConfig(**sizes | settings),
    )  # fmt: skip
    model = Transformer(config, backend="reference")
    model.init_weights(seed=0)
    return model.train()


def draw_batch(lengths: tuple[int, ...] | None = None) -> Batch:
    tokens_BL, targets_BL = torch.randint(0, V, (2, B, L))
    if lengths is None:
        return Batch(tokens_BL, targets_BL)
    steps_BL = torch.arange(L).expand(B, L)
    positions_BL = torch.where(steps_BL < torch.tensor(lengths).unsqueeze(1), steps_BL, -1)
    return Batch(tokens_BL, targets_BL, positions_BL)


def routings_of(model: Transformer, batch: Batch) -> list[Routing]:
    routings: list[Routing] = []
    with torch.no_grad():
        model(batch.tokens, batch.positions, routings=routings)
    return routings


def bias_of(router: Router) -> Tensor:
    assert router.expert_bias is not None
    return router.expert_bias


def gradient_of(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_imbalances_of_layers_do_not_cancel() -> None:
    """The loss is the mean of the layers' losses, and not that of all layers' tokens in one heap."""
    model, batch = make_model().double(), draw_batch()
    expected = 0.0
    for routing in routings_of(model, batch):
        share_E = routing.load().double() / routing.load().sum()
        expected += float(E * (share_E * routing.logits.softmax(-1).mean(0)).sum()) / 2
    result = accumulate_gradients(model, batch.split(2), BalanceConfig(aux_loss_coef=0.1))
    assert result.aux_loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_every_target_counts_alike_however_unequally_micro_batches_hold_them(micro_batches: int) -> None:
    model, batch = make_model().double(), draw_batch(lengths=(6, 1, 3, 2))
    is_token_BL = batch.positions >= 0  # type: ignore[operator]
    logits_BLV = model(batch.tokens, batch.positions)
    expected = functional.cross_entropy(logits_BLV[is_token_BL], batch.targets[is_token_BL])
    gradient = torch.autograd.grad(expected, model.lm_head.weight)[0]
    result = accumulate_gradients(model, batch.split(B // micro_batches), BalanceConfig())
    assert result.loss == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(gradient_of(model.lm_head.weight), gradient)


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_the_balance_loss_has_no_factor_of_the_micro_batches(scope: Any, micro_batches: int) -> None:
    balance = BalanceConfig(aux_loss_coef=1.0, aux_loss_scope=scope)
    batch, seen = draw_batch(lengths=(6, 1, 3, 2)), []
    for size in (B, B // micro_batches):
        model = make_model().double()
        result = accumulate_gradients(model, batch.split(size), balance)
        seen.append((result.aux_loss, gradient_of(model.layers[0].feed_forward.router.weight)))  # type: ignore[union-attr]
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-10)
    torch.testing.assert_close(seen[1][1], seen[0][1])


def test_padding_is_no_load_and_enters_no_expert() -> None:
    model, batch = make_model(), draw_batch(lengths=(6, 1, 3, 2))
    routings = routings_of(model, batch)
    padding_T = (batch.positions < 0).flatten()  # type: ignore[operator]
    for routing in routings:
        assert int(routing.load().sum()) == 12 * K
        assert not bool(padding_T[routing.token_ids].any())
    result = accumulate_gradients(model, batch.split(2), BalanceConfig())
    assert result.statistics.load.sum(1).tolist() == [12 * K] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_moves_once_per_step_by_the_load_of_the_whole_batch(checkpointing: bool) -> None:
    """Neither in a forward pass nor in its recomputation nor with each micro-batch."""
    model, batch = make_model(router="sigmoid_topk"), draw_batch()
    model.activation_checkpointing = checkpointing
    balance = BalanceConfig(bias_update_rate=0.01, aux_loss_coef=0.01)
    result = accumulate_gradients(model, batch.split(1), balance)
    assert all(float(bias_of(layer.router).abs().max()) == 0 for layer in model.moe_layers)
    update_after_step(model, result, balance)
    assert result.statistics.load.sum(1).tolist() == [B * L * K] * 2
    for layer, load_E in zip(model.moe_layers, result.statistics.load.double(), strict=True):
        expected_E = 0.01 * (load_E.mean() - load_E).sign()
        torch.testing.assert_close(bias_of(layer.router), (expected_E - expected_E.mean()).float())


def test_evaluation_moves_no_bias() -> None:
    model, batch = make_model(router="sigmoid_topk"), draw_batch()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    evaluate(
        model, [(batch.tokens, batch.targets, torch.zeros(B, dtype=torch.int64))], torch.ones(V, dtype=torch.int64)
    )
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training


def test_the_bias_is_float32_and_loses_no_small_step() -> None:
    """In bfloat16 0.25 + 0.0001 is 0.25."""
    model, batch = make_model(router="sigmoid_topk"), draw_batch()
    balance = BalanceConfig(bias_update_rate=1e-4)
    for layer in model.moe_layers:
        bias_of(layer.router).copy_(torch.tensor([0.25, -0.25] * (E // 2)))
    result = accumulate_gradients(model, [batch], balance, dtype=torch.bfloat16)
    update_after_step(model, result, balance)
    for layer, load_E in zip(model.moe_layers, result.statistics.load, strict=True):
        bias_E = bias_of(layer.router)
        assert bias_E.dtype == torch.float32
        is_even = bool((load_E == load_E[0]).all())
        assert is_even or float((bias_E.abs() - 0.25).abs().max()) > 2e-5


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_the_bias_chooses_and_never_weighs(router: str) -> None:
    model, batch = make_model(router=router, expert_bias=True), draw_batch()
    for layer in model.moe_layers:
        bias_of(layer.router).normal_()
    scores_of = torch.softmax if router == "softmax_topk" else lambda logits, dim: logits.sigmoid()
    for routing in routings_of(model, batch):
        chosen_TK = scores_of(routing.logits, -1).gather(1, routing.expert_ids.view(-1, K))
        torch.testing.assert_close(routing.weights.view(-1, K), chosen_TK / chosen_TK.sum(-1, keepdim=True))


def test_router_logits_stay_float32_in_a_bfloat16_model() -> None:
    """Under autocast and when the whole model is bfloat16: rounded logits would choose other experts."""
    model, x = make_model(), torch.randn(B * L, D)
    router, context = model.moe_layers[0].router, RoutingContext(tokens=torch.zeros(B, L, dtype=torch.int64))
    assert isinstance(router, LinearRouter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_TE = router(x, context).logits
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE, functional.linear(x, router.weight))
    router, x = router.bfloat16(), x.bfloat16()
    logits_TE = router(x, context).logits
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE, functional.linear(x.float(), router.weight.float()))


def test_recomputation_takes_the_experts_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the router would now choose others, as a logit that differs in its last bit makes it do."""
    batch, gradients = draw_batch(), []
    for checkpointing in (False, True):
        model = make_model(router="sigmoid_topk").double()
        model.activation_checkpointing = checkpointing
        asked: list[Router] = []

        def select(router: Router, logits: Tensor, context: RoutingContext, asked: list[Router] = asked) -> Choice:
            asked.append(router)
            return Choice.of_topk((logits if asked.count(router) == 1 else -logits).topk(K).indices)

        monkeypatch.setattr(SigmoidTopKRouter, "select", select)
        accumulate_gradients(model, [batch], BalanceConfig())
        assert len(asked) == 2
        gradients.append([gradient_of(parameter) for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk", "topk_softmax", "noisy_topk"])
def test_a_weight_that_is_always_1_is_refused(router: Any) -> None:
    """Softmax after top-1: the router would get no gradient."""
    with pytest.raises(UsageError, match="every weight is 1, and the router gets no gradient"):
        TrainConfig(model=make_model(router=router, num_experts_per_tok=1).config)


def test_jitter_touches_what_the_router_sees_and_nothing_else() -> None:
    model, x = make_model(router_input_jitter=0.5), torch.randn(B, L, D)
    layer, context = model.moe_layers[0], RoutingContext(tokens=torch.zeros(B, L, dtype=torch.int64))
    router, before = layer.router, x.clone()
    assert isinstance(router, LinearRouter)
    with torch.no_grad():
        y_BLD, routing = layer(x, context)
        assert not torch.allclose(routing.logits, functional.linear(before.flatten(0, 1), router.weight))
        expected_TD = layer.experts(before.flatten(0, 1), routing)
    assert torch.equal(x, before)
    torch.testing.assert_close(y_BLD.flatten(0, 1), expected_TD)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_an_expert_without_tokens_has_a_gradient_of_zero_and_still_decays(name: Any, backend: str) -> None:
    model = Transformer(make_model(router="sigmoid_topk").config, backend=backend)
    model.init_weights(seed=0)
    idle = 3
    for layer in model.moe_layers:
        bias_of(layer.router)[idle] = -100.0
    config = OptimizerConfig(name=name, weight_decay=0.5)
    optimizers = make_optimizers(model, config)
    accumulate_gradients(model, draw_batch().split(2), BalanceConfig())
    weights = [part for layer in model.moe_layers for part in (layer.experts.gate_up, layer.experts.down)]
    before = [weight.detach().clone() for weight in weights]
    for optimizer in optimizers:
        optimizer.step()
    rate = config.feed_forward_lr if name == "muon" else config.lr
    for weight, old in zip(weights, before, strict=True):
        assert float(gradient_of(weight)[idle].abs().max()) == 0
        torch.testing.assert_close(weight[idle], old[idle] * (1 - rate * config.weight_decay))


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_a_batch_without_tokens_leaves_no_gradient_out(backend: str) -> None:
    model = Transformer(make_model().config, backend=backend)
    model.init_weights(seed=0)
    batch = draw_batch(lengths=(0,) * B)
    result = accumulate_gradients(model, batch.split(2), BalanceConfig(aux_loss_coef=0.1, z_loss_coef=0.1))
    assert result.loss == result.aux_loss == result.z_loss == 0.0
    assert all(float(gradient_of(parameter).abs().max()) == 0 for parameter in model.parameters())


def test_rows_that_fill_an_expert_up_leak_no_gradient_to_the_router() -> None:
    """They have weight 0, and the router learns what it learns without them."""
    batch, gradients = draw_batch(), []
    for policy in ("drop", "pad"):
        model = make_model(capacity_factor=1.25, drop_policy=policy).double()
        accumulate_gradients(model, [batch], BalanceConfig())
        gradients.append([gradient_of(parameter) for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
