"""A model with packed weights: which of its weights, how close it stays, and that nothing else changes."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.config import MLAConfig, ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model import quantize
from moesaic.model.kv_cache import KVCache
from moesaic.model.quantize import (
    HOT_KIND,
    KINDS,
    Quantization,
    is_quantized,
    make_quantization,
    packed_weights,
    quantize_model,
)
from moesaic.model.transformer import Transformer
from moesaic.ops import native_packed
from moesaic.ops.quantize import unpack

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 104, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = MLAConfig(kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20)
CONFIGS = {
    "qwen3_moe": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS)),
    "mixtral, tied": ModelConfig(**BASE, qk_norm="none", tie_word_embeddings=True, moe=MoEConfig(**EXPERTS)),
    "deepseek_v3": ModelConfig(
        **{**BASE, "num_key_value_heads": 4}, mla=LATENT, qk_norm="none",
        moe=MoEConfig(**EXPERTS, router="sigmoid_topk", n_shared_experts=2, first_k_dense_replace=1),
    ),
    "gpt_oss": ModelConfig(
        **BASE, qk_norm="none", attention_bias=True, attention_output_bias=True, attention_sinks=True,
        moe=MoEConfig(**EXPERTS, router="topk_softmax", router_bias=True, activation="clamped_swiglu",
                      projection_bias=True),
    ),
    "soft": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, router="soft", slots_per_expert=2)),
    "llama4": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, router="topk_sigmoid_input", n_shared_experts=1)),
    "free experts": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, num_zero_experts=1, num_constant_experts=2)),
    "tokens pass by": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS), depth_layers=(1,)),
    "dense": ModelConfig(**BASE, mlp_bias=True),
}  # fmt: skip


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    model.init_weights(seed=int(torch.randint(2**31, ())))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or name.endswith("sinks"):
                parameter.normal_(0.0, 0.1)
    return model


def unpacked(model: Transformer, packed: Transformer) -> Transformer:
    """The plain model, its weights as the packed one has them."""
    twin = copy.deepcopy(model)
    if any(name == "lm_head.weight" for _, name, _ in packed_weights(packed)) and not hasattr(twin, "lm_head"):
        twin.lm_head = torch.nn.Linear(twin.config.hidden_size, twin.config.vocab_size, bias=False)
    state = twin.state_dict() | {name: unpack(weight, torch.float64) for _, name, weight in packed_weights(packed)}
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def log_probabilities(model: Transformer, tokens: Tensor, **arguments: Any) -> Tensor:
    return model(tokens, **arguments).log_softmax(-1)


def decoded(model: Transformer, tokens: Tensor) -> Tensor:
    """As `log_probabilities`, with a cache, the last tokens one by one."""
    kv = KVCache(model.config, batch_size=1, capacity=tokens.shape[1], dtype=model.embed_tokens.weight.dtype)
    parts = [tokens[:, :12], *tokens[:, 12:].split(1, dim=1)]
    return torch.cat([log_probabilities(model, part, kv=kv) for part in parts], 1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models in float64, and no kernels: then inputs are not rounded, and equal weights give equal results."""
    monkeypatch.setattr(native_packed, "native_module", lambda: None)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_what_its_unpacked_weights_compute(exact: None, name: str, scheme: str) -> None:
    config = CONFIGS[name]
    model, tokens = random_model(config), torch.randint(0, 97, (2, 30))
    plain_state = {key: value.clone() for key, value in model.state_dict().items()}
    packed = copy.deepcopy(model)
    quantization = make_quantization(scheme, config)
    quantize_model(packed, quantization)
    assert is_quantized(packed)
    assert not is_quantized(model)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    by_name = {key: (kind, weight) for kind, key, weight in packed_weights(packed)}
    for kind, weight in by_name.values():
        assert weight.format == quantization.formats[kind]
    for key, value in packed.state_dict().items():
        if key in by_name:
            assert value.dtype == torch.uint8
        else:
            assert torch.equal(value, plain_state[key])
    matrices = {key for key, value in packed.state_dict().items() if value.ndim > 1 and value.dtype != torch.uint8}
    kept = ("embed_tokens.weight", "router.weight", "kv_b_proj.weight", "_bias", "free_experts.mix", ".constants")
    assert all(key.endswith(kept) for key in matrices), matrices
    expected, found = log_probabilities(unpacked(model, packed), tokens), log_probabilities(packed, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("soft", "tokens pass by")])
def test_decoding_gives_what_the_whole_text_gives(exact: None, name: str) -> None:
    model, tokens = random_model(CONFIGS[name]), torch.randint(0, 97, (1, 20))
    quantize_model(model, make_quantization("int4", CONFIGS[name]))
    torch.testing.assert_close(decoded(model, tokens), log_probabilities(model, tokens), rtol=0, atol=1e-8)


