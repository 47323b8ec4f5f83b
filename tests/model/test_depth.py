"""Mixture of depths against a loop over sequences, and what must not change it.

B sequences, L positions, T = B x L tokens, D hidden size, P picked tokens of a sequence.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import MLAConfig, ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.attention_context import make_attention_context
from moesaic.model.block import Block
from moesaic.model.depth import DepthBlock, DepthRouter, depth_loss
from moesaic.model.initialize import initialize
from moesaic.model.kv_cache import KVCache
from moesaic.model.routing_context import RoutingContext
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing

B, L, D, V = 3, 12, 16, 30
DENSE = ModelConfig(
    vocab_size=V, hidden_size=D, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=20, initializer_range=0.3, depth_layers=(0, 2), depth_capacity=0.4,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
CAUSAL = {
    "dense": DENSE,
    "experts with a capacity": replace(DENSE, moe=replace(MOE, capacity_factor=0.6)),
    "experts without room for padding": replace(DENSE, moe=replace(MOE, capacity_factor=0.8, drop_policy="pad")),
    "noise, free experts": replace(DENSE, moe=replace(MOE, router="noisy_topk", num_copy_experts=2)),
    "every token, norms after": replace(DENSE, depth_capacity=1.0, norm_placement="post", residual_multiplier=0.5),
    "sliding, sinks, layers without RoPE": replace(
        DENSE, sliding_window=4, attention_sinks=True, nope_layers=(0,), attn_scale=0.4, floor_scale=3,
        layer_types=("full_attention", "full_attention", "sliding_attention"),
    ),
    "latent": replace(
        DENSE, num_key_value_heads=2, qk_norm="none",
        mla=MLAConfig(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=5),
    ),
}  # fmt: skip
CONFIGS = {
    **CAUSAL,
    "expert choice": replace(DENSE, moe=replace(MOE, router="expert_choice")),
    "soft": replace(DENSE, moe=replace(MOE, router="soft", slots_per_expert=2)),
}


def build(config: ModelConfig) -> Transformer:
    """In float64, with router weights that pick and leave about half of the tokens."""
    model = Transformer(config, "reference")
    model.init_weights(int(torch.randint(0, 2**31, ())))
    return model.double()


def random_tokens(batch: int = B, length: int = L) -> Tensor:
    """No token twice in a sequence: where one follows on itself alone, both get the same from attention, but for the
    last bit, and that would decide which of the two is picked."""
    return torch.stack([torch.randperm(V)[:length] for _ in range(batch)])


def random_keys(batch: int = B) -> Tensor:
    return torch.randint(0, 2**62, (batch,))


def ragged_positions() -> Tensor:
    """(B, L): padding on the left, on the right, and none."""
    left, right = (int(value) for value in torch.randint(1, L - 2, (2,)))
    return torch.stack((
        torch.cat((torch.full((left,), -1), torch.arange(L - left))),
        torch.cat((torch.arange(L - right), torch.full((right,), -1))),
        torch.arange(L),
    ))  # fmt: skip


def picks(logits: list[float], real: list[int], capacity: float | None) -> list[int]:
    """The paper's choice in training; without a capacity that of evaluation."""
    if capacity is None:
        return [place for place in real if logits[place] > 0]
    count = math.ceil(round(capacity * len(real), 6))
    return sorted(sorted(real, key=lambda place: -logits[place])[:count])


