"""What a batch teaches: counts, scopes, the counting pass, steering after a step, and which settings are refused.

B sequences, L positions, E experts, K experts per token.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moesaic.config import BalanceConfig, ModelConfig, MoEConfig, TrainConfig
from moesaic.errors import UsageError
from moesaic.model.routers import ReLURouter
from moesaic.model.transformer import Transformer
from moesaic.train.objective import IGNORED, Batch, accumulate_gradients, update_after_step

B, L, E, K, V = 4, 5, 8, 2, 30


def make_config(**settings: Any) -> ModelConfig:
    """Those of the model if it has a field of that name, else those of its experts."""
    outer = {key: settings.pop(key) for key in ("depth_layers", "depth_capacity") if key in settings}
    sizes: dict[str, Any] = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 8}
    return ModelConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        initializer_range=0.3, **outer,
        moe=MoEConfig(**sizes | settings),
    )  # fmt: skip


def make_model(**settings: Any) -> Transformer:
    model = Transformer(make_config(**settings), backend="reference")
    model.init_weights(seed=0)
    return model.double().train()


def draw_batch() -> Batch:
    return Batch(*torch.randint(0, V, (2, B, L)), noise_keys=torch.arange(B))


def test_counts_leave_padding_and_ignored_targets_out() -> None:
    positions = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, 2, 3, -1], [-1] * 5, [0, 1, 2, 3, 4]])
    batch = replace(draw_batch(), positions=positions)
    batch.targets[3, 1:3] = IGNORED
    assert batch.counts().tolist() == [10, 12, 3]
    assert [part.counts().tolist() for part in batch.split(2)] == [[7, 7, 2], [3, 5, 1]]
    assert replace(batch, positions=None).counts().tolist() == [18, 20, 4]


def test_splitting_leaves_nothing_out() -> None:
    batch = draw_batch()
    parts = batch.split(2)
    assert [len(part.tokens) for part in parts] == [2, 2]
    for name in ("tokens", "targets", "noise_keys"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(part.positions is None for part in parts)


@pytest.mark.parametrize(
    ("balance", "settings", "passes"),
    [
        (BalanceConfig(z_loss_coef=0.1), {}, 2),
        (BalanceConfig(aux_loss_coef=0.1), {}, 4),
        (BalanceConfig(aux_loss_coef=0.1, aux_loss_scope="sequence"), {}, 2),
        (BalanceConfig(aux_loss_coef=0.1, aux_loss_scope="micro_batch"), {}, 2),
        (BalanceConfig(), {"router": "relu"}, 4),
        (BalanceConfig(), {"depth_layers": (1,)}, 2),
        (BalanceConfig(z_loss_coef=0.1), {"depth_layers": (1,)}, 4),
    ],
)
def test_a_batch_is_passed_twice_only_where_its_load_must_be_known_first(
    balance: BalanceConfig, settings: dict[str, Any], passes: int
) -> None:
    model, batch = make_model(**settings), draw_batch()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    accumulate_gradients(model, batch.split(2), balance)
    assert calls == [False] * (passes - 2) + [True] * 2
    calls.clear()
    accumulate_gradients(model, [batch], balance)
    assert calls == [True]


def test_the_load_of_a_micro_batch_is_another_scope_than_that_of_the_batch() -> None:
    batch, losses = draw_batch(), []
    for scope in ("micro_batch", "global_batch"):
        balance = BalanceConfig(aux_loss_coef=0.1, aux_loss_scope=scope)  # type: ignore[arg-type]
        losses.append([accumulate_gradients(make_model(), batch.split(size), balance).aux_loss for size in (B, 1)])
    assert losses[0][0] == losses[1][0] == pytest.approx(losses[1][1], rel=1e-10)
    assert losses[0][1] != pytest.approx(losses[0][0], rel=1e-6)


def test_the_loss_is_the_sum_of_its_terms_times_their_coefficients() -> None:
    """Seen in the gradient of the router, which is linear in the coefficients."""
    batch, gradients = draw_batch(), []
    for aux, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.2)):
        model = make_model()
        accumulate_gradients(model, [batch], BalanceConfig(aux_loss_coef=aux, z_loss_coef=z))
        gradient = model.moe_layers[1].router.weight.grad
        assert isinstance(gradient, torch.Tensor)
        gradients.append(gradient)
    none, aux, z, both = gradients
    torch.testing.assert_close(both, none + 0.3 * (aux - none) + 0.2 * (z - none))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_relu_routers_steer_once_per_step_to_k_experts(micro_batches: int) -> None:
    model, batch = make_model(router="relu"), draw_batch()
    routers = [layer.router for layer in model.moe_layers]
    for router in routers:
        router.get_buffer("log_l1_weight").fill_(3.0)
    before = [router.l1_weight.clone() for router in routers if isinstance(router, ReLURouter)]
    balance = BalanceConfig(relu_l1_growth=1.5)
    result = accumulate_gradients(model, batch.split(B // micro_batches), balance)
    update_after_step(model, result, balance)
    assert len(before) == 2
    for router, old, load_E in zip(routers, before, result.statistics.load, strict=True):
        assert isinstance(router, ReLURouter)
        excess = int(load_E.sum()) - B * L * K
        expected = old * (1.5 if excess > 0 else 1 / 1.5 if excess < 0 else 1.0)
        torch.testing.assert_close(router.l1_weight, expected)


def test_without_a_rate_nothing_moves() -> None:
    model = make_model(router="sigmoid_topk")
    update_after_step(model, accumulate_gradients(model, [draw_batch()], BalanceConfig()), BalanceConfig())
    assert all(float(buffer.abs().max()) == 0 for _, buffer in model.named_buffers())


def test_a_dense_model_has_a_loss_and_nothing_else() -> None:
    model = Transformer(replace(make_config(), moe=None, intermediate_size=16))
    model.init_weights(seed=0)
    result = accumulate_gradients(model, draw_batch().split(2), BalanceConfig())
    assert result.loss > 0
    assert (result.aux_loss, result.z_loss, result.layer_tokens) == (0.0, 0.0, [])
    assert result.statistics.load.numel() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux_loss_coef": -1.0}, "aux_loss_coef is -1.0"),
        ({"aux_loss_devices": 2}, "aux_loss_devices is 2, but aux_loss_coef is 0"),
        ({"relu_l1_growth": 1.0}, "relu_l1_growth is 1.0; it must lie above 1"),
        ({"bias_update_rate": 2.0, "bias_update_rule": "quantile"}, "bias_update_rate is 2.0; .* at most 1"),
    ],
)
def test_balance_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BalanceConfig(**settings)


QUANTILE = {"bias_update_rate": 0.5, "bias_update_rule": "quantile"}


@pytest.mark.parametrize(
    ("router", "balance", "message"),
    [
        ({"router": "hash"}, {"aux_loss_coef": 0.1}, "hash has no logits that could learn; set it to 0"),
        ({"router": "hash"}, {"z_loss_coef": 0.1}, "hash has no logits per token"),
        ({"router": "hash"}, {"bias_update_rate": 0.1}, "needs a selection bias"),
        ({"router": "soft"}, {"aux_loss_coef": 0.1}, "soft gives every expert equally many mixtures already"),
        ({"router": "soft"}, {"z_loss_coef": 0.1}, "soft has no logits per token"),
        ({"router": "expert_choice"}, {"aux_loss_coef": 0.1}, "expert_choice gives every expert equally many tokens"),
        ({}, {"aux_loss_coef": 0.1, "aux_loss_devices": 3}, "aux_loss_devices is 3; it must divide the 8 experts"),
        (
            {"num_zero_experts": 2}, {"aux_loss_coef": 0.1, "aux_loss_devices": 4},
            "must divide the 10 experts that the router chooses among, those that compute nothing included",
        ),
        ({}, {"bias_update_rate": 0.1}, "needs a selection bias"),
        ({"router": "sigmoid_topk", "expert_bias_form": "multiply"}, QUANTILE, "needs a bias that is added"),
        ({"router": "sigmoid_topk", "n_group": 4, "topk_group": 2}, QUANTILE, "and no groups; .* n_group 4"),
        ({"router": "sigmoid_topk", "num_experts_per_tok": 8}, QUANTILE, "num_experts_per_tok is 8 of 8"),
    ],
)  # fmt: skip
def test_balance_that_does_not_fit_the_router_is_refused(
    router: dict[str, Any], balance: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(model=make_config(**router), balance=BalanceConfig(**balance))