def test_a_trained_model_says_nearly_the_same() -> None:
    """As the kernels compute it; on text with a pattern that the model has learnt."""
    model = random_model(replace(CONFIGS["qwen3_moe"], initializer_range=0.0)).train()
    for layer in model.moe_layers:
        layer.experts.backend = "reference"
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        tokens = some_text(16)
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6 * math.log(97)
    model.eval()
    text = some_text(8)
    before = log_probabilities(model, text)
    for scheme, largest_divergence in (("int8", 0.01), ("int4", 0.04)):
        for dtype, largest_difference in ((torch.float32, 0.01), (torch.bfloat16, 0.3)):
            packed = copy.deepcopy(model).to(dtype)
            quantize_model(packed, make_quantization(scheme, model.config))
            for layer in packed.moe_layers:
                layer.experts.backend = "auto"
            after = log_probabilities(packed, text)
            assert (before.exp() * (before - after.float())).sum(-1).mean() < largest_divergence
            assert (after[:1] - decoded(packed, text[:1])).abs().amax(-1).median() < largest_difference


def some_text(count: int) -> Tensor:
    """Sequences (count, 30) in which each token follows from the one before, most of the time."""
    tokens = [torch.randint(0, 97, (count,))]
    for _ in range(29):
        tokens.append(torch.where(torch.rand(count) < 0.1, torch.randint(0, 97, (count,)), (5 * tokens[-1] + 3) % 97))
    return torch.stack(tokens, 1)


def test_which_weights_are_packed() -> None:
    config = CONFIGS["deepseek_v3"]
    model = random_model(config)
    quantize_model(model, make_quantization("int4", config, group_size=64))
    kinds: dict[str, set[str]] = {}
    for kind, name, weight in packed_weights(model):
        kinds.setdefault(kind, set()).add(name)
        assert weight.group_size == 64
    assert set(kinds) == set(KINDS) - {HOT_KIND}
    assert kinds["lm_head"] == {"lm_head.weight"}
    assert kinds["mlp"] == {f"layers.0.feed_forward.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    assert kinds["experts"] == {
        f"layers.{i}.feed_forward.experts.{leaf}" for i in (1, 2) for leaf in ("gate_up", "down")
    }
    shared = ("gate", "up", "down")
    assert kinds["shared_experts"] == {
        f"layers.{i}.feed_forward.shared_experts.{leaf}_proj.weight" for i in (1, 2) for leaf in shared
    }
    assert kinds["attention"] == {
        f"layers.{i}.attention.{leaf}.weight"
        for i in range(3)
        for leaf in ("q_a_proj", "q_b_proj", "kv_a_proj", "o_proj")
    }


def test_a_dense_model_takes_four_bits_where_its_weights_are() -> None:
    formats = make_quantization("int4", CONFIGS["dense"]).formats
    assert formats == {"mlp": "int4", "attention": "int8", "lm_head": "int4"}
    assert make_quantization("int4", CONFIGS["qwen3_moe"]).formats["mlp"] == "int8"
    with pytest.raises(UsageError, match="mxfp4 packs experts, and this model has none"):
        make_quantization("mxfp4", CONFIGS["dense"])


def test_a_packed_model_is_made_without_memory_too() -> None:
    config = CONFIGS["mixtral, tied"]
    with torch.device("meta"):
        empty = Transformer(config)
    quantize_model(empty, make_quantization("int8", config))
    model = random_model(config)
    quantize_model(model, make_quantization("int8", config))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    assert "lm_head.weight" in shapes
    empty.load_state_dict(model.state_dict(), assign=True)
    tokens = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        assert torch.equal(empty.eval()(tokens), model.eval()(tokens))


def test_what_cannot_be_is_refused() -> None:
    config = CONFIGS["qwen3_moe"]
    for call, message in (
        (lambda: make_quantization("int3", config), "quantization 'int3' is not known; choose int8, int4, mxfp4"),
        (lambda: make_quantization("int4", config, 16), "group size 16 is not possible with int4; choose 32 or 64"),
        (lambda: Quantization("int4", 32, {"router": "int8"}), "weights of kind 'router' are not known"),
        (lambda: Quantization("int4", 32, {"experts": "int3"}), "weight format 'int3' is not known"),
        (lambda: Quantization("best", 32, {"experts": "int8"}), "quantization 'best' is not known"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            call()
    model = random_model(config)
    quantize_model(model, make_quantization("int8", config))
    with pytest.raises(UsageError, match="quantised already"):
        quantize_model(model, make_quantization("int8", config))
    broken = random_model(config)
    with torch.no_grad():
        broken.get_parameter("layers.1.attention.k_proj.weight")[3, 4] = torch.nan
    with pytest.raises(MoesaicError, match=r"layers\.1\.attention\.k_proj: it holds numbers that are not finite"):
        quantize_model(broken, make_quantization("int8", config))
    ours = replace(config, moe=replace(config.moe, num_experts=6)) if config.moe else config
    with pytest.raises(MoesaicError, match=r"feed_forward\.experts: its numbers are not of the form mxfp4"):
        quantize_model(random_model(ours), make_quantization("mxfp4", ours))


def test_other_backends_refuse_packed_weights_by_name() -> None:
    config = CONFIGS["qwen3_moe"]
    model = Transformer(config, backend="grouped").eval()
    model.init_weights(0)
    quantize_model(model, make_quantization("int4", config))
    with pytest.raises(UsageError, match="takes plain weights, not int4; use packed or reference"):
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert quantize.SCHEMES["int4"]["experts"] == "int4"