def definition(
    block: DepthBlock, x: Tensor, positions: Tensor, seen: RoutingContext
) -> tuple[Tensor, Tensor, list[tuple[int, list[int], Routing | None]]]:
    """One sequence after the other, each through a plain block that holds the picked tokens alone.

    Returns the output, the depth loss, and for each sequence its picked places and the experts' routing of these.
    """
    out, loss, found = x.clone(), x.new_zeros(()), []
    for sequence in range(B):
        real = [place for place in range(L) if positions[sequence, place] >= 0]
        logits_L = x[sequence] @ block.router.weight[0]
        capacity = block.config.depth_capacity if block.training else None
        chosen = picks(logits_L.tolist(), real, capacity)
        for place in real:
            probability = 1 / (1 + torch.exp(-logits_L[place]))
            loss = loss - torch.log(probability if place in chosen else 1 - probability)
        if not chosen:
            continue
        assert seen.noise_keys is not None
        context = make_attention_context(
            block.config, positions[sequence, chosen].unsqueeze(0), None, plainly_causal=False
        )
        alone = RoutingContext(
            tokens=seen.tokens[sequence, chosen].unsqueeze(0), noise_keys=seen.noise_keys[sequence, chosen].unsqueeze(0)
        )
        x_1PD = x[sequence, chosen].unsqueeze(0)
        y_1PD, routing = Block.forward(block, x_1PD, context, alone)
        out[sequence, chosen] = out[sequence, chosen] + logits_L[chosen].sigmoid()[:, None] * (y_1PD - x_1PD)[0]
        found.append((sequence, chosen, routing.experts))
    return out, loss, found


def a_block(config: ModelConfig, layer_index: int, *, training: bool) -> DepthBlock:
    block = DepthBlock(config, layer_index, "reference")
    initialize(block, config, int(torch.randint(0, 2**31, ())))
    return block.double().train(training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_index", DENSE.depth_layers)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_routing_follow_the_definition(name: str, layer_index: int, training: bool) -> None:
    config = CONFIGS[name]
    block, positions_BL = a_block(config, layer_index, training=training), ragged_positions()
    mask_BL = positions_BL >= 0
    seen = RoutingContext(tokens=random_tokens(), mask=mask_BL, noise_keys=torch.randint(0, 2**62, (B, L)))
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    y_BLD, routing = block(x_BLD, make_attention_context(config, positions_BL, None, plainly_causal=False), seen)
    assert routing.depth is not None
    expected_BLD, expected_loss, found = definition(block, x_BLD, positions_BL, seen)
    torch.testing.assert_close(y_BLD, expected_BLD, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(depth_loss(routing.depth), expected_loss, rtol=1e-9, atol=1e-10)
    assert routing.depth.token_ids.tolist() == [place + b * L for b, chosen, _ in found for place in chosen]
    assert_same_experts(routing.experts, found)

    mix_BLD = torch.randn_like(y_BLD)
    names, parameters = zip(*block.named_parameters(), strict=True)
    inputs = (*parameters, x_BLD)
    actual, expected = (
        torch.autograd.grad((out * mix_BLD).sum() + 0.3 * loss, inputs, materialize_grads=True)
        for out, loss in ((y_BLD, depth_loss(routing.depth)), (expected_BLD, expected_loss))
    )
    for which, ours, theirs in zip((*names, "x"), actual, expected, strict=True):
        rtol = 1e-5 if "sinks" in which else 1e-8  # whose gradient is summed in float32
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=lambda text, which=which: f"{which}: {text}")


def assert_same_experts(whole: Routing | None, found: list[tuple[int, list[int], Routing | None]]) -> None:
    """`whole` says of all T tokens what the routings of the picked ones say, and 0 of the others."""
    if whole is None:
        assert all(routing is None for _, _, routing in found)
        return
    rows, dropped, logits_TE = [], 0, torch.zeros_like(whole.logits)
    load_E = torch.zeros(whole.num_experts, dtype=torch.int64)
    mask_T = torch.zeros(B * L, dtype=torch.bool)
    for sequence, chosen, routing in found:
        assert routing is not None
        places = torch.tensor(chosen) + sequence * L
        rows += rows_with_weight(routing, places[routing.token_ids])
        load_E, dropped = load_E + routing.load(), dropped + int(routing.num_dropped())
        logits_TE[places], mask_T[places] = routing.logits, True
    ours, theirs = sorted(rows_with_weight(whole, whole.token_ids)), sorted(rows)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=1e-10)
    torch.testing.assert_close(whole.logits, logits_TE)
    assert whole.mask is not None
    assert torch.equal(whole.mask, mask_T)
    assert torch.equal(whole.load(), load_E)
    assert whole.num_dropped() == dropped


