"""Models whose keys and values lie in blocks: they compute what the whole text gives, whoever else is computed too."""

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.config import ModelConfig, MoEConfig, RopeScaling
from moesaic.errors import MoesaicError
from moesaic.model.kv_cache import KVCache
from moesaic.model.paged_kv import NewTokens, PagedKV, kv_block_bytes, kv_dtype
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.ops import Routing, instruction_set
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native_step import BLOCK_TOKENS

from .paged import alone, paged_logits, random_passes, unwritten
from .test_block_step import SERVED
from .test_quantize import BASE, EXPERTS, LATENT, random_model

# All experts of a token are used, so that no rounding chooses others.
ALL = MoEConfig(num_experts=3, num_experts_per_tok=3, moe_intermediate_size=40)
LATENT_BASE: dict[str, Any] = {**BASE, "num_key_value_heads": 4, "qk_norm": "none", "mla": LATENT}
ORIGINAL = 40
CONFIGS = {
    "heads normalised": ModelConfig(**BASE, moe=ALL),
    "width normalised, clipped": ModelConfig(**BASE, qk_norm="width", clip_qkv=0.9, moe=ALL),
    "width normalised": ModelConfig(**BASE, qk_norm="width", moe=ALL),
    "clipped": ModelConfig(**BASE, qk_norm="none", clip_qkv=0.7, norm="layer", moe=ALL),
    "normalised after RoPE": ModelConfig(**BASE, qk_norm="head_after_rope", partial_rotary_factor=0.5, moe=ALL),
    "llama4": ModelConfig(
        **BASE,
        qk_norm="l2_after_rope",
        layer_types=("chunked_attention", "full_attention", "chunked_attention"),
        attention_chunk_size=24,
        nope_layers=(1,),
        attn_scale=0.4,
        floor_scale=8,
        rope_interleaved=True,
        moe=replace(ALL, router="topk_sigmoid_input", n_shared_experts=1),
    ),
    "gpt_oss": ModelConfig(
        **BASE,
        qk_norm="none",
        attention_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=18,
        rope_scaling=RopeScaling(rope_type="yarn", factor=8.0, original_max_position_embeddings=ORIGINAL),
        moe=replace(ALL, router="topk_softmax", router_bias=True, activation="clamped_swiglu", projection_bias=True),
    ),
    "no RoPE first": ModelConfig(**BASE, nope_layers=(0, 2), moe=ALL),
    "no RoPE, growing queries": ModelConfig(**BASE, nope_layers=(1,), attn_scale=0.4, floor_scale=8, moe=ALL),
    "latents": ModelConfig(
        **LATENT_BASE, moe=replace(ALL, router="sigmoid_topk", n_shared_experts=1, first_k_dense_replace=1)
    ),
    "latents, all else": ModelConfig(
        **LATENT_BASE,
        attention_sinks=True,
        layer_types=("sliding_attention", "full_attention", "chunked_attention"),
        sliding_window=18,
        attention_chunk_size=24,
        nope_layers=(1,),
        attn_scale=0.4,
        floor_scale=8,
    ),
    "dense, after": ModelConfig(**BASE, mlp_bias=True, norm_placement="post"),
    "tied": ModelConfig(
        **BASE, tie_word_embeddings=True, residual_multiplier=0.4, embedding_multiplier=3.0, logits_scaling=2.0, moe=ALL
    ),
    "dynamic": ModelConfig(
        **BASE,
        rope_scaling=RopeScaling(rope_type="dynamic", factor=3.0, original_max_position_embeddings=ORIGINAL),
        moe=ALL,
    ),
    "longrope": ModelConfig(
        **BASE,
        rope_scaling=RopeScaling(
            rope_type="longrope",
            factor=4.0,
            original_max_position_embeddings=ORIGINAL,
            short_factor=(1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0),
            long_factor=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0),
        ),
        moe=ALL,
    ),
}
BY_LENGTH = ("dynamic", "longrope")
# By the torch path keys and values are of the model's type; the kernels attend in float32. What the roundings of
# bfloat16 come to depends on the model drawn: what they may come to is measured on the same model without blocks.
WAYS = {"torch, float64": (False, torch.float64, 1e-9), "float64": (True, torch.float64, 1e-4),
        "float32": (True, torch.float32, 1e-3), "torch, float32": (False, torch.float32, 1e-3),
        "bfloat16": (True, torch.bfloat16, None)}  # fmt: skip


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_set, "_load_native", lambda: (None, "not built"))


