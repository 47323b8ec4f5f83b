"""Evaluation against sums written out. B sequences, L positions, E experts."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.train.evaluate import evaluate

CONFIG = ModelConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
)


def make_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(torch.randint(0, 30, (3, 7)), torch.randint(0, 30, (3, 7)), torch.tensor([0, 2, 1])) for _ in range(2)]


def test_loss_and_bits_per_byte_are_the_sums_over_all_tokens() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    token_bytes = torch.randint(0, 5, (30,))
    batches = make_batches()
    nats, text_bytes = 0.0, 0
    for tokens, targets, _ in batches:
        probabilities = model(tokens).double().softmax(-1)
        for sequence in range(3):
            for position in range(7):
                target = int(targets[sequence, position])
                nats -= math.log(float(probabilities[sequence, position, target]))
                text_bytes += int(token_bytes[target])
    result = evaluate(model, batches, token_bytes)
    assert result.tokens == 42
    assert result.loss == pytest.approx(nats / 42, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 42), rel=1e-6)


def test_load_is_counted_per_domain_layer_and_expert() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    batches = make_batches()
    expected = torch.zeros(3, 2, 4, dtype=torch.int64)
    for tokens, _, domains in batches:
        for sequence in range(3):
            routings: list[Routing] = []
            model(tokens[sequence : sequence + 1], routings=routings)
            for layer, routing in enumerate(routings):
                expected[domains[sequence], layer] += routing.tokens_per_expert()
    result = evaluate(model, batches, torch.ones(30, dtype=torch.int64), num_domains=3)
    assert torch.equal(result.load, expected)
    assert model.training


def test_the_routing_is_that_of_all_batches_together() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    batches = make_batches()
    result = evaluate(model, batches, torch.ones(30, dtype=torch.int64), num_domains=3)
    assert torch.equal(result.routing.load, result.load.sum(0))
    row, routings = result.routing.row(), []
    model(torch.cat([tokens for tokens, _, _ in batches]), routings=routings)
    logits = torch.stack([routing.logits for routing in routings]).double()
    assert row["max_vio"] == pytest.approx(result.max_vio, abs=1e-4)
    assert row["router_logit_rms"] == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-4)
    assert row["router_logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-4)
    assert (row["dropped"], row["experts_per_token"]) == (0, 2)


def test_a_dense_model_has_no_routing() -> None:
    model = Transformer(replace(CONFIG, moe=None, intermediate_size=16))
    model.init_weights(0)
    result = evaluate(model, make_batches(), torch.ones(30, dtype=torch.int64))
    assert result.load.shape == (1, 0, 0)
    assert result.max_vio is None
    assert set(result.routing.row().values()) == {None}


@pytest.mark.parametrize("kind", ["num_zero_experts", "num_copy_experts", "num_constant_experts"])
def test_experts_that_compute_nothing_are_counted(kind: str) -> None:
    assert CONFIG.moe is not None
    model = Transformer(replace(CONFIG, moe=replace(CONFIG.moe, **{kind: 3})))
    model.init_weights(0)
    result = evaluate(model, make_batches(), torch.ones(30, dtype=torch.int64))
    assert result.load.shape == (1, 2, 4 + 3)
    assert int(result.load.sum()) == 42 * 2 * 2


def test_no_text_is_an_error() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    with pytest.raises(MoesaicError, match="no text to evaluate on"):
        evaluate(model, [], torch.ones(30))