def rows_with_weight(routing: Routing, token_ids: Tensor) -> list[tuple[int, int, float]]:
    """Token, expert, weight; without the rows that only fill up an expert's capacity."""
    rows = zip(token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)
    return [row for row in rows if row[2]]


def test_nothing_picked_leaves_the_stream_and_gives_every_parameter_a_zero_gradient() -> None:
    block = a_block(CONFIGS["experts with a capacity"], 0, training=False)
    x_BLD = torch.randn(B, L, D, dtype=torch.float64)
    nn.init.zeros_(block.router.weight)
    context = make_attention_context(block.config, torch.arange(L).expand(B, L), None, plainly_causal=True)
    y_BLD, routing = block(x_BLD, context, RoutingContext(tokens=random_tokens()))
    assert torch.equal(y_BLD, x_BLD)
    assert routing.depth is not None
    assert routing.experts is not None
    assert routing.depth.token_ids.numel() == routing.experts.token_ids.numel() == 0
    y_BLD.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_gets_the_same_alone_as_beside_others_and_padding(name: str, training: bool) -> None:
    model, tokens, keys_B = build(CONFIGS[name]).train(training), random_tokens(), random_keys()
    positions_BL = ragged_positions()
    together = model(tokens, positions_BL, noise_keys=keys_B)
    assert together.isfinite().all()
    for sequence in range(B):
        real = positions_BL[sequence] >= 0
        alone = model(tokens[sequence, real].unsqueeze(0), noise_keys=keys_B[sequence].unsqueeze(0))
        torch.testing.assert_close(together[sequence, real], alone[0], rtol=1e-9, atol=1e-9)


def test_equal_tokens_are_ties_that_the_earliest_wins_however_the_batch_is_cut() -> None:
    """In float32, where a matrix product may give equal rows other bits at other places."""
    for _ in range(10):
        hidden_size, length = (int(value) for value in torch.randint(30, 500, (2,)))
        router = DepthRouter(replace(DENSE, hidden_size=hidden_size))
        nn.init.normal_(router.weight)
        tokens = torch.randint(0, 3, (2, length))
        x_BLD = torch.randn(3, hidden_size)[tokens]
        together = router(x_BLD, RoutingContext(tokens=tokens), by_threshold=False, replay=None)
        logits = together.logits.view(2, length)
        chosen = []
        for sequence in range(2):
            assert len(set(logits[sequence].tolist())) <= 3
            alone_x, seen = x_BLD[sequence].unsqueeze(0), RoutingContext(tokens=tokens[sequence].unsqueeze(0))
            alone = router(alone_x, seen, by_threshold=False, replay=None)
            assert torch.equal(alone.logits.flatten(), logits[sequence])
            chosen += [place + sequence * length for place in alone.token_ids.tolist()]
            assert alone.token_ids.tolist() == picks(logits[sequence].tolist(), list(range(length)), 0.4)
        assert together.token_ids.tolist() == chosen


def unused(tokens: Tensor) -> Tensor:
    """(B, l) -> (B, V - l): the tokens that a sequence does not hold."""
    return torch.stack([torch.tensor(sorted(set(range(V)) - set(row))) for row in tokens.tolist()])