def random_texts(*lengths: int) -> list[Tensor]:
    return [torch.randint(BASE["vocab_size"], (length,)) for length in lengths]


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert distance(got, expected) < tolerance


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_text(request: pytest.FixtureRequest, name: str, way: str) -> None:
    with_kernels, dtype, tolerance = WAYS[way]
    if not with_kernels:
        request.getfixturevalue("without_kernels")
    elif native_module() is None:
        pytest.skip("the kernels are not built here")
    model = random_model(CONFIGS[name]).to(dtype)
    texts = random_texts(random.randint(70, 120), random.randint(1, 60), 33)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = torch.cat([wide(text[None])[0] for text in texts])
        if tolerance is None:
            tolerance = 1.5 * distance(torch.cat([model(text[None])[0] for text in texts]), expected)
    assert 0.1 < expected.std() < 100
    lengths = [len(text) for text in texts]
    together = [[(number, 0, length) for number, length in enumerate(lengths)]]
    for passes in (together, random_passes(lengths, 40)):
        got = torch.cat(paged_logits(model, texts, passes))
        assert got.dtype == dtype
        assert_close(got, expected, tolerance)


@pytest.mark.parametrize("prompt", [1, 25, ORIGINAL + 7])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_what_stretches_with_the_text_was_stretched_as_for_its_prompt(
    without_kernels: None, name: str, prompt: int
) -> None:
    """However it is cut: prompt tokens see a text of the prompt's length, later ones a text that ends with them."""
    model = random_model(CONFIGS[name]).double()
    text, other = random_texts(prompt + 42, 50)
    kv = KVCache(model.config, batch_size=1, capacity=len(text), dtype=torch.float64)
    with torch.no_grad():
        parts = [model(part[None], kv=kv)[0] for part in text.split([prompt, *[1] * (len(text) - prompt)])]
    expected = torch.cat(parts)
    passes = random_passes([len(text), len(other)], 30)
    got = paged_logits(model, (text, other), passes, prompt_lengths=(prompt, random.randint(0, 50)))[0]
    assert_close(got, expected, 1e-9)
    whole = paged_logits(model, (text,), [[(0, 0, len(text))]], prompt_lengths=(prompt,))[0]
    assert_close(whole, expected, 1e-9)
    if prompt <= ORIGINAL:  # these tokens see another text than that of the prompt
        another = paged_logits(model, (text,), [[(0, 0, len(text))]])[0]
        assert (another - expected).norm() > 1e-3 * expected.norm()


needs_kernels = pytest.mark.skipif(native_module() is None, reason="the kernels are not built here")


@needs_kernels
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", [*SERVED, *BY_LENGTH])
def test_packed_models_give_the_same_bits_in_any_company(name: str, scheme: str) -> None:
    config = SERVED.get(name) or replace(CONFIGS[name], moe=MoEConfig(**EXPERTS))
    model = random_model(config)
    quantize_model(model, make_quantization(scheme, config))
    texts = random_texts(100, random.randint(1, 80), 33, 64)
    lengths, prompts = [len(text) for text in texts], [random.randint(0, len(text)) for text in texts]
    expected = paged_logits(model, texts, alone(texts), prompts)
    assert all(each.isfinite().all() for each in expected)
    for passes in (random_passes(lengths, 5), random_passes(lengths, 70)):
        assert all(map(torch.equal, paged_logits(model, texts, passes, prompts), expected))


@needs_kernels
def test_nothing_of_a_sequence_without_finite_numbers_reaches_others() -> None:
    model = random_model(SERVED["qwen3_moe"])
    quantize_model(model, make_quantization("int8", model.config))
    texts = random_texts(40, 40)
    texts[0], texts[1] = texts[0].clamp_min(1), torch.zeros_like(texts[1])
    expected = paged_logits(model, texts[:1], alone(texts[:1]))
    with torch.no_grad():
        model.embed_tokens.weight[0] = math.nan
    got = paged_logits(model, texts, random_passes([40, 40], 30))
    assert got[1].isnan().all()
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", ["heads normalised", "latents"])
def test_blocks_that_texts_begin_with_alike_serve_them_all(
    request: pytest.FixtureRequest, name: str, kernels: bool
) -> None:
    if not kernels:
        request.getfixturevalue("without_kernels")
    model = random_model(CONFIGS[name])
    first, second = random_texts(80, 90)
    second[: 2 * BLOCK_TOKENS] = first[: 2 * BLOCK_TOKENS]
    kv = unwritten(model.config, 6, torch.float32)
    with torch.no_grad():
        expected = model(second[None])[0, 2 * BLOCK_TOKENS :]
        model(first[None], kv=kv.batch([NewTokens([4, 0, 2], 0, 80)]))
        parts = [NewTokens([4, 0, 2, 3], 80, 1), NewTokens([4, 0, 5], 64, 26)]
        got = model(torch.cat((first[:1], second[64:]))[None], kv=kv.batch(parts))[0, 1:]
    assert_close(got, expected, 1e-3)


