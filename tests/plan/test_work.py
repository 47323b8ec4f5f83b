"""Counts of work against constructed models, a key-value cache, and routing that is drawn."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from moesaic.accounting import flops_per_token, training_flops_per_token
from moesaic.config import MLAConfig, ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.kv_cache import KVCache
from moesaic.model.transformer import Transformer
from moesaic.plan.inference import InferenceTask
from moesaic.plan.report import model_bytes
from moesaic.plan.subject import Subject
from moesaic.plan.work import (
    absorbed_score_flops,
    bytes_per_weight,
    experts_visited,
    forward_work,
    kv_numbers,
    last_feed_forward,
    parameters,
    training_work,
    weights_read,
)


def draw_config() -> ModelConfig:
    layers = random.randint(2, 4)
    return ModelConfig(
        vocab_size=random.randint(100, 200),
        hidden_size=random.choice((32, 48)),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=random.choice((1, 2, 4)),
        head_dim=8,
        intermediate_size=40,
        tie_word_embeddings=random.random() < 0.5,
        layer_types=tuple(random.choice(("full_attention", "sliding_attention")) for _ in range(layers)),
        sliding_window=8,
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_shared_experts=random.choice((0, 1)),
            first_k_dense_replace=random.choice((0, 1)),
        ),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bytes_of_weights_are_those_of_a_constructed_model(precision: str) -> None:
    config = draw_config()
    model = Transformer(config).to(getattr(torch, precision))
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    task = InferenceTask(phase="decode", precision=precision)
    assert model_bytes(Subject(name="made up", config=config), task)["weights"] == held


@pytest.mark.parametrize("latent", [False, True])
def test_keys_and_values_are_those_of_a_cache(latent: bool) -> None:
    config = replace(draw_config(), layer_types=())
    if latent:
        mla = MLAConfig(kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        config = replace(config, mla=mla, head_dim=12, num_key_value_heads=4, qk_norm="none")
    tokens = random.randint(3, 9)
    cache = KVCache(config, batch_size=1, capacity=tokens)
    stored = cache.keys.numel() + cache.values.numel()
    assert kv_numbers(Subject(name="made up", config=config), tokens) == stored


def test_windows_end_what_is_kept() -> None:
    config = replace(draw_config(), num_hidden_layers=2, layer_types=("full_attention", "sliding_attention"))
    subject = Subject(name="made up", config=config)
    one_layer = 2 * config.num_key_value_heads * config.head_dim
    assert kv_numbers(subject, 5) == 10 * one_layer
    assert kv_numbers(subject, 100) == (100 + 8) * one_layer


def test_kinds_of_work_sum_up_to_the_count_of_operations() -> None:
    config = draw_config()
    subject = Subject(name="made up", config=config)
    context = random.randint(1, 50)
    assert forward_work(subject, context).total == pytest.approx(flops_per_token(config, context).forward)
    assert 3 * training_work(subject, 64).total == pytest.approx(training_flops_per_token(config, 64))
    assert config.moe is not None
    expert = 6 * config.hidden_size * config.moe.moe_intermediate_size
    assert forward_work(subject, context).experts == config.num_moe_layers * 2 * expert
    assert absorbed_score_flops(subject, context) == pytest.approx(forward_work(subject, context).scores)


def test_extra_parameters_are_read_and_computed() -> None:
    config = draw_config()
    plain, more = Subject(name="a", config=config), Subject(name="b", config=config, extra_parameters=1000)
    assert more.total - plain.total == more.active - plain.active == 1000
    assert forward_work(more, 8).dense - forward_work(plain, 8).dense == 2000
    assert weights_read(more, 1) - weights_read(plain, 1) == 1000


def test_experts_that_tokens_visit_are_those_of_drawn_routing() -> None:
    config, tokens = draw_config(), random.randint(1, 12)
    assert config.moe is not None
    generator = np.random.default_rng(random.randrange(2**31))
    drawn = [
        len({expert for _ in range(tokens) for expert in generator.choice(8, 2, replace=False)}) for _ in range(4000)
    ]
    assert experts_visited(config, tokens) == pytest.approx(np.mean(drawn), rel=0.02)
    assert experts_visited(config, 1) == 2
    assert experts_visited(config, 1e6) == pytest.approx(8)
    assert experts_visited(replace(config, moe=None), 5) == 0


def test_parts_are_the_whole() -> None:
    subject = Subject(name="made up", config=draw_config())
    part = parameters(subject)
    assert part.input_embedding + part.always + part.routed == subject.total
    every = weights_read(subject, 1e9)
    assert every == pytest.approx(subject.total - part.input_embedding)


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="int4"):
        bytes_per_weight("int3")


def test_the_last_feed_forward_is_what_a_layer_adds_beside_attention() -> None:
    config = draw_config()
    subject = Subject(name="made up", config=config)
    assert config.moe is not None
    last = last_feed_forward(subject)
    shared = 6 * config.hidden_size * config.moe.shared_intermediate_size
    experts = config.moe.num_experts_per_tok * 6 * config.hidden_size * config.moe.moe_intermediate_size
    assert (last.dense, last.experts) == (shared, experts)
    dense = replace(config, moe=None, intermediate_size=random.randint(8, 64))
    expected = 6 * dense.hidden_size * dense.intermediate_size
    assert last_feed_forward(Subject(name="dense", config=dense)).dense == expected
