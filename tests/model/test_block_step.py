"""Blocks as one call into C++: the same numbers as their parts, and their parts wherever somebody looks at them.

B sequences, L new tokens of each.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic import record_routing
from moesaic.config import ModelConfig, MoEConfig
from moesaic.model import block as block_module
from moesaic.model import block_step as step_module
from moesaic.model.kv_cache import KVCache
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_block import BlockStep
from moesaic.ops.native_step import FEW_TOKENS

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
    "tokens pass by": replace(OLMOE, depth_layers=(0, 1, 2)),
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


def quantized(config: ModelConfig, scheme: str = "int4") -> Transformer:
    model = random_model(config)
    quantize_model(model, make_quantization(scheme, config))
    return model


@torch.no_grad()
def decoded(model: Transformer, tokens: Tensor, new: int = 1, **options: Any) -> Tensor:
    """Logits of tokens (B, L), the first half at once and the rest `new` at a time."""
    batch, length = tokens.shape
    kv = KVCache(model.config, batch_size=batch, capacity=length, dtype=torch.float32)
    parts = [model(tokens[:, : length // 2], kv=kv)]
    parts += [model(part, kv=kv, **options) for part in tokens[:, length // 2 :].split(new, dim=1)]
    return torch.cat(parts, dim=1)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(BASE["vocab_size"], shape)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (2, 3), (FEW_TOKENS, 1)])
@pytest.mark.parametrize("name", SERVED)
def test_a_block_in_one_call_gives_what_its_parts_give(
    monkeypatch: pytest.MonkeyPatch, name: str, batch: int, new: int, scheme: str
) -> None:
    config = SERVED[name]
    model, tokens = quantized(config, scheme), random_tokens(batch, 24)
    with monkeypatch.context() as patch:
        Calls(patch, allowed=False)
        expected = decoded(model, tokens, new)
    calls = Calls(monkeypatch)
    y = decoded(model, tokens, new)
    assert calls.number >= 12 // new * config.num_hidden_layers
    if config.residual_multiplier == 1.0:
        assert torch.equal(y, expected)
    else:  # torch rounds x + 0.3 u once, so that some inputs of the next product are rounded to another multiple
        assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_unusual_goes_part_by_part(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = Calls(monkeypatch)
    decoded(quantized(NOT_SERVED[name]), random_tokens(2, 8))
    assert calls.number == 0


def test_what_is_not_packed_or_not_float32_goes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    decoded(random_model(OLMOE), random_tokens(2, 8))
    decoded(quantized(OLMOE).to(torch.bfloat16), random_tokens(2, 8))
    decoded(quantized(OLMOE), random_tokens(FEW_TOKENS + 1, 8))
    assert calls.number == 0
    partly = random_model(OLMOE)
    kinds = make_quantization("int4", OLMOE)
    quantize_model(partly, replace(kinds, formats={"experts": "int4"}))
    decoded(partly, random_tokens(2, 8))
    assert calls.number == 0


def test_whoever_records_the_routing_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantized(OLMOE), random_tokens(1, 8)
    calls = Calls(monkeypatch)
    expected = decoded(model, tokens)
    with record_routing(model) as trace:
        assert torch.equal(decoded(model, tokens), expected)
    assert calls.number == 4 * OLMOE.num_hidden_layers
    assert all(sum(routing.num_tokens for routing in layer.routings) == 8 for layer in trace)


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


def test_the_cache_holds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = quantized(OLMOE), random_tokens(2, 6)
    caches = []
    for allowed in (True, False):
        with monkeypatch.context() as patch, torch.no_grad():
            Calls(patch, allowed=allowed)
            kv = KVCache(OLMOE, batch_size=2, capacity=9, dtype=torch.float32)
            for step in tokens.split(1, dim=1):
                model(step, kv=kv)
        caches.append(kv)
    assert torch.equal(caches[0].keys[..., :6, :], caches[1].keys[..., :6, :])
    assert torch.equal(caches[0].values[..., :6, :], caches[1].values[..., :6, :])


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
