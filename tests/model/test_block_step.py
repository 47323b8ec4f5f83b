"""Blocks as one call into C++: the same numbers as their parts, and their parts wherever somebody looks at them.

B texts, L tokens of each.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic import record_routing, replay_routing
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model import block as block_module
from moesaic.model import block_step as step_module
from moesaic.model.kv_cache import KVCache
from moesaic.model.paged_kv import NewTokens, PagedKV
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing, native_step
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_block import BlockStep
from moesaic.ops.native_step import BLOCK_TOKENS, FEW_TOKENS

from .paged import unwritten
from .test_quantize import BASE, EXPERTS, random_model

pytestmark = pytest.mark.skipif(native_module() is None, reason="the kernels are not built here")

OLMOE = ModelConfig(**BASE, qk_norm="width", moe=MoEConfig(**EXPERTS, norm_topk_prob=False))
SERVED = {
    "olmoe": OLMOE,
    "qwen3_moe": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS)),
    "sigmoid, biased": ModelConfig(
        **BASE,
        qk_norm="none",
        attention_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        moe=MoEConfig(**EXPERTS, router="sigmoid_topk", routed_scaling_factor=2.5),
    ),
    "clamped": ModelConfig(
        **BASE, moe=MoEConfig(**EXPERTS, router_bias=True, activation="clamped_swiglu", projection_bias=True)
    ),
    "window, no rope": ModelConfig(
        **BASE,
        layer_types=("sliding_attention", "full_attention", "full_attention"),
        sliding_window=5,
        nope_layers=(1,),
        moe=MoEConfig(**EXPERTS),
    ),
    "residual multiplier": ModelConfig(**BASE, residual_multiplier=0.3, moe=MoEConfig(**EXPERTS)),
}
NOT_SERVED = {
    "post norm": replace(OLMOE, norm_placement="post"),
    "layer norm": replace(OLMOE, norm="layer"),
    "shared experts": replace(OLMOE, moe=MoEConfig(**EXPERTS, n_shared_experts=1)),
    "free experts": replace(OLMOE, moe=MoEConfig(**EXPERTS, num_zero_experts=2)),
    "weighs inputs": replace(OLMOE, moe=MoEConfig(**EXPERTS, router="topk_sigmoid_input")),
    "clipped": replace(OLMOE, clip_qkv=1.0),
    "normalised after RoPE": replace(OLMOE, qk_norm="head_after_rope"),
    "groups of experts": replace(OLMOE, moe=MoEConfig(**{**EXPERTS, "num_experts": 6}, n_group=2)),
    "another router": replace(OLMOE, moe=MoEConfig(**EXPERTS, router="topk_softmax")),
}


class Calls:
    """Counts the blocks that were one call, or forbids it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, allowed: bool = True) -> None:
        self.number = 0
        original = step_module.block_step

        def counted(*arguments: Any) -> BlockStep | None:
            step = original(*arguments) if allowed else None
            self.number += step is not None
            return step

        monkeypatch.setattr(block_module, "block_step", counted)
        # A router by itself leaves many tokens to torch, which rounds otherwise.
        monkeypatch.setattr(native_step, "FEW_TOKENS", 10**9)


def quantized(config: ModelConfig, scheme: str = "int4") -> Transformer:
    model = random_model(config)
    quantize_model(model, make_quantization(scheme, config))
    return model