@pytest.mark.parametrize("name", CAUSAL)
def test_evaluation_never_looks_ahead_and_training_does(name: str) -> None:
    model, tokens = build(CAUSAL[name]).eval(), random_tokens()
    changed = torch.cat((tokens[:, :7], tokens[:, 7:].flip(1)), 1)
    torch.testing.assert_close(model(tokens)[:, :7], model(changed)[:, :7], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(tokens)[:, 7:], model(changed)[:, 7:])
    if CAUSAL[name].depth_capacity < 1 and CAUSAL[name].moe is None:
        futures = [torch.stack([row[torch.randperm(V - 7)[:5]] for row in unused(tokens[:, :7])]) for _ in range(20)]
        logits = [model.train()(torch.cat((tokens[:, :7], future), 1))[:, :7] for future in futures]
        assert any(not torch.allclose(logits[0], other) for other in logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_with_the_cache_equals_the_whole_pass(name: str) -> None:
    model, tokens = build(CAUSAL[name]).eval(), random_tokens()
    whole, whole_depth = list[Routing](), list[Routing]()
    full = model(tokens, routings=whole, depth_routings=whole_depth)
    kv = KVCache(model.config, batch_size=B, capacity=L + 2, dtype=torch.float64)
    cuts = [0, 5, 8, *range(9, L + 1)]
    parts, routings = [], list[Routing]()
    for start, end in pairwise(cuts):
        parts.append(model(tokens[:, start:end], kv=kv, routings=routings))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)
    for depth, index in zip(whole_depth, model.config.depth_layers, strict=True):
        held = kv.layer_positions[index][:, :L].flatten()
        assert (held >= 0).nonzero().flatten().tolist() == depth.token_ids.tolist()
    rows = sum(int(routing.tokens_per_expert().sum()) for routing in routings)
    assert rows == sum(int(routing.tokens_per_expert().sum()) for routing in whole)


