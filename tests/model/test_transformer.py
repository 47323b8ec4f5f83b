"""The whole decoder: KV cache, padding, checkpointing, construction. B sequences, L positions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.attention_context import make_attention_context
from moesaic.model.kv_cache import KVCache
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing

SPARSE = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    initializer_range=0.2,
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        router="sigmoid_topk",
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
    ),
)
CONFIGS = {
    "sparse": SPARSE,
    "softmax": replace(SPARSE, moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "free experts": replace(
        SPARSE,
        moe=MoEConfig(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            num_zero_experts=1,
            num_copy_experts=1,
            num_constant_experts=2,
        ),
    ),
    "dense, tied": replace(SPARSE, moe=None, tie_word_embeddings=True),
    "no QK-norm, biases, partial RoPE": replace(SPARSE, qk_norm="none", attention_bias=True, partial_rotary_factor=0.5),
    "sliding, sinks, yarn": replace(
        SPARSE,
        qk_norm="none",
        attention_sinks=True,
        sliding_window=4,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    ),
    "chunked, layers without RoPE": replace(
        SPARSE,
        qk_norm="l2_after_rope",
        rope_interleaved=True,
        attention_chunk_size=4,
        layer_types=("chunked_attention", "full_attention", "chunked_attention"),
        nope_layers=(1,),
        attn_scale=0.3,
        floor_scale=4,
    ),
    "norms after, width QK-norm, clamped": replace(SPARSE, norm_placement="post", qk_norm="width", clip_qkv=1.5),
    "multipliers, LayerNorm, biases": replace(
        SPARSE,
        norm="layer",
        norm_bias=True,
        lm_head_bias=True,
        mlp_bias=True,
        attention_output_bias=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.4,
        logits_scaling=2.5,
    ),
    "latent": replace(
        SPARSE,
        qk_norm="none",
        rope_interleaved=True,
        num_key_value_heads=4,
        mla=MLAConfig(kv_lora_rank=12, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=10),
    ),
}


def build(config: ModelConfig, backend: str = "auto") -> Transformer:
    model = Transformer(config, backend)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    return model


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, SPARSE.vocab_size, (batch, length))


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_the_cache_equals_the_full_forward_pass(name: str) -> None:
    model, tokens = build(CONFIGS[name]), random_tokens(2, 14)
    full = model(tokens)
    kv = KVCache(model.config, batch_size=2, capacity=14)
    parts = [model(tokens[:, :6], kv=kv), model(tokens[:, 6:9], kv=kv)]
    parts += [model(tokens[:, index : index + 1], kv=kv) for index in range(9, 14)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_changes_no_logit_also_while_decoding(name: str) -> None:
    model, tokens = build(CONFIGS[name]), random_tokens(2, 10)
    positions = torch.stack([torch.cat([torch.full((3,), -1), torch.arange(7)]), torch.arange(10)])
    alone = model(tokens[:1, 3:])
    torch.testing.assert_close(model(tokens, positions)[:1, 3:], alone, rtol=1e-4, atol=1e-4)
    kv = KVCache(model.config, batch_size=2, capacity=11)
    model(tokens, positions, kv)
    following = random_tokens(2, 1)
    expected = model(torch.cat([tokens[:1, 3:], following[:1]], 1))[:, -1]
    torch.testing.assert_close(model(following, kv=kv)[:1, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_residual_stream_is_put_together_as_the_config_says(placement: str, norm: str) -> None:
    config = replace(
        CONFIGS["multipliers, LayerNorm, biases"], moe=None, norm=norm, norm_bias=norm == "layer",
        norm_placement=placement,
    )  # fmt: skip
    model, tokens = build(config), random_tokens(2, 6)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def normalized(x: Tensor, name: str) -> Tensor:
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        out = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]
        return out + weights[f"{name}.bias"] if norm == "layer" else out

    def feed_forward(x: Tensor, prefix: str) -> Tensor:
        gate, up = (
            x @ weights[f"{prefix}.{part}_proj.weight"].T + weights[f"{prefix}.{part}_proj.bias"]
            for part in ("gate", "up")
        )
        hidden = functional.silu(gate) * up
        return hidden @ weights[f"{prefix}.down_proj.weight"].T + weights[f"{prefix}.down_proj.bias"]

    context = make_attention_context(config, torch.arange(6).expand(2, 6), None, plainly_causal=True)
    x = weights["embed_tokens.weight"][tokens] * 3.0
    for index, block in enumerate(model.blocks):
        for part in ("attention", "feed_forward"):
            name = f"layers.{index}.{part}"
            source = normalized(x, f"{name}_norm") if placement == "pre" else x
            is_attention = part == "attention"
            update = block.attention(source.float(), context) if is_attention else feed_forward(source, name)
            x = x + 0.4 * (normalized(update.double(), f"{name}_norm") if placement == "post" else update)
    expected = (normalized(x, "norm") @ weights["lm_head.weight"].T + weights["lm_head.bias"]) / 2.5
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-3, atol=1e-3)


def test_padding_is_not_routed() -> None:
    model, tokens, routings = build(SPARSE), random_tokens(2, 10), list[Routing]()
    positions = torch.stack([torch.cat([torch.full((4,), -1), torch.arange(6)]), torch.arange(10)])
    model(tokens, positions, routings=routings)
    assert [int(routing.tokens_per_expert().sum()) for routing in routings] == [16 * 2] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_of_padding_alone_disturbs_nothing(name: str) -> None:
    model, tokens = build(CONFIGS[name]), random_tokens(2, 6)
    positions = torch.stack([torch.full((6,), -1), torch.arange(6)])
    logits = model(tokens, positions)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(tokens[1:]), rtol=1e-4, atol=1e-4)


def test_no_token_sees_what_comes_after_it() -> None:
    model, tokens = build(SPARSE), random_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SPARSE.vocab_size
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7])


@pytest.mark.parametrize("name", CONFIGS)
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, tokens = build(CONFIGS[name]), random_tokens(3, 9)
    expected = gradients(model, tokens)
    assert set(expected) == {key for key, _ in model.named_parameters()}
    model.activation_checkpointing = True
    assert all(torch.equal(expected[key], grad) for key, grad in gradients(model, tokens).items())


def test_activation_checkpointing_counts_the_load_once() -> None:
    model, tokens = build(SPARSE), random_tokens(3, 9)
    model.activation_checkpointing = True
    routings: list[Routing] = []
    model(tokens, routings=routings).sum().backward()
    assert [int(routing.tokens_per_expert().sum()) for routing in routings] == [27 * 2] * 2


def test_recomputation_keeps_the_experts_that_the_forward_pass_chose() -> None:
    """Moving the selection bias between forward and backward changes no gradient: the choice is replayed."""
    model, tokens = build(SPARSE), random_tokens(3, 9)
    expected = gradients(model, tokens)
    model.activation_checkpointing = True
    model.zero_grad()
    loss = model(tokens).square().mean()
    for layer in model.moe_layers:
        assert layer.router.expert_bias is not None
        layer.router.expert_bias.copy_(torch.randn(8))
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_replayed_pass_chooses_what_was_recorded_and_weighs_it_anew() -> None:
    model, tokens, recorded = build(SPARSE), random_tokens(2, 10), list[Routing]()
    positions = torch.stack([torch.cat([torch.full((4,), -1), torch.arange(6)]), torch.arange(10)])
    first = model(tokens, positions, routings=recorded)
    replayed = list[Routing]()
    torch.testing.assert_close(model(tokens, positions, replay=recorded, routings=replayed), first, rtol=0, atol=0)
    for layer in model.moe_layers:
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter)
    again = list[Routing]()
    model(tokens, positions, replay=recorded, routings=again)
    for before, after in zip(recorded, again, strict=True):
        assert torch.equal(before.token_ids, after.token_ids)
        assert torch.equal(before.expert_ids, after.expert_ids)
        weights_TE = after.logits.sigmoid()
        weights_TK = weights_TE[after.token_ids, after.expert_ids].view(-1, 2)
        expected_N = 2.0 * (weights_TK / weights_TK.sum(1, keepdim=True)).flatten()
        torch.testing.assert_close(after.weights, expected_N, rtol=1e-4, atol=1e-5)


def test_a_recorded_routing_of_other_tokens_or_layers_is_refused() -> None:
    model, recorded = build(SPARSE), list[Routing]()
    model(random_tokens(2, 10), routings=recorded)
    with pytest.raises(UsageError, match="has 2 layers of 20 tokens, and this pass 2 layers of 22"):
        model(random_tokens(2, 11), replay=recorded)
    with pytest.raises(UsageError, match="has 1 layers of 20 tokens, and this pass 2 layers"):
        model(random_tokens(2, 10), replay=recorded[:1])


def test_noise_belongs_to_the_sequence_its_key_and_the_layer() -> None:
    config = replace(
        SPARSE, moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, router="noisy_topk")
    )
    model, tokens, keys = build(config, "reference").double(), random_tokens(3, 10), torch.randint(0, 2**62, (3,))
    recorded: list[Routing] = []
    whole = model(tokens, noise_keys=keys, routings=recorded)
    positions = torch.cat([torch.full((3, 2), -1), torch.arange(10).expand(3, 10)], 1)
    padded = model(torch.cat([random_tokens(3, 2), tokens], 1), positions, noise_keys=keys)
    torch.testing.assert_close(padded[:, 2:], whole, rtol=1e-9, atol=1e-9)
    cut = torch.cat([model(tokens[index : index + 1], noise_keys=keys[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(tokens, noise_keys=keys + 1), whole)
    assert torch.equal(model.eval()(tokens, noise_keys=keys), model(tokens, noise_keys=keys + 1))


def test_backends_agree_on_the_gradients_of_a_whole_model() -> None:
    model, tokens = build(SPARSE, "grouped"), random_tokens(3, 9)
    oracle = Transformer(SPARSE, "reference").double()
    oracle.load_state_dict(model.state_dict())
    for name, grad in gradients(oracle, tokens).items():
        torch.testing.assert_close(gradients(model, tokens)[name].double(), grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_meta_device_takes_no_memory_and_two_models_live_side_by_side() -> None:
    huge = replace(SPARSE, vocab_size=10**6, hidden_size=8192, num_hidden_layers=4)
    with torch.device("meta"):
        model = Transformer(huge)
    assert all(parameter.is_meta for parameter in model.parameters())
    first, second, tokens = build(SPARSE, "grouped"), build(CONFIGS["softmax"], "reference"), random_tokens(1, 5)
    before = first(tokens)
    second(tokens)
    assert torch.equal(first(tokens), before)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, second, third = (Transformer(SPARSE) for _ in range(3))
    first.init_weights(3)
    torch.rand(5)
    second.init_weights(3)
    third.init_weights(4)
    states = [model.state_dict() for model in (first, second, third)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


def test_logits_to_keep_are_the_last_ones() -> None:
    model, tokens = build(SPARSE), random_tokens(2, 8)
    torch.testing.assert_close(model(tokens, logits_to_keep=2), model(tokens)[:, -2:])


def test_a_full_cache_names_its_capacity() -> None:
    model, tokens = build(SPARSE), random_tokens(1, 8)
    with pytest.raises(MoesaicError, match="holds 7 tokens and 8 are needed"):
        model(tokens, kv=KVCache(SPARSE, batch_size=1, capacity=7))


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="unknown backend 'fast'"):
        build(CONFIGS["dense, tied"], "fast")


def test_positions_of_another_shape_are_refused() -> None:
    model, tokens = build(SPARSE), random_tokens(2, 4)
    with pytest.raises(UsageError, match=r"positions are \(1, 4\), and tokens \(2, 4\)"):
        model(tokens, torch.arange(4).unsqueeze(0))
