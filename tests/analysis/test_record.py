"""Recorded routing equals what the routers return. T tokens, E experts, K experts per token."""

from dataclasses import replace

import pytest
import torch

import moesaic
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    moe=MoEConfig(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1),
)


def test_every_layer_and_pass_is_recorded_and_nothing_afterwards() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    first, second = torch.randint(0, 50, (2, 7)), torch.randint(0, 50, (1, 4))
    expected: list[list[Routing]] = [[], []]
    logits = model(first, routings=expected[0])
    model(second, routings=expected[1])
    with moesaic.record_routing(model) as trace:
        assert torch.equal(model(first), logits)
        model(second)
    model(first)
    assert len(trace) == 2
    for layer in range(2):
        assert trace[layer].expert_ids.shape == (18, 2)
        assert torch.equal(
            trace[layer].expert_ids.flatten(), torch.cat([routings[layer].expert_ids for routings in expected])
        )
        assert torch.equal(trace[layer].logits, torch.cat([routings[layer].logits for routings in expected]))
        assert int(trace[layer].tokens_per_expert().sum()) == 36
        assert not trace[layer].weights.requires_grad


def test_a_caller_that_asks_for_routings_itself_still_gets_them() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    own: list[Routing] = []
    with moesaic.record_routing(model) as trace:
        model(torch.randint(0, 50, (1, 5)), routings=own)
    assert len(own) == 2
    assert torch.equal(own[1].expert_ids, trace[1].expert_ids.flatten())


def make_model(**moe: object) -> Transformer:
    assert CONFIG.moe is not None
    model = Transformer(replace(CONFIG, initializer_range=0.5, moe=replace(CONFIG.moe, **moe)))  # type: ignore[arg-type]
    model.init_weights(int(torch.randint(0, 2**31, ())))
    return model


@pytest.mark.parametrize(
    "moe", [{}, {"capacity_factor": 0.5}, {"capacity_factor": 0.5, "drop_policy": "pad"}, {"router": "noisy_topk"}]
)
@pytest.mark.parametrize("padded", [False, True])
def test_a_replayed_trace_chooses_the_same_experts_and_gives_the_same_gradients(
    moe: dict[str, object], padded: bool
) -> None:
    model, tokens = make_model(**moe).train(), torch.randint(0, 50, (2, 7))
    positions = torch.stack([torch.arange(7), torch.tensor([-1, -1, 0, 1, 2, 3, 4])]) if padded else None
    is_token = torch.ones(2, 7, dtype=torch.bool) if positions is None else positions >= 0
    keys, probe = torch.tensor([3, 8]), torch.randn(2, 7, 50)
    gradients, outputs = [], []
    with moesaic.record_routing(model) as trace:
        for replayed in (False, True):
            with moesaic.replay_routing(model, trace) if replayed else moesaic.record_routing(model):
                logits = model(tokens, positions, noise_keys=keys)[is_token]
            model.zero_grad()
            (logits * probe[is_token]).sum().backward()
            outputs.append(logits)
            gradients.append(
                {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
            )
    assert torch.equal(*outputs)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert gradients[0]["layers.1.feed_forward.router.weight"].abs().max() > 0


def test_replay_keeps_the_experts_where_the_router_has_changed() -> None:
    model, tokens = make_model(), torch.randint(0, 50, (2, 9))
    with moesaic.record_routing(model) as trace:
        model(tokens)
    for layer in model.moe_layers:
        layer.router.get_parameter("weight").data.neg_()
    with moesaic.record_routing(model) as moved:
        model(tokens)
    with moesaic.record_routing(model) as replayed, moesaic.replay_routing(model, trace):
        model(tokens)
    for layer in range(len(trace)):
        assert not torch.equal(moved[layer].expert_ids, trace[layer].expert_ids)
        assert torch.equal(replayed[layer].expert_ids, trace[layer].expert_ids)
        chosen = replayed[layer].logits.softmax(-1).gather(1, trace[layer].expert_ids)
        torch.testing.assert_close(replayed[layer].weights, chosen / chosen.sum(-1, keepdim=True))


def test_a_trace_of_other_passes_is_refused_with_the_numbers() -> None:
    model = make_model()
    with moesaic.record_routing(model) as trace:
        model(torch.randint(0, 50, (2, 7)))
    with moesaic.replay_routing(model, trace):
        model(torch.randint(0, 50, (2, 7)))
        with pytest.raises(UsageError, match="holds 1 forward passes"):
            model(torch.randint(0, 50, (2, 7)))
    with (
        moesaic.replay_routing(model, trace),
        pytest.raises(UsageError, match="2 layers of 14 tokens, and this pass 2 layers of 8"),
    ):
        model(torch.randint(0, 50, (1, 8)))
    model(torch.randint(0, 50, (1, 8)))