def test_left_padding_changes_nothing_while_decoding() -> None:
    model, tokens, next_B1 = build(DENSE).eval(), random_tokens(), random_tokens(B, 1)
    left = int(torch.randint(1, L - 1, ()))
    positions_BL = torch.arange(L).repeat(B, 1)
    positions_BL[0] = torch.cat((torch.full((left,), -1), torch.arange(L - left)))
    kv = KVCache(DENSE, batch_size=B, capacity=L + 1, dtype=torch.float64)
    model(tokens, positions_BL, kv)
    expected = model(torch.cat((tokens[:1, left:], next_B1[:1]), 1))[:, -1]
    torch.testing.assert_close(model(next_B1, kv=kv)[:1, -1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_gives_the_same_gradients_and_keeps_the_choices(name: str) -> None:
    model, tokens, keys_B = build(CONFIGS[name]), random_tokens(), random_keys()
    positions_BL = ragged_positions()

    def gradients(disturb: Callable[[], object]) -> list[Tensor]:
        model.zero_grad()
        depth_routings: list[Routing] = []
        logits = model(tokens, positions_BL, noise_keys=keys_B, depth_routings=depth_routings)
        loss = logits.square().mean() + sum(depth_loss(routing) for routing in depth_routings)
        disturb()
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(lambda: None)
    assert len(expected) == len(list(model.parameters()))
    model.activation_checkpointing = True
    for ours, theirs in zip(gradients(lambda: None), expected, strict=True):
        assert torch.equal(ours, theirs)

    seen: list[Routing] = []
    block = model.blocks[0]
    assert isinstance(block, DepthBlock)

    def keep(module: nn.Module, args: object, routing: Routing) -> None:
        seen.append(routing)

    block.router.register_forward_hook(keep)
    gradients(block.router.weight.data.neg_)
    first, again = seen
    assert torch.equal(first.token_ids, again.token_ids)


def test_the_loss_draws_logits_to_the_side_of_the_threshold_where_training_put_their_tokens() -> None:
    block, x_BLD = a_block(replace(DENSE, depth_capacity=0.5), 0, training=True), torch.randn(2, 6, D).double()
    optimizer = torch.optim.Adam([block.router.weight], lr=0.05)
    seen = RoutingContext(tokens=random_tokens(2, 6))
    with torch.no_grad():
        fixed = block.router(x_BLD, seen, by_threshold=False, replay=None).decision
    for _ in range(300):
        optimizer.zero_grad()
        depth_loss(block.router(x_BLD, seen, by_threshold=False, replay=fixed)).backward()
        optimizer.step()
    evaluated = block.router(x_BLD, seen, by_threshold=True, replay=None)
    assert evaluated.token_ids.tolist() == fixed.token_ids.tolist()


def test_what_padding_holds_reaches_neither_choice_nor_gradient() -> None:
    block, positions_BL = a_block(DENSE, 0, training=True), ragged_positions()
    mask_BL = positions_BL >= 0
    x_BLD = torch.randn(B, L, D, dtype=torch.float64).masked_fill(~mask_BL.unsqueeze(2), torch.nan)
    routing = block.router(x_BLD, RoutingContext(tokens=random_tokens(), mask=mask_BL), by_threshold=False, replay=None)
    assert mask_BL.flatten()[routing.token_ids].all()
    depth_loss(routing).backward()
    assert block.router.weight.grad is not None
    assert block.router.weight.grad.isfinite().all()


def test_the_model_hands_out_a_routing_of_every_depth_block_and_of_every_layer_of_experts() -> None:
    config = CONFIGS["experts with a capacity"]
    model, routings, depth_routings = build(config), list[Routing](), list[Routing]()
    model(random_tokens(), routings=routings, depth_routings=depth_routings)
    assert len(routings) == len(model.moe_layers) == 3
    assert [routing.token_ids.numel() for routing in depth_routings] == [B * math.ceil(0.4 * L)] * 2
    assert all(routing.num_experts == 1 and routing.logits.shape == (B * L, 1) for routing in depth_routings)
    assert all(routing.num_tokens == B * L for routing in routings)


def test_a_recorded_routing_cannot_be_replayed() -> None:
    model, routings = build(CONFIGS["experts with a capacity"]), list[Routing]()
    model(random_tokens(), routings=routings)
    with pytest.raises(UsageError, match="tokens may pass by layers 0, 2"):
        model(random_tokens(), replay=routings)


def test_a_model_is_made_on_the_meta_device_and_saves_what_tokens_pass_by() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIGS["expert choice"])
    assert all(parameter.is_meta for parameter in model.parameters())
    block = a_block(DENSE, 0, training=True)
    shapes: list[torch.Size] = []
    block.feed_forward.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    context = make_attention_context(DENSE, torch.arange(L).expand(B, L), None, plainly_causal=True)
    block(torch.randn(B, L, D, dtype=torch.float64), context, RoutingContext(tokens=random_tokens()))
    assert shapes == [torch.Size((B, math.ceil(0.4 * L), D))]


def test_under_autocast_the_router_stays_in_float32() -> None:
    model = Transformer(DENSE)
    model.init_weights(0)
    routings: list[Routing] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_tokens(), depth_routings=routings)
    assert logits.isfinite().all()
    assert all(routing.logits.dtype == routing.weights.dtype == torch.float32 for routing in routings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth_layers": (3,)}, "layer 3 is named in .*depth_layers.* the layers are 0 to 2"),
        ({"depth_layers": (-1,)}, "layer -1 is named"),
        ({"depth_capacity": 0.0}, "depth_capacity is 0.0"),
        ({"depth_capacity": 1.5}, "depth_capacity is 1.5"),
        ({"depth_capacity": float("nan")}, "depth_capacity is nan"),
    ],
)
def test_impossible_depths_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(DENSE, **settings)


def test_binary_cross_entropy_of_extreme_logits_is_finite() -> None:
    logits_T1 = torch.tensor([[1e4], [-1e4], [0.0]])
    routing = Routing(torch.tensor([0]), torch.tensor([0]), torch.ones(1), logits_T1, 1, None)
    expected = functional.softplus(torch.tensor(0.0))
    torch.testing.assert_close(depth_loss(routing), expected)