def test_a_pass_gives_the_routing_of_its_tokens_and_the_logits_that_are_wanted() -> None:
    model, texts = random_model(CONFIGS["heads normalised"]), random_texts(40, 7)
    kv = unwritten(model.config, 3, torch.float32)
    tokens, routings = torch.cat(texts)[None], list[Routing]()
    batch = kv.batch([NewTokens([2, 0], 0, 40), NewTokens([1], 0, 7)])
    with torch.no_grad():
        some = model(tokens, kv=batch, routings=routings, logits_to_keep=torch.tensor([39, 46]))
        assert_close(some, model(tokens, kv=batch)[:, [39, 46]], 1e-6)
    assert [routing.num_tokens for routing in routings] == [47] * 3
    assert batch.first_tokens.tolist() == [0, 40, 47]
    assert batch.positions.tolist() == [[*range(40), *range(7)]]


@pytest.mark.parametrize(
    "sequence",
    [
        NewTokens([0, 1], 0, 0),
        NewTokens([0, 1], 0, -1),
        NewTokens([0, 1], -1, 3),
        NewTokens([0, 1], 60, 5),
        NewTokens([0, 1], 64, 1),
        NewTokens([], 0, 1),
        NewTokens([0, 3], 0, 40),
        NewTokens([0, -1], 0, 40),
    ],
)
def test_blocks_that_are_not_there_are_refused(sequence: NewTokens) -> None:
    kv = PagedKV(CONFIGS["tied"], 3, torch.float32, torch.device("cpu"))
    fine = NewTokens([0, 1], 60, 4)
    kv.batch([fine])
    with pytest.raises(MoesaicError, match=f"{sequence.new} new tokens after {sequence.past} do not fit"):
        kv.batch([fine, sequence])


def test_a_pass_over_nothing_is_refused() -> None:
    kv = PagedKV(CONFIGS["tied"], 3, torch.float32, torch.device("cpu"))
    with pytest.raises(MoesaicError, match="no sequence"):
        kv.batch([])


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("name", ["tied", "no RoPE first", "latents"])
@torch.no_grad()
def test_tokens_of_another_number_than_the_sequences_say_are_refused(name: str, count: int) -> None:
    model = random_model(CONFIGS[name])
    kv = unwritten(model.config, 2, torch.float32)
    batch = kv.batch([NewTokens([0], 0, 3), NewTokens([1], 0, 2)])
    with pytest.raises(MoesaicError, match=rf"tokens are \(1, {count}\), and the sequences have 5 new ones"):
        model(random_texts(count)[0][None], kv=batch)
    with pytest.raises(MoesaicError, match="positions"):
        model(random_texts(5)[0][None], torch.arange(5)[None], kv=batch)
    assert kv.keys.isnan().all()


def test_models_that_blocks_do_not_serve_are_refused() -> None:
    base = CONFIGS["tied"]
    for config in (replace(base, depth_layers=(1,)), replace(base, moe=replace(ALL, router="soft"))):
        with pytest.raises(MoesaicError, match="which blocks do not remember"):
            PagedKV(config, 3, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["heads normalised", "latents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_blocks_take_the_bytes_that_they_are_said_to(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    cpu = torch.device("cpu")
    for there in (True, False):
        with monkeypatch.context() as patch:
            if not there:
                patch.setattr(instruction_set, "_load_native", lambda: (None, "not built"))
            kv = PagedKV(CONFIGS[name], 5, dtype, cpu)
            assert kv.keys.dtype == kv_dtype(dtype, cpu)
            assert kv.keys.nbytes + kv.values.nbytes == 5 * kv_block_bytes(CONFIGS[name], dtype, cpu)
            if native_module() is None:
                assert kv.keys.dtype == dtype
