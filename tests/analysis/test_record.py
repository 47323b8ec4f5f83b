"""Recorded routing equals what the routers return. T tokens, E experts, K experts per token."""

import torch

import moesaic
from moesaic.config import ModelConfig, MoEConfig
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