@torch.no_grad()
def decoded(model: Transformer, tokens: Tensor, new: int = 1, kv: PagedKV | None = None, **options: Any) -> Tensor:
    """Logits of tokens (B, L), those of all texts side by side: the first half at once and the rest `new` at a time."""
    batch, length = tokens.shape
    of_each = -(-length // BLOCK_TOKENS)
    kv = kv or unwritten(model.config, batch * of_each, model.embed_tokens.weight.dtype)
    parts, past = [], 0
    for part in [tokens[:, : length // 2], *tokens[:, length // 2 :].split(new, dim=1)]:
        blocks = [range(number * of_each, (number + 1) * of_each) for number in range(batch)]
        of_part = kv.batch([NewTokens(own, past, part.shape[1]) for own in blocks])
        logits = model(part.reshape(1, -1), kv=of_part, **options)
        parts.append(logits.unflatten(1, part.shape)[0])
        past += part.shape[1]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def decoded_with_cache(model: Transformer, tokens: Tensor) -> Tensor:
    kv = KVCache(model.config, batch_size=len(tokens), capacity=tokens.shape[1], dtype=torch.float32)
    return torch.cat([model(part, kv=kv) for part in tokens.split(1, dim=1)], dim=1)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(BASE["vocab_size"], shape)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (2, 3), (1, 60), (FEW_TOKENS + 4, 1)])
@pytest.mark.parametrize("name", SERVED)
def test_a_block_in_one_call_gives_what_its_parts_give(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, new: int, scheme: str
) -> None:
    config = SERVED[name]
    model, tokens = quantized(config, scheme), random_tokens(batch, max(16, new + 20))
    with monkeypatch.context() as patch:
        Calls(patch, allowed=False)
        expected = decoded(model, tokens, new)
    calls = Calls(monkeypatch)
    y = decoded(model, tokens, new)
    passes = 1 + -(-(tokens.shape[1] - tokens.shape[1] // 2) // new)
    assert calls.number == passes * config.num_hidden_layers
    if config.residual_multiplier == 1.0:
        assert torch.equal(y, expected)
    else:  # torch rounds x + 0.3 u once, so that some inputs of the next product are rounded to another multiple
        assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_unusual_goes_part_by_part(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = Calls(monkeypatch)
    decoded(quantized(NOT_SERVED[name]), random_tokens(2, 8))
    assert calls.number == 0


def test_what_is_not_packed_or_not_float32_or_not_in_blocks_goes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    decoded(random_model(OLMOE), random_tokens(2, 8))
    decoded(quantized(OLMOE).to(torch.bfloat16), random_tokens(2, 8))
    decoded_with_cache(quantized(OLMOE), random_tokens(2, 8))
    with torch.no_grad():
        quantized(OLMOE)(random_tokens(2, 8))
    decoded(quantized(OLMOE).train(), random_tokens(2, 8))
    partly = random_model(OLMOE)
    kinds = make_quantization("int4", OLMOE)
    quantize_model(partly, replace(kinds, formats={"experts": "int4"}))
    decoded(partly, random_tokens(2, 8))
    assert calls.number == 0
    decoded(quantized(OLMOE), random_tokens(2, 8))
    assert calls.number == 5 * OLMOE.num_hidden_layers


@pytest.mark.parametrize("name", ["olmoe", "sigmoid, biased"])
def test_whoever_asks_for_the_routing_gets_what_the_parts_give(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, tokens = quantized(SERVED[name]), random_tokens(3, 20)
    with monkeypatch.context() as patch, record_routing(model) as expected:
        Calls(patch, allowed=False)
        decoded(model, tokens, 4)
    calls, routings = Calls(monkeypatch), list[Routing]()
    decoded(model, tokens, 4, routings=routings)
    with record_routing(model) as trace:
        logits = decoded(model, tokens, 4)
    assert torch.equal(logits, decoded(model, tokens, 4))
    assert calls.number == 3 * 4 * OLMOE.num_hidden_layers
    for index, (layer, of_parts) in enumerate(zip(trace, expected, strict=True)):
        assert [routing.num_tokens for routing in layer.routings] == [30, 12, 12, 6]
        given = zip(layer.routings, of_parts.routings, routings[index :: OLMOE.num_hidden_layers], strict=True)
        for routing, *others in given:
            for other in others:
                assert torch.equal(routing.expert_ids, other.expert_ids)
                assert torch.equal(routing.token_ids, other.token_ids)
                assert torch.equal(routing.weights, other.weights)
                assert torch.equal(routing.logits, other.logits)
                assert (routing.num_experts, routing.top_k) == (other.num_experts, other.top_k)


def test_recorded_routing_is_replayed_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantized(OLMOE), random_tokens(2, 8)
    with record_routing(model) as trace:
        expected = decoded(model, tokens)
    calls = Calls(monkeypatch)
    with replay_routing(model, trace):
        replayed = decoded(model, tokens)
    assert calls.number == 0
    assert (replayed - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "part", ["attention", "attention.q_norm", "attention.o_proj", "feed_forward.router", "feed_forward.experts"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_hooks_within_a_block_are_called(part: str, packed: bool) -> None:
    model = quantized(OLMOE) if packed else random_model(OLMOE)
    seen: list[nn.Module] = []
    model.blocks[1].get_submodule(part).register_forward_hook(lambda module, *_: seen.append(module))
    decoded(model, random_tokens(1, 8))
    assert len(seen) == 1 + 4


def test_hooks_on_all_modules_are_called() -> None:
    model = quantized(OLMOE)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        decoded(model, random_tokens(1, 8))
    finally:
        handle.remove()
    assert seen.count(model.blocks[1].get_submodule("attention.o_proj")) == 1 + 4


def test_the_blocks_of_the_cache_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantized(OLMOE), random_tokens(2, 40)
    caches = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            Calls(patch, allowed=allowed)
            kv = unwritten(OLMOE, 5, torch.float32)
            decoded(model, tokens, kv=kv)
        caches.append(kv)
    for each, other in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
        written = ~each.isnan()
        assert written.sum() == OLMOE.num_hidden_layers * 2 * 40 * OLMOE.num_key_value_heads * OLMOE.head_dim
        assert torch.equal(written, ~other.isnan())
        assert torch.equal(each[written], other[written])


def test_small_weights_of_another_type_are_read_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantized(SERVED["sigmoid, biased"]), random_tokens(2, 8)
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name or name.endswith("sinks"):
            parameter.data = parameter.data.bfloat16()
    with monkeypatch.context() as patch:
        Calls(patch, allowed=False)
        expected = decoded(model, tokens)
    calls = Calls(monkeypatch)
    assert torch.equal(decoded(model, tokens), expected)
    assert calls.number
